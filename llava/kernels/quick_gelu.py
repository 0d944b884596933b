"""The activation of CLIP in one pass over memory: one read and one write for each value.

In PyTorch, `x * sigmoid(1.702 x)` is three operations, which read and write seven values for each one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.kernels.support import can_run, gdc_launch_dependents, gdc_wait, jit, launch_options, tl

_BLOCK = 4096  # values of a program: 16 for each of 256 threads


@jit
def quick_gelu_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Computes BLOCK values per program."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    y = x / (1 + tl.exp(-1.702 * x))
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=i < n)


def quick_gelu(x: Tensor) -> Tensor:
    """x [...] -> x * sigmoid(1.702 x), the same shape; computed in float32, and rounded once."""
    if not can_run(x.device):
        return eager_quick_gelu(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    if n := x.numel():
        options = launch_options(x.device, num_warps=8)
        quick_gelu_kernel[(-(-n // _BLOCK),)](x, out, n, _BLOCK, **options)
    return out


def eager_quick_gelu(x: Tensor) -> Tensor:
    """The twin of `quick_gelu`. In 16 bits, it rounds after each of three operations, as CLIP's own code does."""
    return x * torch.sigmoid(1.702 * x)
