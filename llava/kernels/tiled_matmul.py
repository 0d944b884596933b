"""Matrix product in which the bits of a row depend neither on the other rows nor on its index.

cuBLAS chooses a kernel, and with it the order of additions, by the number of rows. This kernel has one tile shape for
all numbers of rows, and a program adds up the whole of I for its tile, in the same order each time. Rows that the last
tile lacks are zeros.

S rows   I input features   O output features
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.kernels.support import can_run, is_interpreted, jit, tl, triton

_ROWS = 32  # rows of a tile in the eager twin


@partial(jit, do_not_specialize=["n_rows"])  # one compiled kernel for all numbers of rows
def tiled_matmul_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, n_rows, n_out, weight_row, weight_column,
    N_IN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Computes the tile [BM, BN] of y [S, O] at the row program_id(1) * BM and the column program_id(0) * BN."""
    m = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, N_IN, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + m * N_IN + k[None, :], mask=(m < n_rows) & (k < N_IN)[None, :], other=0.0)
        at = n * weight_row + k[:, None].to(tl.int64) * weight_column
        weight = tl.load(weight_ptr + at, mask=(n < n_out) & (k < N_IN)[:, None], other=0.0)
        if WIDEN:  # the interpreter cannot multiply bfloat16
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x, weight, total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < n_out, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * n_out + n, total.to(y_ptr.dtype.element_ty), mask=(m < n_rows) & (n < n_out))


def tiled_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I] of any strides, bias [O] -> [..., O], like `torch.nn.functional.linear`.

    16-bit types are accumulated in float32 and rounded once; float32 is multiplied without TF32.
    """
    if not can_run(x.device) or x.dtype == torch.float64:
        return eager_tiled_matmul(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.data_ptr() % 16:  # Triton compiles another kernel for such addresses
        rows = rows.clone()
    (n_rows, n_in), n_out = rows.shape, len(weight)
    y = x.new_empty(n_rows, n_out)
    wide = x.element_size() == 4
    tile = {"BM": 64, "BN": 64, "BK": 32 if wide else 64, "num_warps": 4, "num_stages": 3 if wide else 4}
    if n_rows:
        grid = (triton.cdiv(n_out, tile["BN"]), triton.cdiv(n_rows, tile["BM"]))
        tiled_matmul_kernel[grid](
            rows, weight, bias, y, n_rows, n_out, *weight.stride(), n_in, WIDEN=is_interpreted(), **tile
        )
    return y.view(*x.shape[:-1], n_out)


def eager_tiled_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes the same with products of `_ROWS` rows, so that the library always sees the same shape."""
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    padded = F.pad(rows, (0, 0, 0, -n % _ROWS))
    y = torch.cat([F.linear(tile, weight, bias) for tile in padded.split(_ROWS)])[:n]
    return y.view(*x.shape[:-1], len(weight))
