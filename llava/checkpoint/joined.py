"""Tensors made of several: under each other, or beside each other as model-parallel shards hold one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from llava.checkpoint.source import Source

PIECE_BYTES = 64 * 2**20  # of what has to be copied to be put together


@dataclass(frozen=True)
class Stacked(Source):
    """Several tensors under each other."""

    parts: Sequence[Source]

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for part in self.parts for name in part.names)

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def where(self) -> str:
        return "; ".join(part.where for part in self.parts)

    @property
    def cuts(self) -> list[int]:
        return list(accumulate((part.shape[0] for part in self.parts), initial=0))

    def rows(self, start: int, stop: int) -> Tensor:
        read = [
            part.rows(max(start - first, 0), min(stop, last) - first)
            for part, (first, last) in zip(self.parts, pairwise(self.cuts), strict=True)
            if first < stop and start < last
        ]
        return read[0] if len(read) == 1 else torch.cat(read)


@dataclass(frozen=True)
class Columns(Stacked):
    """Several tensors beside each other, as model-parallel shards hold one; read some rows at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.parts[0].shape[0], sum(part.shape[1] for part in self.parts))

    @property
    def cuts(self) -> list[int]:
        height = max(PIECE_BYTES // (self.shape[1] * self.dtype.itemsize), 1)
        return [*range(0, self.shape[0], height), self.shape[0]]

    def rows(self, start: int, stop: int) -> Tensor:
        read = [part.rows(start, stop) for part in self.parts]
        return read[0] if len(read) == 1 else torch.cat(read, dim=1)
