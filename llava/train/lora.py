"""LoRA adapters (arXiv:2106.09685) for the decoder's matrices.

The query, key and value projections are fused into one matrix, but each has its own adapter, as in PEFT checkpoints. In
MPT, the three projections share one adapter, because the original MPT model fuses them as well.

r rank   I input features   O output features of a part
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llava.config import DecoderConfig
from llava.formats.format import Checkpoint
from llava.model.decoder import Decoder
from llava.model.linear import Linear
from llava.model.lora import Adapter, LoraLinear
from llava.quantize.nf4 import NF4Linear
from llava.tensors.lazy import InMemory
from llava.tensors.sums import LoraPair, WithLora
from llava.train.recipe import Recipe

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


def lora_pairs(decoder: Decoder, tensors: Mapping[str, Tensor]) -> dict[str, list[LoraPair]]:
    """Returns the adapters as updates of the matrices' rows, keyed by our tensor names, to merge them."""
    found: dict[str, list[LoraPair]] = {}
    for name, layer in lora_layers(decoder):
        first, pairs = 0, found.setdefault(f"{name}.weight", [])
        for part, adapter in layer.adapters.items():
            a, b = (
                InMemory(tensor=tensors[f"{name}.adapters.{part}.{leaf}"], origin=f"trained {name}") for leaf in "ab"
            )
            assert isinstance(adapter, Adapter)
            pairs.append(LoraPair(first, a, b, adapter.scale))
            first += b.shape[0]
    return found


def stacked(
    adapters: Mapping[str, Pairs], checkpoint: Checkpoint, recipe: Recipe, *, meta: bool = False
) -> tuple[Mapping[str, Pairs], int, float]:
    """Returns new adapters together with those of the LoRA that training started from, with their rank and alpha.

    The sum of two LoRAs of ranks r and s is a LoRA of rank r + s. If there is an old one, both are scaled in advance,
    so that alpha / rank is 1, and padded with zeros to one rank. meta: the new adapters are on the meta device.
    """
    old = {n.removesuffix(".weight"): t.pairs for n, t in checkpoint.tensors.items() if isinstance(t, WithLora)}
    if not old:
        return adapters, recipe.lora_rank, recipe.lora_alpha
    factors: dict[str, dict[str, list[tuple[Tensor, Tensor]]]] = {}
    for name, pairs in old.items():
        for pair in pairs:
            a, b = (torch.empty(t.shape, device="meta") if meta else t.read().float() for t in (pair.a, pair.b))
            part = _part(name, pair.first, checkpoint.config.decoder)
            factors.setdefault(name, {}).setdefault(part, []).append((a, b * pair.scale))
    for name, parts in adapters.items():
        for part, (a, b) in parts.items():
            scaled = (a, b * (recipe.lora_alpha / recipe.lora_rank))
            factors.setdefault(name, {}).setdefault(part, []).append(scaled)
    r = max(sum(len(a) for a, _ in both) for parts in factors.values() for both in parts.values())
    joined = {name: {part: _joined(both, r) for part, both in parts.items()} for name, parts in factors.items()}
    return joined, r, float(r)


def _part(name: str, first: int, config: DecoderConfig) -> str:
    """Returns the part of a matrix whose rows start at `first`: q, k or v of a fused matrix, "" of any other."""
    if not name.endswith("attn.qkv") or config.kind != "llama":
        return ""
    q, k, _ = config.qkv_rows
    return {0: "q", q: "k", q + k: "v"}[first]


def _joined(both: list[tuple[Tensor, Tensor]], r: int) -> tuple[Tensor, Tensor]:
    """Concatenates factors A [s, I] and B [O, s] along s, and pads them with zeros to s = r."""
    a, b = torch.cat([a for a, _ in both]), torch.cat([b for _, b in both], dim=1)
    return torch.cat([a, a.new_zeros(r - len(a), a.shape[1])]), torch.cat([b, b.new_zeros(len(b), r - len(a))], dim=1)
