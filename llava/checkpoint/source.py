"""Where one of our tensors comes from: files, memory, or rows of such. Values are made when they are asked for.

R rows, the first dimension
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from llava.checkpoint import keymap
from llava.checkpoint.files import Weights
from llava.errors import CheckpointError

_PIECE = 1 << 24  # values; what is made of a tensor of any size takes no more memory than some of these


class Source(ABC):
    """One tensor. What `read` gives may be wider than `dtype`, the type to store it in: a sum is rounded once."""

    names: tuple[str, ...]  # on disk

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def where(self) -> str:
        """For messages: file and tensors."""

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def cuts(self) -> list[int]:
        """Rows between which it is read without joining or copying, from 0 to R."""
        return [0, self.shape[0]]

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Some of the rows; nothing is done for the others."""

    def read(self) -> Tensor:
        """All rows."""
        if torch.Size(self.shape).numel() <= _PIECE:
            return self.rows(0, self.shape[0])
        whole, done = None, 0
        for piece in self.pieces():  # what is in the making is small beside what is made
            whole = piece.new_empty(self.shape) if whole is None else whole
            whole[done : done + len(piece)] = piece
            done += len(piece)
        assert whole is not None
        return whole

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """All rows or some, in pieces of a bounded size."""
        end = self.shape[0] if stop is None else stop
        a_piece = max(1, _PIECE // max(1, torch.Size(self.shape[1:]).numel()))
        for low, high in pairwise(self.cuts):
            for first in range(max(low, start), min(high, end), a_piece):
                yield self.rows(first, min(first + a_piece, high, end))


@dataclass(frozen=True, kw_only=True)
class Stored(Source):
    """Names on disk, stacked by rows, in one set of files."""

    weights: Weights
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [self.weights.entries[name].shape for name in self.names]
        if len(shapes) == 1:
            return shapes[0]
        if not all(shape and shape[1:] == shapes[0][1:] for shape in shapes):
            raise CheckpointError(f"{self.where}: have shapes {shapes}, which can not lie under each other")
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of the values as stored; float32 in the odd case that stacked parts differ."""
        kinds = {self.weights.entries[name].dtype for name in self.names}
        return kinds.pop() if len(kinds) == 1 else torch.float32

    @property
    def where(self) -> str:
        return f"{self.weights.entries[self.names[0]].file}: {', '.join(self.names)}"

    @property
    def cuts(self) -> list[int]:
        return list(accumulate((self.weights.entries[name].shape[0] for name in self.names), initial=0))

    def rows(self, start: int, stop: int) -> Tensor:
        parts = [
            self.weights[name][max(start - first, 0) : stop - first]
            for name, (first, last) in zip(self.names, pairwise(self.cuts), strict=True)
            if first < stop and start < last
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else self.weights[self.names[0]][:0]

    def read(self) -> Tensor:
        return keymap.read(self.weights, self.names)


@dataclass(frozen=True, kw_only=True)
class Given(Source):
    """A tensor in memory, on any device."""

    tensor: Tensor
    what: str  # for messages
    names: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return self.what

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor.detach()[start:stop].cpu()


class Over(Source):
    """Something done to another tensor, whose shape and type it keeps."""

    base: Source

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.base.names

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def where(self) -> str:
        return self.base.where

    @property
    def cuts(self) -> list[int]:
        return self.base.cuts


@dataclass(frozen=True)
class HalfSplit(Over):
    """Rows of q or k that lie in neighbouring pairs, as Meta's code and llama.cpp rotate them, in the order of the hub.

    Row i of a head is the first of pair i in the first half of the head, the second of its pair in the second.
    """

    base: Source
    head_dim: int

    def rows(self, start: int, stop: int) -> Tensor:
        first = start - start % self.head_dim  # whole heads are read
        last = stop + -stop % self.head_dim
        heads = self.base.rows(first, last)
        split = heads.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        return split[start - first : stop - first]


@dataclass(frozen=True)
class Typed(Over):
    """A tensor in another type."""

    base: Source
    kind: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.kind

    def rows(self, start: int, stop: int) -> Tensor:
        values = self.base.rows(start, stop)
        narrow = values.to(self.kind)
        if self.kind == torch.float16 != values.dtype and bool((narrow.isinf() & values.isfinite()).any()):
            raise CheckpointError(f"{self.where}: holds values beyond float16, which ends at 65504")
        return narrow


@dataclass(frozen=True)
class Rows(Over):
    """A table with `extra` rows from row `first` on, in place of its own or behind them."""

    base: Source
    extra: Source
    first: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (max(self.base.shape[0], self.first + self.extra.shape[0]), *self.base.shape[1:])

    @property
    def cuts(self) -> list[int]:
        return sorted({0, self.first, self.first + self.extra.shape[0], self.shape[0]})

    def rows(self, start: int, stop: int) -> Tensor:
        held = self.base.shape[0]
        own = self.base.rows(min(start, held), min(stop, held))
        values = torch.cat([own, own.new_empty(stop - start - len(own), *own.shape[1:])])
        low, high = max(start, self.first), min(stop, self.first + self.extra.shape[0])
        if low < high:
            values[low - start : high - start] = self.extra.rows(low - self.first, high - self.first).to(self.dtype)
        return values


@dataclass(frozen=True)
class Mean(Over):
    """`n` rows, each the mean of a table's rows: as LLaVA starts the rows of new tokens."""

    base: Source
    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, *self.base.shape[1:])

    @property
    def cuts(self) -> list[int]:
        return [0, self.n]

    def rows(self, start: int, stop: int) -> Tensor:
        sums = sum(piece.sum(0, keepdim=True, dtype=torch.float64) for piece in self.base.pieces())
        assert isinstance(sums, Tensor)
        return (sums / self.base.shape[0]).to(self.dtype).expand(stop - start, *sums.shape[1:])


@dataclass(frozen=True)
class Cut(Over):
    """Some rows of a table."""

    base: Source
    first: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.first, *self.base.shape[1:])

    @property
    def cuts(self) -> list[int]:
        return [0, self.stop - self.first]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.base.rows(self.first + start, self.first + stop)
