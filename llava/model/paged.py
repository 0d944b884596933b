"""A paged cache of keys and values, and the attention context that reads it.

One forward pass computes a packed row of tokens from many sequences: first one token of each sequence that is
decoding, then chunks of prompts. The new keys and values are written to the pages of their sequences before any query
reads them.

S new tokens   R decoding rows   P pages   T tokens attended to   H query heads   K key/value heads   E head_dim
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from llava.config import DecoderConfig
from llava.model.attention import attention, decode_mask, score_bias
from llava.model.staging import to_device


class PagedCache:
    """Keys and values of all layers, each [n_layers, n_pages, page_size, K, E]."""

    def __init__(
        self, config: DecoderConfig, n_pages: int, page_size: int, *, dtype: torch.dtype, device: torch.device
    ):
        self.n_pages, self.page_size = n_pages, page_size
        shape = (config.n_layers, n_pages, page_size, config.n_kv_heads, config.head_dim)
        self.k, self.v = (lazy_zeros(shape, dtype, device) for _ in range(2))

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies pages (from, to) in all layers."""
        source, target = to_device(pairs, torch.int64, self.k.device).T
        for cache in (self.k, self.v):
            cache[:, target] = cache[:, source]

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Fills pages with zeros in all layers. NaN that an earlier sequence has left would pass every mask."""
        index = to_device(pages, torch.int64, self.k.device)
        for cache in (self.k, self.v):
            cache.index_fill_(1, index, 0)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k and v [S, K, E] in slots [S]. Slot s is the token s % page_size of the page s // page_size."""
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v)

    def read(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """pages [R, P] -> keys and values, each [R, P * page_size, K, E]."""
        flat = pages.flatten()
        k, v = (x[layer].index_select(0, flat) for x in (self.k, self.v))
        return k.view(len(pages), -1, *k.shape[2:]), v.view(len(pages), -1, *v.shape[2:])

    def past(self, layer: int, one: "Chunk") -> tuple[Tensor, Tensor]:
        """Returns the keys and values [1, T, K, E] of a chunk's sequence, up to its last new token."""
        k, v = self.read(layer, one.pages[None])
        return k[:, : one.end], v[:, : one.end]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns zeros. On a CPU, the system provides memory when it is first written, so unused pages cost nothing.

    Zeros, because slots that are masked out must not contain NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)).view(dtype)


def cache_bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Returns the number of bytes that the keys and values of one token take up."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize


@dataclass(frozen=True, eq=False, kw_only=True)
class Chunk:
    """New tokens of one sequence, consecutive in the packed row."""

    start: int  # index of the first one in the packed row
    n: int
    position: int  # position of the first one in its sequence
    pages: Tensor  # int64 [P], the pages of the sequence
    bias: Tensor | None = None  # [1, 1 or H, n, position + n]; None: causal from position 0

    @property
    def end(self) -> int:
        """Position after its last new token, which is the number of tokens attended to."""
        return self.position + self.n

    @property
    def tokens(self) -> slice:
        """Their indices in the packed row."""
        return slice(self.start, self.start + self.n)


