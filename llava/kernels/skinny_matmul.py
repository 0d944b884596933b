"""Linear layer of a few rows, such as a batch of decoding sequences, with its activation or residual sum.

For 2 to 64 rows, the time is that of reading the weight, which cuBLAS does at 60 % of the bandwidth of an H200. Each
program multiplies some rows of the weight with all rows of x, so that every weight is read once.
"""

from __future__ import annotations

from torch import Tensor

from llava.kernels.matvec import activated
from llava.kernels.support import gdc_launch_dependents, gdc_wait, jit, launch_options, tl


@jit
def prefetch(pointer, N_BYTES: tl.constexpr):
    """Brings N_BYTES, a multiple of 16, to the L2 cache. One thread asks for them, and nothing waits."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [pointer.to(tl.int64), N_BYTES], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def skinny_kernel(
    x_ptr, weight_ptr, gate_ptr, residual_ptr, out_ptr, n_rows, n,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
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
        if PREFETCH > 0:
            for i in tl.static_range(BN):
                at = tl.minimum(tile * BN + i, n - 1).to(tl.int64) * K
                prefetch(weight_ptr + at, PREFETCH)
                if GATED:
                    prefetch(gate_ptr + at, PREFETCH)
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
    tile: tuple[int, int, int, int, int] | None = None,
) -> Tensor:
    """Computes x [M, K] -> out [M, N]; see `fused_linear`, which calls this for 2 to 64 rows. Needs Triton.

    tile: rows of the weight, columns, pipeline stages, warps and bytes to prefetch of each row; default: as measured.
    """
    (m, k), n = x.shape, len(weight)
    bm = max(16, 1 << (m - 1).bit_length())
    bn, bk, stages, warps, ahead = tile or _tile(n, k, bm, gated=gate is not None)
    skinny_kernel[(-(-n // bn),)](
        x, weight, weight if gate is None else gate, x if residual is None else residual, out, m, n, k, bm, bn, bk,
        stages, activation, gate is not None, residual is not None, min(ahead, 2 * k),
        **launch_options(x.device, num_warps=warps, num_stages=stages),
    )  # fmt: skip
    return out


def _tile(n: int, k: int, bm: int, *, gated: bool) -> tuple[int, int, int, int, int]:
    """Returns the tile. Measured on an H200; see benchmarks/notes.md."""
    return 32, 128, 5 if bm <= 32 else 4, 4, 1024
