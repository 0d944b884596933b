"""Matrix products that stay fast on processors without 16-bit matrix instructions.

There, a bfloat16 product of many rows runs at a fifth of the float32 speed (measured: 20 against 104 GFLOP/s on two
AVX2 cores). Widening the weight a block at a time and multiplying in float32 is exact in the inputs, accumulates as the
16-bit kernels do and rounds once at the end. A block is small enough to stay in the last-level cache.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK_VALUES = 2**22  # float32 values widened at a time: 16 MiB
_FEW_ROWS = 12  # below this the 16-bit kernel, bound by reading the weight, is the faster one


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O], as `torch.nn.functional.linear`."""
    if _is_slow(x) and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _widened(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_slow(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.numel() < _FEW_ROWS * x.shape[-1]:
        return False
    return x.dtype in (torch.bfloat16, torch.float16) and not _has_instructions(x.dtype)


@cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies 16-bit matrices itself, as oneDNN sees it (builds without it: no)."""
    if not torch.backends.mkldnn.is_available():
        return False
    mkldnn = torch.ops.mkldnn
    return bool(mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported())


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.float().flatten(0, -2)
    y = x.new_empty(wide.shape[0], len(weight))
    rows = max(1, _BLOCK_VALUES // weight.shape[1])
    block = torch.empty(rows, weight.shape[1])
    for i in range(0, len(weight), rows):
        part = weight[i : i + rows]
        held = block[: len(part)].copy_(part)
        product = wide @ held.T
        y[:, i : i + rows] = product if bias is None else product.add_(bias[i : i + rows])
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """`nn.Linear` with the product above."""

    def reset_parameters(self) -> None:
        """Nothing: weights come from a checkpoint, and random ones for the meta device cost a second of imports."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]"""
        return linear(x, self.weight, self.bias)
