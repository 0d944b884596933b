"""Linear layers with unmerged low-rank adapters (LoRA, arXiv:2106.09685), for training and for switching adapters.

r rank   I input features   O output features
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.model.linear import linear


class Adapter(nn.Module):
    """The low-rank update of one of the projections in a `LoraLinear`: x -> scale * B A x."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]"""
        return self.scale * linear(linear(x, self.a), self.b)


class LoraLinear(nn.Module):
    """A frozen linear layer that stacks several projections (such as q, k and v), each with an optional adapter."""

    def __init__(self, base: nn.Module, parts: Mapping[str, int | Adapter], dropout: float = 0.0):
        """parts: maps part names, in stacking order, to adapters, or to row counts for parts that have no adapter."""
        super().__init__()
        self.base, self.dropout = base, dropout
        self.plain_rows = {name: part for name, part in parts.items() if isinstance(part, int)}
        self.names = tuple(parts)
        self.adapters = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, Adapter)})

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]"""
        return self.base(x) + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """Returns what the adapters add to the output of the base layer: x [..., I] -> [..., O]."""
        updates = [self._update(name, x) for name in self.names]
        return torch.cat(updates, dim=-1) if len(updates) > 1 else updates[0]

    def _update(self, name: str, x: Tensor) -> Tensor:
        if name in self.plain_rows:
            return x.new_zeros(*x.shape[:-1], self.plain_rows[name])
        update: Tensor = self.adapters[name](F.dropout(x, self.dropout, self.training))
        return update


class Routing:
    """Which of the tokens in a packed row [1, S, ...] belong to which adapter. The engine sets it before each step."""

    def __init__(self) -> None:
        self.slices: list[tuple[str | None, slice]] = []  # adapter and a range of its tokens; None: the base


class RoutedLora(nn.Module):
    """A linear layer that adds to each token the update of the adapter that the token belongs to."""

    def __init__(self, base: nn.Module, loras: Mapping[str | None, LoraLinear], routing: Routing):
        super().__init__()
        self.base, self.loras, self.routing = base, dict(loras), routing

    def forward(self, x: Tensor) -> Tensor:
        """x [1, S, I] -> [1, S, O], or [L, I] -> [L, O] for some of the tokens if all belong to the same adapter."""
        y: Tensor = self.base(x)
        slices = self.routing.slices
        if len(slices) == 1:
            (name, _), *_ = slices
            return y + self.loras[name].update(x) if name in self.loras else y
        for name, tokens in slices:
            if name in self.loras:
                y[:, tokens] += self.loras[name].update(x[:, tokens])
        return y
