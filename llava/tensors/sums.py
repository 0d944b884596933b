"""Lazy tensors that add a LoRA update or a delta to base weights. Only the rows that are read are computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llava.tensors.lazy import Derived, LazyTensor


class LoraPair(NamedTuple):
    """A LoRA update, scale * B @ A, which is added to the rows from `first` on."""

    first: int
    a: LazyTensor  # [r, in]
    b: LazyTensor  # [rows, r]
    scale: float


@dataclass(frozen=True)
class WithLora(Derived):
    """W + scale * B @ A in float32. arXiv:2106.09685."""

    base: LazyTensor
    pairs: Sequence[LoraPair]

    @property
    def where(self) -> str:
        return f"{self.base.where} + {self.pairs[0].a.where}"

    def rows(self, start: int, stop: int) -> Tensor:
        values = self.base.rows(start, stop).to(torch.float32, copy=True)
        for first, a, b, scale in self.pairs:
            low, high = max(start, first), min(stop, first + b.shape[0])
            if low < high:
                part = values[low - start : high - start]
                part.addmm_(b.rows(low - first, high - first).float(), a.read().float(), alpha=scale)
        return values


@dataclass(frozen=True)
class WithLoraRounded(WithLora):
    """W + scale * B @ A, with the same rounding as in LLaVA's own merge script.

    W, A, B, the product (computed in float32) and the sum are each rounded to the dtype `to`. The result matches
    `merge_and_unload` of peft 0.7.1 for a float16 model on a CPU.
    """

    to: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.to

    def rows(self, start: int, stop: int) -> Tensor:
        values = self.base.rows(start, stop).to(self.to, copy=True)
        for first, a, b, scale in self.pairs:
            low, high = max(start, first), min(stop, first + b.shape[0])
            if low < high:
                factors = b.rows(low - first, high - first), a.read()
                left, right = (factor.to(self.to).float() for factor in factors)
                values[low - start : high - start] += (left @ right * scale).to(self.to)
        return values


@dataclass(frozen=True)
class AddDelta(Derived):
    """base + sign * other, computed in dtype `to`. Rows of `base` beyond the end of `other` are only cast."""

    base: LazyTensor
    other: LazyTensor
    to: torch.dtype
    sign: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return self.to

    @property
    def where(self) -> str:
        return f"{self.base.where} and {self.other.where}"

    def rows(self, start: int, stop: int) -> Tensor:
        values = self.base.rows(start, stop).to(self.to)
        last = max(start, min(stop, self.other.shape[0]))
        both = values[: last - start].add(self.other.rows(start, last).to(self.to), alpha=self.sign)
        return both if last == stop else torch.cat([both, values[last - start :]])
