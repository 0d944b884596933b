"""The interface of quantized linear layers. Each module in this package implements one quantization method.

O output features   I input features
"""

from typing import Protocol

import torch
from torch import Tensor, nn


class QuantizedLinear(Protocol):
    """The interface of a quantized layer, which must also be an `nn.Module`."""

    in_features: int
    out_features: int

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "QuantizedLinear":
        """Quantizes `linear` on its device. Raises ConfigError if the layer is not supported."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]"""
        ...

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight [O, I] in `dtype`, as used by `forward`."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory used by the layer, in bytes."""
        ...

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors to save. To restore them, call `load_state_dict` on a layer of the same size."""
        ...
