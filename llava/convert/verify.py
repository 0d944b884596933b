"""Checks that two checkpoints contain the same model, bit by bit or by logits, without loading all weights at once.

S sequence length   V vocabulary size   D dim
"""

from typing import Any

import torch
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.formats.added_rows import VOCAB_TABLES
from llava.formats.format import Checkpoint
from llava.model.llava import Llava, meta_model
from llava.tensors.writer import Progress, no_progress

TOLERANCE = 1e-4  # maximum absolute difference between float32 logits of the same weights
_ROUNDING = 2e-6  # typical relative rounding error of float32 sums of thousands of terms
_TEXT_TOKENS = 24
_IMAGE_TOKENS = 8  # use only the first few image tokens; each depends on the whole image


def check_equal(one: Checkpoint, other: Checkpoint, progress: Progress = no_progress) -> None:
    """Compares all tensors bit by bit. Raises CheckpointError on the first tensor that differs.

    If `other` has more vocabulary rows, only the rows that both checkpoints have are compared.
    """
    if differing := sorted(set(one.tensors) ^ set(other.tensors)):
        raise CheckpointError(
            f"{other.path}: tensor names differ from those in {one.path}; only one of the two contains {differing[0]}"
        )
    total = sum(tensor.n_bytes for tensor in one.tensors.values())
    done = 0
    for name, value in one.read_tensors():
        value, written = value.to(one.tensors[name].dtype), other.tensors[name].read()
        written = written[: len(value)] if name in VOCAB_TABLES else written
        if value.dtype != written.dtype or not torch.equal(_bits(value), _bits(written)):
            raise CheckpointError(f"{other.path}: {name} differs from {one.path}; convert again")
        done += one.tensors[name].n_bytes
        progress(done, total)


def _bits(tensor: Tensor) -> Tensor:
    """Returns the raw bytes, so that NaN equals itself and 0 differs from -0 in comparisons."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check_logits(one: Checkpoint, other: Checkpoint) -> float:
    """Returns the largest difference between the logits, over the vocabulary rows that both checkpoints have.

    Raises CheckpointError if the difference exceeds `TOLERANCE` and rounding cannot explain it. The summation order may
    differ between two runs, and a deep model can amplify the resulting error a thousandfold.
    """
    n = min(one.config.decoder.vocab_size, other.config.decoder.vocab_size)
    expected = logits(one, n)[:, :n]
    difference = (expected - logits(other, n)[:, :n]).abs().max().item()
    if not difference <= TOLERANCE:
        rounding = (expected - logits(one, n, nudge=_ROUNDING)[:, :n]).abs().max().item()
        if difference <= rounding:
            return difference
        raise CheckpointError(
            f"{other.path}: logits differ from {one.path} by {difference:.1e}; the result was discarded"
        )
    return difference


@torch.inference_mode()
def logits(checkpoint: Checkpoint, n_ids: int, nudge: float = 0.0) -> Tensor:
    """Returns float32 logits [S, V] for a fixed image (if there is a tower) and fixed ids below `n_ids`.

    nudge: relative change applied to every second value of the decoder's input.
    """
    model = _streaming_model(checkpoint)
    x = model.embed(torch.arange(1, _TEXT_TOKENS + 1) * 7919 % n_ids).float()  # [S, D]
    if model.vision is not None and checkpoint.config.vision is not None:
        size = checkpoint.config.vision.image_size
        pixels = torch.linspace(-2, 2, 3 * size * size).view(1, 3, size, size).sin()
        (picture,) = model.encode_images(pixels, [1], [None])
        x = torch.cat([picture[:_IMAGE_TOKENS], x])
    x[:, ::2] *= 1 + nudge
    hidden = model.decoder(x[None])[0]
    # apply the head in chunks: it takes 2 GB in a wide model with a large vocabulary
    head = checkpoint.tensors["decoder.embed.weight" if checkpoint.config.decoder.tied else "decoder.head.weight"]
    return torch.cat([hidden @ chunk.to(head.dtype).float().T for chunk in head.chunks()], dim=-1)


def _streaming_model(checkpoint: Checkpoint) -> Llava:
    """Returns the model in float32; the weights of each module are in memory only while the module runs."""
    model = meta_model(checkpoint.config)
    for name, module in model.named_modules():
        own = {key: f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)}
        if own and name:
            module.register_forward_pre_hook(_Fill(checkpoint, own))
            module.register_forward_hook(_release)
    return model


class _Fill:
    """Forward pre-hook that reads a module's own parameters from disk."""

    def __init__(self, checkpoint: Checkpoint, own: dict[str, str]):
        self.checkpoint, self.own = checkpoint, own

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        for key, name in self.own.items():
            tensor = self.checkpoint.tensors[name]
            # a weight merged with a LoRA or delta is read in a wider dtype; round it, as a converted file stores it
            value = tensor.read().to(tensor.dtype)
            if not isinstance(module, nn.Embedding):  # embedding tables stay memory-mapped: only a few rows are read
                value = value.float()
            module.register_parameter(key, nn.Parameter(value, requires_grad=False))


def _release(module: nn.Module, inputs: Any, output: Any) -> None:
    for key, parameter in list(module.named_parameters(recurse=False)):
        module.register_parameter(key, nn.Parameter(parameter.to("meta"), requires_grad=False))
