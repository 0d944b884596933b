"""Linear layer of many rows with CLIP's activation: the product is activated before it is written.

By itself, the activation reads and writes each value once more, which takes a third of the time of cuBLAS's product for
64 pictures on an H200. Here, each multiprocessor computes one tile after the other, which the tensor memory accelerator
loads and stores, so that the next one is on its way while the last one is activated.

S rows   I input features   O output features
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.kernels.quick_gelu import eager_quick_gelu, quick_gelu
from llava.kernels.support import TensorDescriptor, can_run, is_interpreted, jit, tl, triton

_FEW_ROWS = 4096  # with fewer, there are not enough tiles to keep all multiprocessors busy
_GROUP = 8  # tiles below each other that use the same part of the weight at about the same time


@jit
def linear_quick_gelu_kernel(
    x_tiles, weight_tiles, bias_ptr, y_tiles, n_rows, n_out, n_programs, N_IN: tl.constexpr, N_EACH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Computes N_EACH tiles [BM, BN] of y [S, O]: every n_programs-th one, in groups of GROUP below each other."""
    n_down, n_across = tl.cdiv(n_rows, BM), tl.cdiv(n_out, BN)
    for i in tl.range(0, N_EACH, flatten=True):
        tile = tl.minimum(tl.program_id(0) + i * n_programs, n_down * n_across - 1)  # some compute the last one again
        first = tile // (GROUP * n_across) * GROUP
        height = tl.minimum(n_down - first, GROUP)
        row = (first + tile % (GROUP * n_across) % height) * BM
        column = tile % (GROUP * n_across) // height * BN
        total = tl.zeros([BM, BN], tl.float32)
        for k in range(0, N_IN, BK):
            x, weight = x_tiles.load([row, k]), weight_tiles.load([column, k])
            if WIDEN:  # the interpreter cannot multiply bfloat16
                x, weight = x.to(tl.float32), weight.to(tl.float32)
            total = tl.dot(x, weight.T, total)
        n = column + tl.arange(0, BN)
        total += tl.load(bias_ptr + n, mask=n < n_out, other=0.0)[None, :].to(tl.float32)
        total = total / (1 + tl.exp(-1.702 * total))
        left, right = tl.split(tl.permute(tl.reshape(total, [BM, 2, BN // 2]), [0, 2, 1]))  # less shared memory
        y_tiles.store([row, column], left.to(y_tiles.dtype))
        y_tiles.store([row, column + BN // 2], right.to(y_tiles.dtype))


def linear_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., I], weight [O, I], bias [O], all in 16 bits -> quick_gelu(x weight^T + bias) [..., O].

    Accumulated in float32. For few rows, and without a tensor memory accelerator, the sum is rounded once more.
    """
    if not can_run(x.device):
        return eager_linear_quick_gelu(x, weight, bias)
    if x.numel() < _FEW_ROWS * x.shape[-1] or why_not_tiled(x.device, *weight.shape):
        return quick_gelu(F.linear(x, weight, bias))
    return tiled_linear_quick_gelu(x, weight, bias)


def tiled_linear_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same by the kernel, for any number of rows."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (n_rows, n_in), n_out = rows.shape, len(weight)
    y = x.new_empty(n_rows, n_out)
    rows_of_tile, columns, depth = (16, 32, 16) if is_interpreted() else (128, 256, 64)
    if n_rows:
        n_tiles = triton.cdiv(n_rows, rows_of_tile) * triton.cdiv(n_out, columns)
        n_programs = min(n_tiles, _n_multiprocessors(x.device))
        linear_quick_gelu_kernel[(n_programs,)](
            TensorDescriptor.from_tensor(rows, [rows_of_tile, depth]),
            TensorDescriptor.from_tensor(weight.contiguous(), [columns, depth]),
            bias,
            TensorDescriptor.from_tensor(y, [rows_of_tile, columns // 2]),
            n_rows, n_out, n_programs, n_in, triton.cdiv(n_tiles, n_programs), rows_of_tile, columns, depth, _GROUP,
            is_interpreted(), num_warps=8, num_stages=3,
        )  # fmt: skip
    return y.view(*x.shape[:-1], n_out)


def eager_linear_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The twin of `linear_quick_gelu`."""
    return eager_quick_gelu(F.linear(x, weight, bias))


def why_not_tiled(device: torch.device, n_out: int, n_in: int) -> str | None:
    """Returns why the kernel cannot compute a layer with a weight [n_out, n_in], or None if it can."""
    if TensorDescriptor is None:
        return "Triton is too old for tensor descriptors"
    if not is_interpreted() and torch.cuda.get_device_capability(device) < (9, 0):
        return "the GPU has no tensor memory accelerator"
    if n_in % 8 or n_out % 8:
        return "rows of the layer do not begin at multiples of 16 bytes"
    return None


@cache
def _n_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
