"""Matrix products that stay fast on CPUs without 16-bit matrix instructions.

On such CPUs, a bfloat16 product with many rows runs at a fifth of the float32 speed (20 vs. 104 GFLOP/s, measured on
two AVX2 cores). `linear` instead converts the weight to float32 in blocks that fit into the last-level cache, and
multiplies in float32. The conversion is exact; as in the 16-bit kernels, the product is accumulated in float32 and
rounded once at the end.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK_VALUES = 2**22  # float32 values converted at a time: 16 MiB
_PACKED_ROWS = 64  # with more rows, the layout of the weight makes little difference
_FEW_ROWS = 12  # with fewer rows of x, reading the weight dominates, so the 16-bit kernel is faster


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O], like `torch.nn.functional.linear`."""
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and _is_slow(x):
        return _in_float32(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_slow(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.numel() < _FEW_ROWS * x.shape[-1]:
        return False
    return x.dtype in (torch.bfloat16, torch.float16) and not has_instructions(x.dtype)


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN multiplies 16-bit matrices natively on this CPU; False in builds without oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    mkldnn = torch.ops.mkldnn
    return bool(mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported())


def _in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x32 = x.float().flatten(0, -2)
    y = x.new_empty(x32.shape[0], len(weight))
    n_rows = max(1, _BLOCK_VALUES // weight.shape[1])
    buffer = torch.empty(n_rows, weight.shape[1])
    for i in range(0, len(weight), n_rows):
        rows = weight[i : i + n_rows]
        product = x32 @ buffer[: len(rows)].copy_(rows).T
        y[:, i : i + n_rows] = product if bias is None else product.add_(bias[i : i + n_rows])
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """`nn.Linear` whose forward pass calls the `linear` function above."""

    def reset_parameters(self) -> None:
        """Does nothing: weights come from a checkpoint, and initialization takes a second even on the meta device."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]"""
        return linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer for float32 inference on a CPU, with a second copy of the weight in oneDNN's blocked layout.

    With few rows, `torch.nn.functional.linear` spends much of its time on bringing the weight into such a layout.
    Measured on one AVX-512 core with layers of width 256: 1.7 times as fast with 8 rows, 1.3 with 34.

    oneDNN keeps compiled code for every number of rows, about 0.3 MB each, so the numbers are rounded up to few.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]"""
        n = x.numel() // x.shape[-1]
        if n > _PACKED_ROWS or n == 0:
            return F.linear(x, self.weight, self.bias)
        padded = n if n <= 2 else 4 if n <= 4 else -(-n // 8) * 8
        rows = x.reshape(n, x.shape[-1])
        if padded > n:
            rows = F.pad(rows, (0, 0, 0, padded - n))
        try:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        except RuntimeError:  # oneDNN finds no memory for compiled code
            return F.linear(x, self.weight, self.bias)
        return y[:n].view(*x.shape[:-1], -1)


@cache
def can_pack() -> bool:
    """Returns whether this build of PyTorch has the operators that `PackedLinear` uses, which are not public."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        layer = nn.Linear(16, 16).requires_grad_(False)
        x = torch.ones(2, 16)
        return torch.allclose(PackedLinear(layer)(x), layer(x), atol=1e-5)
    except (AttributeError, RuntimeError, TypeError):
        return False