class Rows(Protocol):
    """Decoding rows of similar lengths, which attend together: one new token each."""

    @property
    def index(self) -> Tensor:
        """Their indices in the packed row, int64 [R]."""
        ...

    def with_scores(
        self, *, sliding_window: int | None = None, alibi_slopes: Tensor | None = None, dtype: torch.dtype
    ) -> "Rows":
        """See `AttentionContext`."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, H, E], k and v [R, K, E] of the new tokens -> y [R, H, E]"""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class PagedRows:
    """Decoding rows that read their pages."""

    cache: PagedCache
    index: Tensor  # int64 [R]
    pages: Tensor  # int64 [R, P], the pages of each row, padded with any pages
    positions: Tensor  # int64 [R, 1]
    bias: Tensor | None = None  # [R, 1 or H, 1, P * page_size], set by `with_scores`

    def with_scores(
        self, *, sliding_window: int | None = None, alibi_slopes: Tensor | None = None, dtype: torch.dtype
    ) -> "PagedRows":
        """See `AttentionContext`."""
        mask = decode_mask(self.positions, self.pages.shape[1] * self.cache.page_size)
        return replace(self, bias=score_bias(mask, sliding_window, alibi_slopes, dtype))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Rows`. The new keys and values have been written to the pages."""
        keys, values = (x.transpose(1, 2) for x in self.cache.read(layer, self.pages))
        return attention(q[:, None], keys, values, self.bias)[:, 0]


class Row(NamedTuple):
    """A sequence that computes its newest token."""

    id: int
    pages: Sequence[int]
    position: int  # of the newest token, which is the number of tokens before it
    n_reused: int = 0  # leading pages that came from the prefix cache, which other sequences may share


def paged_rows(cache: PagedCache, rows: Sequence[Row], index: Sequence[int]) -> PagedRows:
    """Returns the rows at some indices in the packed row."""
    tables = [rows[i].pages for i in index]
    n_pages = max(map(len, tables))
    device = cache.k.device
    return PagedRows(
        cache=cache,
        index=to_device(index, torch.int64, device),
        pages=to_device([[*one, *[one[0]] * (n_pages - len(one))] for one in tables], torch.int64, device),
        positions=to_device([[rows[i].position] for i in index], torch.int64, device),
    )


# receives a layer, a chunk and a function that computes the attention probabilities of its tokens, [H, n, T]
Observer = Callable[[int, Chunk, Callable[[], Tensor]], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class PagedContext:
    """Attention of a packed row of new tokens [1, S] over a `PagedCache`. See `AttentionContext`."""

    cache: PagedCache
    positions: Tensor  # int64 [1, S]
    seq_len: int | Tensor
    slots: Tensor  # int64 [S], where the keys and values of the new tokens are stored
    rows: Sequence[Rows]
    chunks: Sequence[Chunk]
    watched: Sequence[Chunk] = ()  # tokens whose attention probabilities `observe` receives
    observe: Observer | None = None

    def with_scores(
        self, *, sliding_window: int | None = None, alibi_slopes: Tensor | None = None, dtype: torch.dtype
    ) -> "PagedContext":
        """See `AttentionContext`."""
        scores: Any = {"sliding_window": sliding_window, "alibi_slopes": alibi_slopes, "dtype": dtype}
        rows = [one.with_scores(**scores) for one in self.rows]
        chunks = []
        for one in self.chunks:
            plain = one.position == 0 and alibi_slopes is None and (sliding_window is None or one.n <= sliding_window)
            chunks.append(one if plain else with_bias(one, sliding_window, alibi_slopes, dtype))
        watched = [with_bias(one, sliding_window, alibi_slopes, dtype) for one in self.watched]
        return replace(self, rows=rows, chunks=chunks, watched=watched)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, S, H, E], k and v [1, S, K, E] -> y [1, S, H, E]. See `AttentionContext`."""
        self.cache.write(layer, self.slots, k[0], v[0])
        y = torch.empty_like(q)
        for rows in self.rows:
            y[0, rows.index] = rows.attend(layer, q[0, rows.index], k[0, rows.index], v[0, rows.index])
        for one in self.chunks:
            past_k, past_v = self.cache.past(layer, one) if one.position else (k[:, one.tokens], v[:, one.tokens])
            y[:, one.tokens] = attention(q[:, one.tokens], past_k.transpose(1, 2), past_v.transpose(1, 2), one.bias)
        observe_chunks(self.cache, self.watched, self.observe, layer, q)
        return y


def observe_chunks(
    cache: PagedCache, watched: Sequence[Chunk], observe: Observer | None, layer: int, q: Tensor
) -> None:
    """Offers the attention probabilities of the watched tokens to `observe`. q [1, S, H, E]"""
    for one in watched if observe else ():
        assert observe
        observe(layer, one, partial(_probabilities, cache, layer, one, q))


def with_bias(one: Chunk, sliding_window: int | None, alibi_slopes: Tensor | None, dtype: torch.dtype) -> Chunk:
    """Returns the chunk with the bias of its scores."""
    positions = torch.arange(one.position, one.end, device=one.pages.device)
    return replace(one, bias=score_bias(decode_mask(positions, one.end), sliding_window, alibi_slopes, dtype))


def _probabilities(cache: PagedCache, layer: int, one: Chunk, q: Tensor) -> Tensor:
    """q [1, S, H, E] of all new tokens -> probabilities [H, n, T] float32 of those of the chunk"""
    assert one.bias is not None
    k, _ = cache.past(layer, one)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = q[:, one.tokens].transpose(1, 2).float() @ k.permute(0, 2, 3, 1).float() * q.shape[-1] ** -0.5
    return (scores + one.bias).softmax(-1)[0]
