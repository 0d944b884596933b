"""LayerNorm of many rows, with the residual sum before it, in one pass over memory. arXiv:1607.06450.

The sum and its norm take two reads and two writes of a row. As two operations, they take three reads and two writes.

S rows   D dim
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llava.kernels.support import can_run, gdc_launch_dependents, gdc_wait, jit, launch_options, next_power_of_2, tl


@jit
def layer_norm_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Normalizes one row per program."""
    row = tl.program_id(0).to(tl.int64) * D
    i = tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
    weight = tl.load(weight_ptr + i, mask=i < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + i, mask=i < D, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row + i, mask=i < D, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(y_ptr + row + i, mask=i < D, other=0.0).to(tl.float32)
        rounded = (x + y).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row + i, rounded, mask=i < D)
        x = rounded.to(tl.float32)  # the norm reads the sum as it is stored, like that of PyTorch
    centred = tl.where(i < D, x - tl.sum(x, 0) / D, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    out = centred * scale * weight + bias
    tl.store(out_ptr + row + i, out.to(out_ptr.dtype.element_ty), mask=i < D)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., D] -> [..., D], normalised over D; computed in float32, and rounded once."""
    if not can_run(x.device):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    x = x.contiguous()
    out = x.new_empty(x.shape)
    _launch(x, None, weight, bias, eps, None, out)
    return out


def add_layer_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, y [..., D] -> (x + y, rounded; the normalised sum), both [..., D]."""
    if not can_run(x.device):
        return eager_add_layer_norm(x, y, weight, bias, eps)
    x, y = x.contiguous(), y.contiguous()
    total, out = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(x, y, weight, bias, eps, total, out)
    return total, out


def eager_add_layer_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The twin of `add_layer_norm`."""
    total = x + y
    return total, F.layer_norm(total, x.shape[-1:], weight, bias, eps)


def _launch(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float, total: Tensor | None, out: Tensor
) -> None:
    dim = x.shape[-1]
    block = next_power_of_2(dim)
    if n_rows := x.numel() // dim:
        options = launch_options(x.device, num_warps=min(max(block // 256, 1), 16))  # 8 values per thread: 16 bytes
        layer_norm_kernel[(n_rows,)](x, y, weight, bias, total, out, eps, dim, block, y is not None, **options)
