"""Dense copies of the keys and values of decoding sequences, for CPUs.

A CPU decodes at the speed at which it reads the cache, and gathering scattered pages for each step and layer reads and
writes everything once more. So the rows that are decoding are kept in dense tensors beside the pages: a row is copied
when it starts to decode, and from then on each step adds a token to both.

B rows   T slots   H query heads   K key/value heads   E head_dim
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.model.attention import attention, decode_mask, score_bias
from llava.model.paged import PagedCache, PagedRows, Row, lazy_zeros, paged_rows

_SHORT = 256  # slots of the shortest rows


class RowCache:
    """Dense keys and values [n_layers, n_rows, K, T, E] of rows with at most T tokens."""

    def __init__(self, pages: PagedCache, n_rows: int, n_slots: int):
        self.pages, self.n_rows = pages, n_rows
        n_layers, _, _, n_kv_heads, head_dim = pages.k.shape
        shape = (n_layers, n_rows, n_kv_heads, n_slots, head_dim)
        self.k, self.v = (lazy_zeros(shape, pages.k.dtype, pages.k.device) for _ in range(2))
        self.ids: list[int] = []  # sequence in each row

    def place(self, rows: Sequence[Row]) -> list[int]:
        """Makes the cache hold the tokens before the newest one of exactly these rows. Returns the order they have."""
        wanted = {row.id: i for i, row in enumerate(rows)}
        for b in reversed(range(len(self.ids))):
            if self.ids[b] not in wanted:
                self._remove(b)
        held = set(self.ids)
        for row in rows:
            if row.id not in held:
                self._append(row)
        return [wanted[id] for id in self.ids]

    def _remove(self, b: int) -> None:
        """Removes a row by moving the last one into its place."""
        last = self.ids.pop()
        if b < len(self.ids):
            self.ids[b] = last
            for x in (self.k, self.v):
                x[:, b] = x[:, len(self.ids)]

    def _append(self, row: Row) -> None:
        b = len(self.ids)
        self.ids.append(row.id)
        size = self.pages.page_size
        pages = torch.tensor(row.pages[: -(-row.position // size)], dtype=torch.int64)
        for dense, paged in ((self.k, self.pages.k), (self.v, self.pages.v)):
            tokens = paged[:, pages].flatten(1, 2)[:, : row.position]  # [n_layers, T, K, E]
            dense[:, b, :, : row.position] = tokens.transpose(1, 2)

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v [B, K, E] at positions [B]. Returns the keys and values of the layer, each [B, K, T, E]."""
        rows = torch.arange(len(self.ids))
        keys, values = self.k[layer, : len(rows)], self.v[layer, : len(rows)]
        keys[rows, :, positions] = k
        values[rows, :, positions] = v
        return keys, values


@dataclass(frozen=True, eq=False, kw_only=True)
class DenseRows:
    """Decoding rows of a packed row that attend over a `RowCache`."""

    cache: RowCache
    index: Tensor  # int64 [B], indices in the packed row of the rows of the cache
    positions: Tensor  # int64 [B]
    window: int  # slots read: the number of tokens in the longest row
    bias: Tensor | None = None  # [B, 1 or H, 1, window], set by `with_scores`

    def with_scores(
        self, *, sliding_window: int | None = None, alibi_slopes: Tensor | None = None, dtype: torch.dtype
    ) -> "DenseRows":
        """See `AttentionContext`."""
        mask = decode_mask(self.positions[:, None], self.window)
        return replace(self, bias=score_bias(mask, sliding_window, alibi_slopes, dtype))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, E], k and v [B, K, E] of the new tokens -> y [B, H, E]"""
        keys, values = self.cache.write(layer, self.positions, k, v)
        return attention(q[:, None], keys[:, :, : self.window], values[:, :, : self.window], self.bias)[:, 0]


class RowCaches:
    """Row caches for rows of up to 256, 512, 1024, … tokens, so that a long row does not make others longer.

    They take up at most as much memory as the pages; rows for which there is no room read their pages.
    """

    def __init__(self, pages: PagedCache):
        self.pages = pages
        self._by_size: dict[int, RowCache] = {}

    def rows(self, rows: Sequence[Row]) -> list[DenseRows | PagedRows]:
        """Returns the decoding rows, which are the first ones in the packed row, grouped by length."""
        by_size: dict[int, list[int]] = {size: [] for size in self._by_size}
        room = self.pages.n_pages * self.pages.page_size
        paged: list[int] = []
        for i, row in enumerate(rows):
            size = max(_SHORT, 1 << row.position.bit_length())
            room -= size
            (by_size.setdefault(size, []) if room >= 0 else paged).append(i)
        groups: list[DenseRows | PagedRows] = [
            self._group(size, rows, members) for size, members in by_size.items() if self._keep(size, members)
        ]
        return groups + ([paged_rows(self.pages, rows, paged)] if paged else [])

    def _keep(self, size: int, members: Sequence[int]) -> bool:
        """Makes or drops the cache of a size. Returns whether it has members."""
        if not members:
            self._by_size.pop(size, None)
        elif size not in self._by_size:
            n_rows = self.pages.n_pages * self.pages.page_size // size
            self._by_size[size] = RowCache(self.pages, n_rows, size)
        return bool(members)

    def _group(self, size: int, rows: Sequence[Row], members: Sequence[int]) -> DenseRows:
        cache = self._by_size[size]
        order = [members[i] for i in cache.place([rows[i] for i in members])]
        positions = [rows[i].position for i in order]
        return DenseRows(
            cache=cache, index=torch.tensor(order), positions=torch.tensor(positions), window=max(positions) + 1
        )
