"""RMSNorm of many rows in one pass. arXiv:1910.07467."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llava.kernels.support import can_run, gdc_launch_dependents, gdc_wait, jit, launch_options, next_power_of_2, tl


@jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, K: tl.constexpr, KP: tl.constexpr, PDL: tl.constexpr):
    """Normalizes one row per program."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    if PDL:
        gdc_launch_dependents()
    weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / K + eps) * weight
    tl.store(out_ptr + row * K + k, y.to(out_ptr.dtype.element_ty), mask=k < K)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [S, K] -> [S, K]; computed in float32, and rounded once."""
    if not can_run(x.device):
        return eager_rms_norm(x, weight, eps)
    k = x.shape[-1]
    x = x.contiguous()
    out = x.new_empty(x.shape)
    rms_norm_kernel[(len(x),)](
        x, weight, out, eps, k, next_power_of_2(k), **launch_options(x.device, num_warps=8 if k > 2048 else 4)
    )
    return out


def eager_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The twin of `rms_norm`."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)
