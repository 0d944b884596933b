"""Dense copies of the keys and values of decoding sequences, for CPUs.

A CPU decodes at the speed at which it reads the cache, and gathering scattered pages for each step and layer reads and
writes everything once more. The rows that are decoding are therefore also kept in dense tensors: a row is copied
when it starts to decode, and from then on each step adds a token to both. Rows that begin with the same pages, such as
questions about one picture, keep only their later tokens; their common beginning is read once for all of them.

B rows   T slots   P tokens in common   H query heads   K key/value heads   E head_dim
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from llava.config import DecoderConfig
from llava.model.attention import attention, decode_mask, score_bias
from llava.model.paged import PagedCache, PagedRows, Row, lazy_zeros, paged_rows

Pages = tuple[int, ...]
_SHORT = 64  # slots of the shortest rows
_WORTH_SHARING = 64  # common tokens from which on a separate product is faster than reading them for each row


class RowCache:
    """Dense keys and values [n_layers, n_rows, K, T, E] of rows with at most T tokens of their own."""

    def __init__(self, pages: PagedCache, n_rows: int, n_slots: int):
        self.pages, self.n_rows = pages, n_rows
        n_layers, _, _, n_kv_heads, head_dim = pages.k.shape
        shape = (n_layers, n_rows, n_kv_heads, n_slots, head_dim)
        self.k, self.v = (lazy_zeros(shape, pages.k.dtype, pages.k.device) for _ in range(2))
        self.rows: list[tuple[int, Pages]] = []  # sequence in each row, and the pages that are not copied
        self.n_touched = 0  # rows that have been used at some time and therefore take up memory

    def place(self, rows: Sequence[Row], common: Sequence[Pages]) -> list[int]:
        """Makes the cache hold the tokens before the newest one of exactly these rows. Returns the order they have.

        common: the first pages of each row, which do not have to be copied.
        """
        wanted = {(row.id, pages): i for i, (row, pages) in enumerate(zip(rows, common, strict=True))}
        for b in reversed(range(len(self.rows))):
            if self.rows[b] not in wanted:
                self._remove(b)
        held = set(self.rows)
        for key, i in wanted.items():
            if key not in held:
                self._append(rows[i], common[i])
        return [wanted[key] for key in self.rows]

    def _remove(self, b: int) -> None:
        """Removes a row by moving the last one into its place."""
        last = self.rows.pop()
        if b < len(self.rows):
            self.rows[b] = last
            for x in (self.k, self.v):
                x[:, b] = x[:, len(self.rows)]

    def _append(self, row: Row, common: Pages) -> None:
        b, size = len(self.rows), self.pages.page_size
        self.rows.append((row.id, common))
        self.n_touched = max(self.n_touched, len(self.rows))
        own = torch.tensor(row.pages[len(common) : -(-row.position // size)], dtype=torch.int64)
        n = row.position - len(common) * size
        for dense, paged in ((self.k, self.pages.k), (self.v, self.pages.v)):
            tokens = paged.index_select(1, own).flatten(1, 2)[:, :n]  # [n_layers, T, K, E]
            dense[:, b, :, :n] = tokens.transpose(1, 2)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v [B, K, E] in slots [B]. Returns the keys and values of the layer, each [B, K, T, E]."""
        rows = torch.arange(len(self.rows))
        keys, values = self.k[layer, : len(rows)], self.v[layer, : len(rows)]
        keys[rows, :, slots] = k
        values[rows, :, slots] = v
        return keys, values


class Common(NamedTuple):
    """The beginning that several rows have in common."""

    k: Tensor  # [n_layers, 1, K, P, E]
    v: Tensor
    n_rows: int


@dataclass(frozen=True, eq=False, kw_only=True)
class DenseRows:
    """Decoding rows of a packed row that attend over a `RowCache`."""

    cache: RowCache
    index: Tensor  # int64 [B], indices in the packed row of the rows of the cache
    slots: Tensor  # int64 [B], where the new tokens are stored
    window: int  # slots read: the largest number of own tokens of a row
    common: Sequence[Common] = ()
    grouped: Tensor | None = None  # int64, the rows with common beginnings, in the order of `common`
    bias: Tensor | None = None  # [B, 1 or H, 1, window], set by `with_scores`

    def with_scores(
        self, *, sliding_window: int | None = None, alibi_slopes: Tensor | None = None, dtype: torch.dtype
    ) -> "DenseRows":
        """See `AttentionContext`. Rows with common beginnings must have neither a window nor slopes."""
        assert not self.common or (sliding_window is None and alibi_slopes is None)
        mask = decode_mask(self.slots[:, None], self.window)
        return replace(self, bias=score_bias(mask, sliding_window, alibi_slopes, dtype))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, E], k and v [B, K, E] of the new tokens -> y [B, H, E]"""
        keys, values = self.cache.write(layer, self.slots, k, v)
        keys, values = keys[:, :, : self.window], values[:, :, : self.window]
        if self.grouped is None:
            return attention(q[:, None], keys, values, self.bias)[:, 0]
        y, weight = _flash(q[:, :, None], keys, values, self.bias)  # [B, H, 1, E], [B, H, 1]
        y, weight = y[:, :, 0], weight[:, :, 0]
        of_group = q[self.grouped].split([one.n_rows for one in self.common])
        found = [
            _flash(q.transpose(0, 1)[None], one.k[layer], one.v[layer])  # [1, H, rows, E], [1, H, rows]
            for q, one in zip(of_group, self.common, strict=True)
        ]
        shared = torch.cat([y for y, _ in found], dim=2)[0].transpose(0, 1)
        share = (torch.cat([sums for _, sums in found], dim=2)[0].T - weight[self.grouped]).sigmoid_()
        y[self.grouped] = torch.lerp(y[self.grouped], shared, share[..., None])
        return y


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The CPU's attention kernel: q [B, H, S, E], k and v [B, H, T, E] -> y [B, H, S, E], log of the sums [B, H, S].

    `scaled_dot_product_attention` calls the same kernel, but does not return the sums.
    """
    y, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    return y, sums


