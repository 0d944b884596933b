"""LoRA adapters (arXiv:2106.09685) for the decoder's matrices.

The query, key and value projections are fused into one matrix, but each has its own adapter, as in PEFT checkpoints. In
MPT, the three projections share one adapter, because the original MPT model fuses them as well.

r rank   I input features   O output features of a part
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from llava.config import DecoderConfig
from llava.model.decoder import Decoder
from llava.model.linear import Linear
from llava.model.lora import Adapter, LoraLinear
from llava.quantize.nf4 import NF4Linear

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # part -> A [r, I], B [O, r]; the part is "" if the matrix has one adapter


def add_lora(
    decoder: Decoder, config: DecoderConfig, *, rank: int, alpha: float, dropout: float, nf4: bool = False
) -> None:
    """Adds adapters to every matrix in every block. With `nf4`, also replaces these matrices with `NF4Linear` layers.

    The head is left unchanged. Raises ConfigError if the size of a matrix is not a multiple of the NF4 block size.
    """
    for name, module in list(decoder.blocks.named_modules()):
        if not isinstance(module, Linear):
            continue
        parent, _, leaf = name.rpartition(".")
        base = NF4Linear(module.in_features, module.out_features) if nf4 else module
        split = leaf == "qkv" and config.kind == "llama"
        rows = dict(zip("qkv", config.qkv_rows, strict=True)) if split else {"all": module.out_features}
        parts = {part: Adapter(module.in_features, n, rank, alpha / rank) for part, n in rows.items()}
        setattr(decoder.blocks.get_submodule(parent), leaf, LoraLinear(base, parts, dropout))


def lora_layers(decoder: Decoder) -> Iterator[tuple[str, LoraLinear]]:
    """Yields (name, module) for each matrix with adapters, with names such as decoder.blocks.3.attn.qkv."""
    for name, module in decoder.named_modules():
        if isinstance(module, LoraLinear):
            yield f"decoder.{name}", module


def adapter_pairs(decoder: Decoder, tensors: Mapping[str, Tensor]) -> dict[str, Pairs]:
    """Returns the A and B tensors of all adapters by matrix name and part. `tensors` is keyed by parameter name."""
    found: dict[str, Pairs] = {}
    for name, layer in lora_layers(decoder):
        found[name] = {
            "" if part == "all" else part: (
                tensors[f"{name}.adapters.{part}.a"],
                tensors[f"{name}.adapters.{part}.b"],
            )
            for part in layer.adapters
        }
    return found
