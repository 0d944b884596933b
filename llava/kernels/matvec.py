"""Linear layer of a single row, with the norm before it and the activation or residual sum after it in one kernel.

At batch 1, decoding reads every weight once, so the time is that of reading. Each program multiplies a few rows of the
weight with the whole vector, which it keeps in registers. With dependent launch, it starts to read its weights before
the previous kernel has finished, and waits for it only to read the vector.
"""

from __future__ import annotations

from torch import Tensor

from llava.kernels.support import gdc_launch_dependents, gdc_wait, jit, launch_options, next_power_of_2, tl


@jit
def rows_of(weight, tile, K: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, n):
    """Loads columns FIRST to FIRST + WIDTH of the BN rows of a tile."""
    row = tile * BN + tl.arange(0, BN)
    column = FIRST + tl.arange(0, WIDTH)
    mask = (row < n)[:, None] & (column < K)[None, :]
    at = weight + row[:, None].to(tl.int64) * K + column[None, :]
    if FIRST + WIDTH <= K:
        return tl.load(at, mask=(row < n)[:, None], other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@jit
def activated(y, ACTIVATION: tl.constexpr):
    """Applies SiLU or the exact GELU."""
    if ACTIVATION == "silu":
        return y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    else:
        return y


@jit
def matvec_kernel(
    x_ptr, norm_ptr, weight_ptr, gate_ptr, residual_ptr, out_ptr, n, eps, clip,
    K: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, CLIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [n] = activation(gate norm(x)) * weight norm(x) + residual, where K = KA + KB columns, both powers of two."""
    tile = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    wa = rows_of(weight_ptr, tile, K, 0, KA, BN, n)
    if KB > 0:
        wb = rows_of(weight_ptr, tile, K, KA, KB, BN, n)
    if GATED:
        ga = rows_of(gate_ptr, tile, K, 0, KA, BN, n)
        if KB > 0:
            gb = rows_of(gate_ptr, tile, K, KA, KB, BN, n)
    a = tl.arange(0, KA)
    b = KA + tl.arange(0, KB if KB > 0 else 1)
    if NORM != "none":
        norm_a = tl.load(norm_ptr + a, mask=a < K, other=0.0).to(tl.float32)
        if KB > 0:
            norm_b = tl.load(norm_ptr + b, mask=b < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    xa = tl.load(x_ptr + a, mask=a < K, other=0.0).to(tl.float32)
    xb = xa
    if KB > 0:
        xb = tl.load(x_ptr + b, mask=b < K, other=0.0).to(tl.float32)
    if NORM == "layer":
        total = tl.sum(xa, 0)
        if KB > 0:
            total += tl.sum(xb, 0)
        xa = tl.where(a < K, xa - total / K, 0.0)
        if KB > 0:
            xb = tl.where(b < K, xb - total / K, 0.0)
    scale = 1.0
    if NORM != "none":
        squares = tl.sum(xa * xa, 0)
        if KB > 0:
            squares += tl.sum(xb * xb, 0)
            xb *= norm_b
        xa *= norm_a
        scale = tl.rsqrt(squares / K + eps)
    y = tl.sum(wa.to(tl.float32) * xa[None, :], 1)
    if KB > 0:
        y += tl.sum(wb.to(tl.float32) * xb[None, :], 1)
    y *= scale
    if GATED:
        g = tl.sum(ga.to(tl.float32) * xa[None, :], 1)
        if KB > 0:
            g += tl.sum(gb.to(tl.float32) * xb[None, :], 1)
        y *= activated(g * scale, ACTIVATION)
    else:
        y = activated(y, ACTIVATION)
    row = tile * BN + tl.arange(0, BN)
    if CLIP:
        y = tl.minimum(tl.maximum(y, -clip), clip)
    if RESIDUAL:
        y += tl.load(residual_ptr + row, mask=row < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=row < n)


def matvec(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm: tuple[str, Tensor, float] | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """Computes x [1, K] -> out [1, N]; see `fused_linear`, which calls this for one row. Needs Triton."""
    n, k = weight.shape
    ka, kb = halves(k)
    rows, warps = _tile(n, k, gated=gate is not None)
    kind, scale, eps = norm or ("none", x, 0.0)
    grid = (-(-n // rows),)
    matvec_kernel[grid](
        x, scale, weight, weight if gate is None else gate, x if residual is None else residual, out, n, eps,
        0.0 if clip is None else clip, k, ka, kb, rows, kind, activation, gate is not None, residual is not None,
        clip is not None, **launch_options(x.device, num_warps=warps, num_stages=1),
    )  # fmt: skip
    return out


def halves(k: int) -> tuple[int, int]:
    """Returns two powers of two that cover k columns with little waste; the second one may be 0."""
    whole = next_power_of_2(k)
    if whole == k:
        return k, 0
    rest = next_power_of_2(k - whole // 2)
    return (whole, 0) if rest == whole // 2 and k < 2048 else (whole // 2, rest)


def _tile(n: int, k: int, *, gated: bool) -> tuple[int, int]:
    """Returns the rows of a tile and the number of warps. Measured on an H200; see benchmarks/notes.md."""
    if gated or k > 8192:
        return 2, 8 if k > 8192 else 4
    return 4, 4
