"""The maximum speed of the hardware and the work that a model takes: the two sides of "x % of the ceiling"."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from shapes import Noise
from timing import Target

from llava.config import DecoderConfig, VisionConfig


@dataclass(frozen=True)
class Ceiling:
    """A simple operation whose speed bounds what a benchmark can reach."""

    name: str
    amount: float  # bytes or floating-point operations per run
    run: Callable[[], float]


def memory_ceilings(target: Target, size: str) -> list[Ceiling]:
    """Two ways to read 1 GB (4 GB on a GPU): `max()`, and a matrix-vector product, on a CPU also in float32."""
    n_bytes = (2**32 if target.on_gpu else 2**30) if size != "tiny" else 2**24
    values = torch.empty(n_bytes // target.dtype.itemsize, dtype=target.dtype, device=target.device)
    Noise(target).fill(values)

    def product(dtype: torch.dtype) -> Ceiling:
        table, x = values.view(dtype).view(-1, 4096), torch.ones(4096, dtype=dtype, device=target.device)
        name = f"matrix x vector, {str(dtype).removeprefix('torch.')}"
        return Ceiling(name, n_bytes, lambda: target.seconds(lambda: table @ x))

    read = Ceiling("read (max)", n_bytes, lambda: target.seconds(values.max))
    return [read, *map(product, _dtypes(target))]


def matmul_ceilings(target: Target, size: str) -> list[Ceiling]:
    """Products of square matrices; on a CPU also in float32, which can be faster."""
    n = (8192 if target.on_gpu else 2048) if size != "tiny" else 256

    def product(dtype: torch.dtype) -> Ceiling:
        a, b = (torch.randn(n, n, device=target.device).to(dtype) for _ in "ab")
        name = f"matrix product, {str(dtype).removeprefix('torch.')}"
        return Ceiling(name, 2 * n**3, lambda: target.seconds(lambda: a @ b))

    return list(map(product, _dtypes(target)))


def _dtypes(target: Target) -> list[torch.dtype]:
    return [target.dtype] if target.on_gpu else list(dict.fromkeys((target.dtype, torch.float32)))


def best(ceilings: Sequence[Ceiling], seconds: Mapping[str, Sequence[float]]) -> float:
    """The highest of the ceilings, in bytes or operations per second."""
    return max(ceiling.amount / median(seconds[ceiling.name]) for ceiling in ceilings)


def rates(
    amount: float,
    contestants: Mapping[str, object],
    ceilings: Sequence[Ceiling],
    seconds: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    """Bytes or operations per second of every contestant (each handles `amount` per run) and of every ceiling."""
    amounts = {**dict.fromkeys(contestants, amount), **{ceiling.name: ceiling.amount for ceiling in ceilings}}
    return {name: amounts[name] / median(seconds[name]) for name in amounts}


def decoder_flops(sizes: DecoderConfig, tokens: int) -> float:
    """Operations for a prompt and the logits of its last token. Causal attention counts as half."""
    values = sizes.n_heads * sizes.head_dim
    block = sizes.dim * (2 * values + 2 * sizes.n_kv_heads * sizes.head_dim + 3 * sizes.mlp_dim)
    attention = 2 * tokens**2 * values
    return sizes.n_layers * (2.0 * tokens * block + attention) + 2.0 * sizes.dim * sizes.vocab_size


def tower_flops(tower: VisionConfig) -> float:
    """Operations for one view up to the layer that LLaVA reads, even for a peer that computes more layers."""
    n, d = tower.grid**2 + 1, tower.dim
    block = 2.0 * n * (4 * d * d + 2 * d * tower.mlp_dim) + 4.0 * n * n * d
    return 2.0 * tower.grid**2 * 3 * tower.patch_size**2 * d + tower.n_blocks * block
