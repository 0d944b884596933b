"""4-bit NormalFloat weights (NF4, arXiv:2305.14314) for frozen matrices with LoRA adapters.

O output features   I input features
Each block of 64 values shares a scale.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.errors import ConfigError

BLOCK = 64  # number of values that share a scale
LEVELS = (  # quantiles of a normal distribution, scaled to [-1, 1], including 0; appendix E of the paper
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [O, I] -> codes uint8 [O * I / 2], two per byte, and scales float32 [O * I / 64].

    O * I must be a multiple of 64.
    """
    blocks = weight.float().reshape(-1, BLOCK)
    scales = blocks.abs().amax(1)
    levels = torch.tensor(LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp(min=1e-12)[:, None], between).to(torch.uint8).flatten()
    return codes[::2] << 4 | codes[1::2], scales


def unpack(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Returns the weight [O, I] in `dtype`, dequantized from packed codes and scales."""
    levels = torch.tensor(LEVELS, device=codes.device)
    values = levels[torch.stack([codes >> 4, codes & 15], dim=1).flatten().int()]
    return (values.view(-1, BLOCK) * scales[:, None]).to(dtype).view(shape)


class _Product(torch.autograd.Function):
    """Computes x W^T. The backward pass dequantizes the weight again instead of keeping it in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape = shape
        return F.linear(x, unpack(codes, scales, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        (grad,) = grads
        return grad @ unpack(codes, scales, ctx.shape, grad.dtype), None, None, None


class NF4Linear(nn.Module):
    """A frozen linear layer without a bias, at 4.5 bits per weight. Implements `QuantizedLinear`.

    Raises ConfigError if the number of weights is not a multiple of 64.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if (n := in_features * out_features) % BLOCK:
            raise ConfigError(
                f"nf4: a matrix has {n} weights, which is not a multiple of the block size {BLOCK}; leave the model "
                'unquantized (in a recipe: quantize_base = "none")'
            )
        self.register_buffer("codes", torch.empty(n // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(n // BLOCK, dtype=torch.float32))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "NF4Linear":
        """Quantizes `linear`. Raises ConfigError if it has a bias or its weight count is not a multiple of 64."""
        if linear.bias is not None:
            raise ConfigError("nf4: the layer has a bias, which is not supported")
        quantized = cls(linear.in_features, linear.out_features)
        quantized.set_weight(linear.weight.detach())
        return quantized

    def set_weight(self, weight: Tensor) -> None:
        """Quantizes `weight` [O, I] and stores it as the layer's weight."""
        self.codes, self.scales = pack(weight)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight [O, I] in `dtype`, as used by `forward`."""
        return unpack(self.codes, self.scales, (self.out_features, self.in_features), dtype)

    @property
    def nbytes(self) -> int:
        """Memory used by the layer, in bytes."""
        return sum(tensor.nbytes for tensor in self.state.values())

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors to save. To restore them, call `load_state_dict` on a layer of the same size."""
        return {"codes": self.codes, "scales": self.scales}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]"""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        shape = (self.out_features, self.in_features)
        product: Tensor = _Product.apply(x, self.codes, self.scales, shape)  # type: ignore[no-untyped-call]
        return product
