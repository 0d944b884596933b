"""Low-rank adapters, arXiv:2106.09685, beside the decoder's matrices.

Our query, key and value matrices are one; each of the three has an adapter of its own, as in PEFT's files. MPT's are
one there too, and have one.

r rank   I values in   O values out of a part
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from llava.config import DecoderConfig
from llava.errors import ConfigError
from llava.model.decoder import Decoder
from llava.model.linear import Linear
from llava.model.lora import Adapter, LoraLinear
from llava.quantize.nf4 import BLOCK, NF4Linear

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # part -> A [r, I], B [O, r]; a matrix that is one part has the part ""


def add_lora(
    decoder: Decoder, config: DecoderConfig, *, rank: int, alpha: float, dropout: float, nf4: bool = False
) -> None:
    """Every matrix of every block gets adapters, and with `nf4` becomes one of 4 bits. The head gets none.

    Raises ConfigError where a matrix does not fit 4-bit blocks.
    """
    for name, module in list(decoder.blocks.named_modules()):
        if not isinstance(module, Linear):
            continue
        parent, _, leaf = name.rpartition(".")
        base = _four_bit(module) if nf4 else module
        rows = _qkv_rows(config) if leaf == "qkv" and config.kind == "llama" else {"all": module.out_features}
        parts = {part: Adapter(module.in_features, n, rank, alpha / rank) for part, n in rows.items()}
        setattr(decoder.blocks.get_submodule(parent), leaf, LoraLinear(base, parts, dropout))


def _four_bit(module: Linear) -> NF4Linear:
    if (n := module.weight.numel()) % BLOCK:
        raise ConfigError(f"quantize_base: a matrix of {n} values does not fill blocks of {BLOCK}")
    return NF4Linear(module.in_features, module.out_features)


def _qkv_rows(config: DecoderConfig) -> dict[str, int]:
    kv = config.n_kv_heads * config.head_dim
    return {"q": config.n_heads * config.head_dim, "k": kv, "v": kv}


def lora_layers(decoder: Decoder) -> Iterator[tuple[str, LoraLinear]]:
    """Our names of the adapted matrices, such as decoder.blocks.3.attn.qkv."""
    for name, module in decoder.named_modules():
        if isinstance(module, LoraLinear):
            yield f"decoder.{name}", module


def pairs(decoder: Decoder, tensors: Mapping[str, Tensor]) -> dict[str, Pairs]:
    """The adapters among tensors that are named as the model's parameters, by matrix and part."""
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
