"""Whether two checkpoints are one model: bit by bit, and by their logits; neither is ever in memory as a whole.

S places   V vocabulary rows   D width
"""

from typing import Any

import torch
from torch import Tensor, nn

from llava.checkpoint.onbase import LENGTHENED
from llava.checkpoint.open import Checkpoint
from llava.checkpoint.write import Progress, silent
from llava.errors import CheckpointError
from llava.model.llava import Llava, meta_model

TOLERANCE = 1e-4  # logits of the same weights, float32
_ROUNDING = 2e-6  # of a value: some roundings of float32, as sums of thousands have
_PLACES = 24  # of text
_PICTURE_PLACES = 8  # the first of a picture's; all that go into the tower count in them


def check_equal(one: Checkpoint, other: Checkpoint, progress: Progress = silent) -> None:
    """Two checkpoints hold the same tensors, bit for bit. Raises CheckpointError naming the first that differs.

    Of tables that `other` has lengthened, the rows that both have are compared.
    """
    if differing := sorted(set(one.sources) ^ set(other.sources)):
        raise CheckpointError(f"{other.folder}: differs from {one.folder} in having or lacking {differing[0]}")
    total = sum(source.n_bytes for source in one.sources.values())
    done = 0
    for name, tensor in one.tensors():
        tensor, same = tensor.to(one.sources[name].dtype), other.sources[name].read()
        same = same[: len(tensor)] if name in LENGTHENED else same
        if tensor.dtype != same.dtype or not torch.equal(_bits(tensor), _bits(same)):
            raise CheckpointError(f"{other.folder}: {name} is not what {one.folder} holds; convert again")
        done += one.sources[name].n_bytes
        progress(done, total)


def _bits(tensor: Tensor) -> Tensor:
    """NaN equals itself, 0 is not -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check_logits(one: Checkpoint, other: Checkpoint) -> float:
    """Largest difference of logits, on the rows that both have.

    Raises CheckpointError above `TOLERANCE`, unless rounding alone makes that much of a difference: products may be
    summed in another order the second time, and a deep model can make a thousandfold of it.
    """
    n = min(one.config.decoder.vocab_size, other.config.decoder.vocab_size)
    expected = logits(one, n)[:, :n]
    difference = (expected - logits(other, n)[:, :n]).abs().max().item()
    if not difference <= TOLERANCE:
        rounding = (expected - logits(one, n, nudge=_ROUNDING)[:, :n]).abs().max().item()
        if difference <= rounding:
            return difference
        raise CheckpointError(f"{other.folder}: its logits differ from {one.folder}'s by {difference:.1e}; not written")
    return difference


@torch.inference_mode()
def logits(checkpoint: Checkpoint, n_ids: int, nudge: float = 0.0) -> Tensor:
    """[S, V] float32 of a fixed picture, where there is a tower, and fixed ids below `n_ids` behind it.

    nudge: every second value of what goes into the language model is larger by this share.
    """
    model = _streaming(checkpoint)
    x = model.embed(torch.arange(1, _PLACES + 1) * 7919 % n_ids).float()  # [S, D]
    if model.vision is not None and checkpoint.config.vision is not None:
        size = checkpoint.config.vision.image_size
        pixels = torch.linspace(-2, 2, 3 * size * size).view(1, 3, size, size).sin()
        (picture,) = model.encode_images(pixels, [1], [None])
        x = torch.cat([picture[:_PICTURE_PLACES], x])
    x[:, ::2] *= 1 + nudge
    hidden = model.decoder(x[None])[0]
    # the head in pieces: of a wide model with a large vocabulary it would take 2 GB
    head = checkpoint.sources["decoder.embed.weight" if checkpoint.config.decoder.tied else "decoder.head.weight"]
    return torch.cat([hidden @ piece.to(head.dtype).float().T for piece in head.pieces()], dim=-1)


def _streaming(checkpoint: Checkpoint) -> Llava:
    """The model in float32, of which a module has its weights while it is called, and no other."""
    model = meta_model(checkpoint.config)
    for name, module in model.named_modules():
        own = {key: f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)}
        if own and name:
            module.register_forward_pre_hook(_Fill(checkpoint, own))
            module.register_forward_hook(_empty)
    return model


class _Fill:
    """Before a module is called: its own parameters, from their files."""

    def __init__(self, checkpoint: Checkpoint, own: dict[str, str]):
        self.checkpoint, self.own = checkpoint, own

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        for key, name in self.own.items():
            source = self.checkpoint.sources[name]
            tensor = source.read().to(source.dtype)  # of a sum: rounded to the type that it is stored in
            if not isinstance(module, nn.Embedding):  # a table stays mapped, few of its rows are read
                tensor = tensor.float()
            module.register_parameter(key, nn.Parameter(tensor, requires_grad=False))


def _empty(module: nn.Module, inputs: Any, output: Any) -> None:
    for key, parameter in list(module.named_parameters(recurse=False)):
        module.register_parameter(key, nn.Parameter(parameter.to("meta"), requires_grad=False))
