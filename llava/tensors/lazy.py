"""Lazy tensors, which are read on demand from files, from memory or from other lazy tensors.

R rows, the first dimension
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from llava.errors import CheckpointError
from llava.tensors.files import Weights

_CHUNK_NUMEL = 1 << 24  # values per chunk; limits the memory that `read` needs in addition to the result
CHUNK_BYTES = 64 * 2**20  # chunk size for tensors whose rows must be assembled by copying


class LazyTensor(ABC):
    """A tensor read on demand.

    Sums (`AddDelta`, `WithLora`) may return values in a wider dtype than `dtype`, to avoid rounding twice.
    """

    names: tuple[str, ...]  # names on disk

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def where(self) -> str:
        """File and tensor names, for error messages."""

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def row_splits(self) -> list[int]:
        """Row indices, including 0 and R, that no chunk may cross. Splitting there avoids or limits copying."""
        return [0, self.shape[0]]

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Reads only rows [start, stop)."""

    def read(self) -> Tensor:
        """Reads all rows."""
        if torch.Size(self.shape).numel() <= _CHUNK_NUMEL:
            return self.rows(0, self.shape[0])
        whole, done = None, 0
        for chunk in self.chunks():  # keeps temporaries small compared with the result
            whole = chunk.new_empty(self.shape) if whole is None else whole
            whole[done : done + len(chunk)] = chunk
            done += len(chunk)
        assert whole is not None
        return whole

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yields rows [start, stop) in chunks of bounded size."""
        end = self.shape[0] if stop is None else stop
        step = max(1, _CHUNK_NUMEL // max(1, torch.Size(self.shape[1:]).numel()))
        for low, high in pairwise(self.row_splits):
            for first in range(max(low, start), min(high, end), step):
                yield self.rows(first, min(first + step, high, end))


@dataclass(frozen=True)
class FromFile(LazyTensor):
    """A tensor in a file, memory-mapped."""

    weights: Weights
    name: str

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.name,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.headers[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.headers[self.name].dtype

    @property
    def where(self) -> str:
        return f"{self.weights.headers[self.name].file}: {self.name}"

    @property
    def row_splits(self) -> list[int]:
        return [0, *self.shape[:1]]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weights[self.name][start:stop]

    def read(self) -> Tensor:
        return self.weights[self.name]


@dataclass(frozen=True, kw_only=True)
class InMemory(LazyTensor):
    """A tensor in memory, on any device."""

    tensor: Tensor
    origin: str  # for error messages
    names: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return self.origin

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor.detach()[start:stop].cpu()


@dataclass(frozen=True)
class Concat(LazyTensor):
    """Tensors concatenated along the rows (dim 0) or, as in model-parallel shards, along the columns (dim 1)."""

    parts: Sequence[LazyTensor]
    dim: int = 0

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for part in self.parts for name in part.names)

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [part.shape for part in self.parts]
        others = {shape[: self.dim] + shape[self.dim + 1 :] for shape in shapes}
        if len(others) > 1 or any(len(shape) <= self.dim for shape in shapes):
            raise CheckpointError(f"{self.where}: cannot concatenate shapes {shapes} along dimension {self.dim}")
        total = sum(shape[self.dim] for shape in shapes)
        return (*shapes[0][: self.dim], total, *shapes[0][self.dim + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parts, or float32 in the rare case that their dtypes differ."""
        dtypes = {part.dtype for part in self.parts}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def where(self) -> str:
        first, *others = self.parts
        if all(isinstance(part, FromFile) for part in self.parts):
            return ", ".join([first.where, *(name for part in others for name in part.names)])
        return "; ".join(part.where for part in self.parts)

    @property
    def row_splits(self) -> list[int]:
        if self.dim == 0:
            return list(accumulate((part.shape[0] for part in self.parts), initial=0))
        step = max(CHUNK_BYTES // (self.shape[1] * self.dtype.itemsize), 1)
        return [*range(0, self.shape[0], step), self.shape[0]]

    def rows(self, start: int, stop: int) -> Tensor:
        if self.dim == 1:
            return torch.cat([part.rows(start, stop) for part in self.parts], dim=1)
        read = [
            part.rows(max(start - first, 0), min(stop, last) - first)
            for part, (first, last) in zip(self.parts, pairwise(self.row_splits), strict=True)
            if first < stop and start < last
        ]
        if not read:
            return self.parts[0].rows(0, 0)
        return (read[0] if len(read) == 1 else torch.cat(read)).to(self.dtype)


class Derived(LazyTensor):
    """A tensor computed from `base`. Subclasses override the shape and dtype if they differ from those of `base`."""

    base: LazyTensor

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
    def row_splits(self) -> list[int]:
        return self.base.row_splits


@dataclass(frozen=True)
class HalfSplit(Derived):
    """The rows of q or k, reordered from adjacent rotary pairs (Meta, llama.cpp, gpt-fast) to Hugging Face's order.

    In Hugging Face's order, row i of a head's first half is paired with row i of its second half.
    """

    base: LazyTensor
    head_dim: int

    def rows(self, start: int, stop: int) -> Tensor:
        first = start - start % self.head_dim  # read whole heads
        last = stop + -stop % self.head_dim
        heads = self.base.rows(first, last)
        split = heads.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        return split[start - first : stop - first]


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `HalfSplit` for whole heads: reorders rows [heads x head_dim, D] into adjacent rotary pairs."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class Cast(Derived):
    """A tensor cast to another dtype. Reading raises CheckpointError if a value overflows float16."""

    base: LazyTensor
    to: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.to

    def rows(self, start: int, stop: int) -> Tensor:
        values = self.base.rows(start, stop)
        cast = values.to(self.to)
        if self.to == torch.float16 != values.dtype and bool((cast.isinf() & values.isfinite()).any()):
            raise CheckpointError(f"{self.where}: has values outside the float16 range of -65504 to 65504")
        return cast


@dataclass(frozen=True)
class WithRows(Derived):
    """The table `base` with the rows of `extra` written at row `first`. They overwrite rows or extend the table.

    Raises CheckpointError if this leaves a gap after the last row of `base`.
    """

    base: LazyTensor
    extra: LazyTensor
    first: int

    def __post_init__(self) -> None:
        if self.first > self.base.shape[0]:
            raise CheckpointError(
                f"{self.base.where}: has {self.base.shape[0]} rows, so none can be written at row {self.first}; the "
                "tokenizer and this table belong to different models"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (max(self.base.shape[0], self.first + self.extra.shape[0]), *self.base.shape[1:])

    @property
    def row_splits(self) -> list[int]:
        return sorted({0, self.first, self.first + self.extra.shape[0], self.shape[0]})

    def rows(self, start: int, stop: int) -> Tensor:
        n_base = self.base.shape[0]
        own = self.base.rows(min(start, n_base), min(stop, n_base))
        values = torch.cat([own, own.new_empty(stop - start - len(own), *own.shape[1:])])
        low, high = max(start, self.first), min(stop, self.first + self.extra.shape[0])
        if low < high:
            values[low - start : high - start] = self.extra.rows(low - self.first, high - self.first).to(self.dtype)
        return values


@dataclass(frozen=True)
class MeanRows(Derived):
    """`n` copies of a table's mean row. LLaVA initialises the embeddings of new tokens in this way."""

    base: LazyTensor
    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, *self.base.shape[1:])

    @property
    def row_splits(self) -> list[int]:
        return [0, self.n]

    def rows(self, start: int, stop: int) -> Tensor:
        sums = sum(chunk.sum(0, keepdim=True, dtype=torch.float64) for chunk in self.base.chunks())
        assert isinstance(sums, Tensor)
        return (sums / self.base.shape[0]).to(self.dtype).expand(stop - start, *sums.shape[1:])


@dataclass(frozen=True)
class Slice(Derived):
    """Rows [start, stop) of a tensor."""

    base: LazyTensor
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.base.shape[1:])

    @property
    def row_splits(self) -> list[int]:
        return [0, self.stop - self.start]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.base.rows(self.start + start, self.start + stop)
