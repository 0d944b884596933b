"""Low-rank adapters beside a frozen matrix, arXiv:2106.09685: trained there, or kept apart from what they adapt.

r rank   I values in   O values out of a part
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.model.linear import linear


class Adapter(nn.Module):
    """scale * B A of one part."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]"""
        return self.scale * linear(linear(x, self.a), self.b)


class LoraLinear(nn.Module):
    """A frozen matrix and adapters for its parts, which are stacked by rows."""

    def __init__(self, base: nn.Module, parts: Mapping[str, int | Adapter], drop: float = 0.0):
        """parts, in the order in which they are stacked: an adapter, or how many rows have none."""
        super().__init__()
        self.base, self.drop = base, drop
        self.bare = {name: part for name, part in parts.items() if isinstance(part, int)}
        self.names = tuple(parts)
        self.adapters = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, Adapter)})

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]"""
        added = [self._added(name, x) for name in self.names]
        return self.base(x) + (torch.cat(added, dim=-1) if len(added) > 1 else added[0])

    def _added(self, name: str, x: Tensor) -> Tensor:
        if name in self.bare:
            return x.new_zeros(*x.shape[:-1], self.bare[name])
        added: Tensor = self.adapters[name](F.dropout(x, self.drop, self.training))
        return added
