"""Models with the published shapes and random weights."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, cast

import result  # noqa: F401  (makes llava importable)
import torch
import typer
from timing import Target
from torch import Tensor, nn

from llava.config import DecoderConfig, EngineOptions, ImageConfig, LlavaConfig, ProjectorConfig, VisionConfig
from llava.engine.adapters import Variant
from llava.engine.capture import Capture
from llava.engine.engine import Engine
from llava.engine.sampling_params import SamplingParams
from llava.model.llava import Llava, meta_model
from llava.preprocess.inputs import ModelInput, Preprocessor

Layers = Annotated[int | None, typer.Option("--layers", help="blocks; default: the model's full depth")]
Size = Annotated[str, typer.Option("--size", help="7b or 13b: LLaVA-1.5's shapes; tiny: a self-test in seconds")]
M = TypeVar("M", bound=nn.Module)

SIZES = {  # n_layers, dim, n_heads, mlp_dim
    "7b": (32, 4096, 32, 11008),
    "13b": (40, 5120, 40, 13824),
    "tiny": (2, 64, 4, 172),
}


def llava_config(size: str, layers: int | None, *, vision: bool) -> LlavaConfig:
    """The sizes of LLaVA-1.5-7B or -13B, or tiny ones; without `vision`, only those of its language model."""
    if size not in SIZES:
        raise typer.BadParameter(f"--size {size}: expected {', '.join(SIZES)}")
    depth, dim, heads, mlp_dim = SIZES[size]
    decoder = DecoderConfig(
        kind="llama",
        n_layers=layers or depth,
        dim=dim,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=dim // heads,
        mlp_dim=mlp_dim,
        vocab_size=512 if size == "tiny" else 32000,
        max_seq=4096,
        eps=1e-5,
    )
    if not vision:
        return LlavaConfig(decoder=decoder)
    tower = clip_config(size)
    return LlavaConfig(
        decoder=decoder,
        vision=tower,
        projector=ProjectorConfig(in_dim=tower.dim, out_dim=decoder.dim, depth=2),
        image=ImageConfig(size=tower.image_size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), aspect="pad"),
    )


def mpt_config(size: str, layers: int | None) -> DecoderConfig:
    """The sizes of MPT-7B, or tiny ones."""
    depth, dim, heads, _ = SIZES[size]
    return DecoderConfig(
        kind="mpt",
        n_layers=layers or depth,
        dim=dim,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=dim // heads,
        mlp_dim=4 * dim,
        vocab_size=512 if size == "tiny" else 50432,
        max_seq=2048,
        eps=1e-5,
        rope_theta=None,
        alibi_bias_max=8.0,
        tied=True,
    )


def clip_config(size: str, layers: int | None = None) -> VisionConfig:
    """CLIP ViT-L/14 at 336 pixels, or a tiny tower. LLaVA reads the output of the second-to-last layer."""
    sizes: dict[str, Any]
    if size != "tiny":
        sizes = {"dim": 1024, "n_layers": 24, "n_heads": 16, "mlp_dim": 4096, "image_size": 336}
    else:
        sizes = {"dim": 64, "n_layers": 3, "n_heads": 4, "mlp_dim": 128, "image_size": 56}
    return VisionConfig(**sizes | ({"n_layers": layers} if layers else {}), patch_size=14)


class Noise:
    """Cheap random values: one block is drawn once, and each tensor is filled from it, starting at a new offset."""

    def __init__(self, target: Target, *, std: float = 0.02, values: int = 2**22 + 15):
        generator = torch.Generator(target.device).manual_seed(0)
        block = torch.randn(values, generator=generator, device=target.device) * std
        self.block = block.to(target.dtype)
        self.offset = 0

    def fill(self, tensor: Tensor) -> None:
        """Overwrites a contiguous tensor."""
        flat, n = tensor.view(-1), len(self.block)
        done = 0
        while done < len(flat):
            part = self.block[self.offset : self.offset + len(flat) - done]
            flat[done : done + len(part)] = part
            done += len(part)
            self.offset = (self.offset + len(part)) % n
        self.offset = (self.offset + 7919) % n  # no two tensors start with the same values


def with_random_weights(module: M, target: Target) -> M:
    """Gives a module on the meta device memory and random values; norm weights are 1."""
    noise = Noise(target)
    state = {}
    for name, tensor in module.state_dict().items():
        state[name] = torch.empty(tensor.shape, dtype=target.dtype, device=target.device)
        if re.search(r"norm\.weight$", name):
            state[name].fill_(1)
        else:
            noise.fill(state[name])
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def random_llava(config: LlavaConfig, target: Target) -> Llava:
    return with_random_weights(meta_model(config), target)


class IdsAsWords:
    """Stands in for a tokenizer: each id decodes to a word, and no id ends an answer."""

    size = 1 << 30
    bos_id = eos_id = None
    special: frozenset[int] = frozenset()

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(f" {id}" for id in ids)

    def id_of(self, text: str) -> int | None:
        return None


def engine_for(model: Llava) -> Engine:
    """An engine for one request at a time, which computes the same prompt again each time."""
    options = EngineOptions(max_batch=1, prefix_cache=False)
    return Engine({None: Variant(model, Preprocessor(model.config, cast(Any, IdsAsWords())))}, options)


def engine_logits(engine: Engine, input: ModelInput) -> Tensor:
    """The logits [1, V] after a prompt, which the engine computes as for any request."""
    last = engine.model.config.decoder.n_layers
    stream = engine.stream(input, SamplingParams(max_new_tokens=0), capture=Capture(hidden_states=(last,)))
    for _ in stream:
        pass
    with torch.inference_mode():
        return engine.model.decoder.logits(stream.captured().hidden_states(last)[-1:].to(engine.model.device))


def hub_sizes(decoder: DecoderConfig) -> dict[str, int]:
    """The sizes of a decoder as keys of a Llama's config.json."""
    return {
        "hidden_size": decoder.dim,
        "intermediate_size": decoder.mlp_dim,
        "num_hidden_layers": decoder.n_layers,
        "num_attention_heads": decoder.n_heads,
        "num_key_value_heads": decoder.n_kv_heads,
        "vocab_size": decoder.vocab_size,
    }