class RowCaches:
    """Row caches for rows of up to 64, 128, 256, … tokens, so that a long row does not make others longer.

    They take up at most as much memory as the pages; rows for which there is no room read their pages.
    """

    def __init__(self, pages: PagedCache, *, share: bool):
        """share: read common pages once. Not for grouped-query attention, sliding windows and ALiBi."""
        self.pages, self.share = pages, share
        self._n_start = -(-_WORTH_SHARING // pages.page_size)
        self._by_size: dict[int, RowCache] = {}
        self._common: dict[int, Pages] = {}  # common pages of each sequence, from when it started to decode
        self._copies: dict[Pages, tuple[Tensor, Tensor]] = {}  # keys and values of common pages

    def rows(self, rows: Sequence[Row]) -> list[DenseRows | PagedRows]:
        """Returns the decoding rows, which are the first ones in the packed row, grouped by length."""
        self._find_common(rows)
        by_size: dict[int, list[int]] = {size: [] for size in self._by_size}
        capacity = self.pages.n_pages * self.pages.page_size - sum(k.shape[3] for k, _ in self._copies.values())
        room = capacity * 3 // 4  # the rest is for rows that are no longer used, see `_drop_unused`
        paged: list[int] = []
        for i, row in enumerate(rows):
            own = row.position - len(self._common[row.id]) * self.pages.page_size
            size = max(_SHORT, 1 << own.bit_length())
            room -= size
            (by_size.setdefault(size, []) if room >= 0 else paged).append(i)
        self._drop_unused({size: len(members) for size, members in by_size.items()}, capacity)
        groups: list[DenseRows | PagedRows] = [
            dense for size, members in by_size.items() if (dense := self._group(size, rows, members))
        ]
        return groups + ([paged_rows(self.pages, rows, paged)] if paged else [])

    def _find_common(self, rows: Sequence[Row]) -> None:
        """Decides for rows that start to decode which pages to share: those that all rows with the same start reuse."""
        common = {
            row.id: pages
            for row in rows
            # a row that was preempted since its last step may have other pages
            if (pages := self._common.get(row.id)) is not None and tuple(row.pages[: len(pages)]) == pages
        }
        starts = {pages[: self._n_start]: pages for pages in common.values() if pages}
        new: dict[Pages, list[Row]] = {}
        for row in rows:
            if row.id not in common:
                new.setdefault(tuple(row.pages[: min(self._n_start, row.n_reused)]), []).append(row)
        for start, members in new.items():
            pages = starts.get(start, _common_pages(members) if len(members) > 1 else ())
            for row in members:
                fits = self.share and len(start) == self._n_start and row.n_reused >= len(pages)
                common[row.id] = pages if fits and tuple(row.pages[: len(pages)]) == pages else ()
        self._common = common
        self._copies = {pages: self._copies.get(pages) or self._copy(pages) for pages in set(common.values()) if pages}

    def _drop_unused(self, n_rows: Mapping[int, int], capacity: int) -> None:
        """Drops caches with unused rows if the tokens of used and unused rows exceed the capacity.

        What is still needed of them is copied again.
        """
        unused = {size: one.n_touched - n_rows[size] for size, one in self._by_size.items()}
        n_tokens = sum(size * (n + max(0, unused.get(size, 0))) for size, n in n_rows.items())
        if n_tokens > capacity:
            self._by_size = {size: one for size, one in self._by_size.items() if unused[size] <= 0}

    def _copy(self, pages: Pages) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of pages, each [n_layers, 1, K, P, E]."""
        index = torch.tensor(pages)
        k, v = (x[:, index].flatten(1, 2)[:, None].transpose(2, 3).contiguous() for x in (self.pages.k, self.pages.v))
        return k, v

    def _group(self, size: int, rows: Sequence[Row], members: Sequence[int]) -> DenseRows | None:
        if size not in self._by_size:
            n_rows = self.pages.n_pages * self.pages.page_size // size
            self._by_size[size] = RowCache(self.pages, n_rows, size)
        cache = self._by_size[size]
        order = [
            members[i] for i in cache.place([rows[i] for i in members], [self._common[rows[i].id] for i in members])
        ]
        if not order:
            return None
        by_pages: dict[Pages, list[int]] = {}
        slots = []
        for b, i in enumerate(order):
            pages = self._common[rows[i].id]
            slots.append(rows[i].position - len(pages) * self.pages.page_size)
            if pages:
                by_pages.setdefault(pages, []).append(b)
        grouped = [b for group in by_pages.values() for b in group]
        return DenseRows(
            cache=cache,
            index=torch.tensor(order),
            slots=torch.tensor(slots),
            window=max(slots) + 1,
            common=[Common(*self._copies[pages], len(group)) for pages, group in by_pages.items()],
            grouped=torch.tensor(grouped) if grouped else None,
        )


def _common_pages(rows: Sequence[Row]) -> Pages:
    """Returns the pages with which all rows begin and that they took from the prefix cache."""
    columns = zip(*(row.pages[: row.n_reused] for row in rows), strict=False)
    return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def can_share(config: DecoderConfig) -> bool:
    """Returns whether rows can have common pages: not with grouped-query attention, a sliding window or ALiBi."""
    return config.kind == "llama" and config.n_heads == config.n_kv_heads and config.sliding_window is None
