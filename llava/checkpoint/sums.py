"""Tensors that are sums: a LoRA on its base, a delta and its base. Made row by row, when they are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llava.checkpoint.source import Over, Source


class Adapter(NamedTuple):
    """A LoRA of the rows from `first` on: scale * B @ A."""

    first: int
    a: Source  # [r, in]
    b: Source  # [rows, r]
    scale: float


@dataclass(frozen=True)
class Adapted(Over):
    """W + scale * B @ A in float32. arXiv:2106.09685."""

    base: Source
    adapters: Sequence[Adapter]

    @property
    def where(self) -> str:
        return f"{self.base.where} + {self.adapters[0].a.where}"

    def rows(self, start: int, stop: int) -> Tensor:
        values = self.base.rows(start, stop).to(torch.float32, copy=True)
        for first, a, b, scale in self.adapters:
            low, high = max(start, first), min(stop, first + b.shape[0])
            if low < high:
                part = values[low - start : high - start]
                part.addmm_(b.rows(low - first, high - first).float(), a.read().float(), alpha=scale)
        return values


@dataclass(frozen=True)
class AdaptedIn(Adapted):
    """W + scale * B @ A as the original's merge has it: all in one type, the product in float32 and rounded to it.

    peft 0.7.1, `merge_and_unload` of a float16 model on a CPU.
    """

    kind: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.kind

    def rows(self, start: int, stop: int) -> Tensor:
        values = self.base.rows(start, stop).to(self.kind, copy=True)
        for first, a, b, scale in self.adapters:
            low, high = max(start, first), min(stop, first + b.shape[0])
            if low < high:
                factors = b.rows(low - first, high - first), a.read()
                left, right = (factor.to(self.kind).float() for factor in factors)
                values[low - start : high - start] += (left @ right * scale).to(self.kind)
        return values


@dataclass(frozen=True)
class Summed(Over):
    """base + sign * other of values in one type, rounded to it; rows that `other` has not are the base's own."""

    base: Source
    other: Source
    kind: torch.dtype
    sign: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return self.kind

    @property
    def where(self) -> str:
        return f"{self.base.where} and {self.other.where}"

    def rows(self, start: int, stop: int) -> Tensor:
        values = self.base.rows(start, stop).to(self.kind)
        last = max(start, min(stop, self.other.shape[0]))
        both = values[: last - start].add(self.other.rows(start, last).to(self.kind), alpha=self.sign)
        return both if last == stop else torch.cat([both, values[last - start :]])
