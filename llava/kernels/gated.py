"""The product of an activated gate and a second tensor, in one pass: silu(gate) * up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llava.kernels.support import can_run, gdc_launch_dependents, gdc_wait, jit, launch_options, tl

_BLOCK = 2048


@jit
def silu_mul_kernel(gate_ptr, up_ptr, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Replaces `up` by silu(gate) * up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(up_ptr + at, y.to(up_ptr.dtype.element_ty), mask=at < n)


def silu_mul_(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up, which overwrites `up`. Both are contiguous and of the same shape."""
    if not can_run(up.device):
        return eager_silu_mul_(gate, up)
    n = up.numel()
    silu_mul_kernel[(-(-n // _BLOCK),)](gate, up, n, _BLOCK, **launch_options(up.device, num_warps=8))
    return up


def eager_silu_mul_(gate: Tensor, up: Tensor) -> Tensor:
    """The twin of `silu_mul_`."""
    return up.copy_(F.silu(gate.float()) * up.float())
