"""The interface of a quantized linear layer. Each method is one module of this package.

O output features   I input features
"""

from typing import Protocol

import torch
from torch import Tensor, nn


class QuantizedLinear(Protocol):
    """What the rest of the project requires of a quantized layer, which is also an `nn.Module`."""

    in_features: int
    out_features: int

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "QuantizedLinear":
        """The quantized layer of a linear layer, on the same device. Raises ConfigError if its shape does not fit."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]"""
        ...

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that `forward` multiplies by, [O, I]."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the layer occupies in memory."""
        ...

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors to save; `load_state_dict` of a layer with the same sizes restores them."""
        ...
