"""LayerNorm of many rows in one pass over memory. arXiv:1607.06450.

S rows   D dim
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llava.kernels.support import can_run, gdc_launch_dependents, gdc_wait, jit, launch_options, next_power_of_2, tl


@jit
def layer_norm_kernel(
    x_ptr, shift_ptr, weight_ptr, bias_ptr, out_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
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
    if shift_ptr is not None:
        x += tl.load(shift_ptr + i, mask=i < D, other=0.0).to(tl.float32)
    centred = tl.where(i < D, x - tl.sum(x, 0) / D, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    out = centred * scale * weight + bias
    tl.store(out_ptr + row + i, out.to(out_ptr.dtype.element_ty), mask=i < D)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    """x [..., D] -> [..., D]: x + shift, normalised over D; computed in float32, and rounded once. shift: [D]."""
    if not can_run(x.device):
        return eager_layer_norm(x, weight, bias, eps, shift)
    x = x.contiguous()
    out, dim = x.new_empty(x.shape), x.shape[-1]
    block = next_power_of_2(dim)
    if n_rows := x.numel() // dim:
        options = launch_options(x.device, num_warps=min(max(block // 256, 1), 16))  # 8 values per thread: 16 bytes
        layer_norm_kernel[(n_rows,)](x, shift, weight, bias, out, eps, dim, block, **options)
    return out


def eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    """The twin of `layer_norm`."""
    shifted = x if shift is None else x + shift
    return F.layer_norm(shifted.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)
