"""Linear layer of a few rows, such as a batch of decoding sequences, with its activation or residual sum.

For 2 to 64 rows, the time is that of reading the weight, which cuBLAS does at 60 % of the bandwidth of an H200. Each
program multiplies some rows of the weight with all rows of x, so that every weight is read once.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from llava.kernels.matvec import activated
from llava.kernels.support import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    shared_memory,
    tl,
)

_MUCH_MEMORY = 160 * 2**10  # bytes that all tiles fit into; A100 and H100 have them, RTX 3090 and L4 do not


class Tile(NamedTuple):
    """What a program reads at a time, and with how many warps."""

    rows: int  # of the weight
    columns: int
    stages: int  # tiles on their way from memory
    warps: int


@jit
def skinny_kernel(
    x_ptr, weight_ptr, gate_ptr, residual_ptr, out_ptr, n_rows, n,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [M, n] = activation(gate x) * weight x + residual. A tile is BN rows of the weight times all BM rows of x."""
    tile = tl.program_id(0)
    column = tile * BN + tl.arange(0, BN)
    row = tl.arange(0, BM)
    k = tl.arange(0, BK)
    safe = tl.where(column < n, column, 0)  # rows beyond the last one are read and dropped: masks would slow the loop
    w_at = weight_ptr + safe[:, None].to(tl.int64) * K + k[None, :]
    g_at = gate_ptr + safe[:, None].to(tl.int64) * K + k[None, :]
    x_at = x_ptr + row[None, :] * K + k[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    gate = tl.zeros([BN, BM], tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for start in tl.range(0, K, BK, num_stages=STAGES):
        if K % BK == 0:
            w = tl.load(w_at + start, eviction_policy="evict_first")
            x = tl.load(x_at + start, mask=(row < n_rows)[None, :], other=0.0)
        else:
            w = tl.load(w_at + start, mask=(start + k < K)[None, :], other=0.0)
            x = tl.load(x_at + start, mask=(row < n_rows)[None, :] & (start + k < K)[:, None], other=0.0)
        acc = tl.dot(w, x, acc)
        if GATED:
            if K % BK == 0:
                g = tl.load(g_at + start, eviction_policy="evict_first")
            else:
                g = tl.load(g_at + start, mask=(start + k < K)[None, :], other=0.0)
            gate = tl.dot(g, x, gate)
    if GATED:
        y = acc * activated(gate, ACTIVATION)
    else:
        y = activated(acc, ACTIVATION)
    at = row[None, :] * n + column[:, None]
    mask = (row < n_rows)[None, :] & (column < n)[:, None]
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


def skinny_matmul(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    gate: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Computes x [M, K] -> out [M, N]; see `fused_linear`, which calls this for 2 to 64 rows. Needs Triton.

    tile: default: the best that was measured; see benchmarks/notes.md.
    """
    (m, k), n = x.shape, len(weight)
    bm = max(8, next_power_of_2(m))
    tile = tile or best_tile(n, bm, gated=gate is not None, memory=shared_memory(x.device))
    skinny_kernel[(-(-n // tile.rows),)](
        x, weight, weight if gate is None else gate, x if residual is None else residual, out, m, n, k, bm,
        tile.rows, tile.columns, tile.stages, activation, gate is not None, residual is not None,
        **launch_options(x.device, num_warps=tile.warps, num_stages=tile.stages),
    )  # fmt: skip
    return out


def best_tile(n: int, bm: int, *, gated: bool, memory: int) -> Tile:
    """Returns the tile for n rows of the weight and bm rows of x. Measured on an H200.

    memory: bytes of shared memory that a program can have.
    """
    if gated or memory < _MUCH_MEMORY:
        return Tile(32, 128, 3, 4 if bm <= 16 else 2)
    if n > 8192:
        return Tile(32, 128, 4, 2) if bm <= 16 else Tile(64, 128, 3, 4)
    return Tile(32, 256, 5 if bm <= 32 else 4, 2 if bm <= 16 else 4)
