"""Attention over a paged cache in which the bits of a token's result do not depend on the other tokens of the batch.

Each token reads the slots of its sequence in blocks of `_SLOTS`, counted from slot 0, and updates its softmax in
float32 block by block. Blocks that it does not attend to leave its result as it is, so it does not matter whether they
are read.

S new tokens   N tiles   Q queries of a tile   T slots   R sequences   P pages
H query heads   K key/value heads   E head_dim
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.kernels.support import can_run, jit, tl

_SLOTS = 64  # slots of a block
# of the eager twin:
_TWIN_SLOTS = 128  # slots of a block
_QUERIES = 8  # queries of a tile
_TILES = 8  # tiles of a matrix product
_PIECE = 2**15  # elements of an elementwise operation


@dataclass(frozen=True, eq=False, kw_only=True)
class Queries:
    """The slots that each new token attends to: those of its sequence up to its position."""

    positions: Tensor  # int32 [S]
    rows: Tensor  # int32 [S], the row of `pages` of each token
    pages: Tensor  # int32 [R, P], the pages of each sequence, padded with any pages
    page_size: int
    sliding_window: int | None = None  # attend only to this many tokens, the own one included
    alibi_slopes: Tensor | None = None  # float32 [H]

    @cached_property
    def tiling(self) -> Tiling:
        """The same for all layers, therefore computed once."""
        at = torch.arange(len(self.rows), device=self.rows.device)
        is_new = F.pad(self.rows[1:] != self.rows[:-1], (1, 0), value=True)  # the first token of a sequence
        query = (at - at.where(is_new, 0).cummax(0).values) % _QUERIES
        tile = (query == 0).cumsum(0) - 1
        first = at[query == 0]
        positions = self.positions[first, None].repeat(1, _QUERIES)
        positions[tile, query] = self.positions
        parts = zip(positions.split(_TILES), self.rows[first].split(_TILES), strict=True)
        return Tiling(tile, query, [list(self._blocks(*part)) for part in parts])

    def _blocks(self, positions: Tensor, rows: Tensor) -> Iterator[Block]:
        """positions [N, Q], rows [N] of some tiles"""
        last = positions.amax(1, keepdim=True)
        for start in range(0, int(last.amax()) + 1, _TWIN_SLOTS):
            slots = torch.arange(start, start + _TWIN_SLOTS, device=last.device)
            of_past = slots.where(slots <= last, 0).long()  # later ones may contain NaN
            pages = self.pages[rows].long().gather(1, of_past // self.page_size)
            yield Block(
                pages * self.page_size + of_past % self.page_size, self._bias(slots, positions[:, None, :, None])
            )

    def _bias(self, slots: Tensor, positions: Tensor) -> Tensor | None:
        """slots [T], positions [N, 1, Q, 1] -> [N, 1 or H, Q, T], or None if it is zero"""
        distance = slots - positions
        attended = distance <= 0
        if self.sliding_window is not None:
            attended &= distance > -self.sliding_window
        if self.alibi_slopes is not None:
            return (self.alibi_slopes[:, None, None] * distance).masked_fill(~attended, -math.inf)
        return (
            None
            if attended.all()
            else torch.zeros_like(attended, dtype=torch.float32).masked_fill(~attended, -math.inf)
        )


class Tiling(NamedTuple):
    """How the eager twin divides the new tokens: a tile has up to `_QUERIES` tokens of one sequence."""

    tile: Tensor  # int64 [S], of each token
    query: Tensor  # int64 [S], the index of each token in its tile
    blocks: list[list[Block]]  # what each `_TILES` tiles read, one after the other


class Block(NamedTuple):
    """What some tiles read at a time."""

    slots: Tensor  # int64 [N, T], of the cache
    bias: Tensor | None  # float32 [N, 1 or H, Q, T], added to the scores


@partial(jit, do_not_specialize=["table_width"])  # one compiled kernel for all batches
def invariant_attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, positions_ptr, rows_ptr, pages_ptr, slopes_ptr, table_width, scale,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Computes y [E] of the token program_id(0) and the head program_id(1)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions_ptr + token)
    lowest = tl.maximum(position - WINDOW + 1, 0)  # first slot attended to
    table_ptr = pages_ptr + tl.load(rows_ptr + token).to(tl.int64) * table_width
    e = tl.arange(0, BE)
    own = (token * H + head) * E + e
    q = tl.load(q_ptr + own, mask=e < E, other=0.0).to(tl.float32) * scale
    highest, total, y = -1e30, 0.0, tl.zeros([BE], tl.float32)
    start = lowest // BS * BS
    while start <= position:
        slot = start + tl.arange(0, BS)
        attended = (slot >= lowest) & (slot <= position)
        page = tl.load(table_ptr + slot // PAGE, mask=attended, other=0).to(tl.int64)
        at = ((page * PAGE + slot % PAGE) * K + head // (H // K))[:, None] * E + e[None, :]
        read = attended[:, None] & (e < E)[None, :]
        k = tl.load(k_ptr + at, mask=read, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=read, other=0.0).to(tl.float32)
        scores = tl.sum(k * q[None, :], 1)
        if slopes_ptr is not None:
            scores += tl.load(slopes_ptr + head) * (slot - position).to(tl.float32)
        scores = tl.where(attended, scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 0))
        p, factor = tl.exp(scores - new_highest), tl.exp(highest - new_highest)
        total = total * factor + tl.sum(p, 0)
        y = y * factor + tl.sum(v * p[:, None], 0)
        highest = new_highest
        start += BS
    tl.store(y_ptr + own, (y / total).to(y_ptr.dtype.element_ty), mask=e < E)


def invariant_attention(q: Tensor, k: Tensor, v: Tensor, queries: Queries) -> Tensor:
    """q [S, H, E], k and v [n_pages, page_size, K, E] of a layer's cache -> y [S, H, E]"""
    if not can_run(q.device):
        return eager_invariant_attention(q, k, v, queries)
    (n_tokens, n_heads, head_dim), (_, page_size, n_kv_heads, _) = q.shape, k.shape
    y = q.new_empty(q.shape)
    invariant_attention_kernel[n_tokens, n_heads](
        q.contiguous(), k, v, y, queries.positions, queries.rows, queries.pages, queries.alibi_slopes,
        queries.pages.shape[1], head_dim**-0.5,
        H=n_heads, K=n_kv_heads, E=head_dim, PAGE=page_size, WINDOW=queries.sliding_window or 2**30,
        BS=_SLOTS, BE=1 << (head_dim - 1).bit_length(), num_warps=4,
    )  # fmt: skip
    return y


def eager_invariant_attention(q: Tensor, k: Tensor, v: Tensor, queries: Queries) -> Tensor:
    """Computes the same with products of fixed shapes."""
    tile, query, blocks = queries.tiling
    tiled = q.new_zeros(len(blocks) * _TILES, _QUERIES, *q.shape[1:], dtype=torch.float32)
    tiled[tile, query] = q.float() * q.shape[-1] ** -0.5
    copies = tiled.new_empty(2, _TILES * k.shape[2], _TWIN_SLOTS, q.shape[-1])  # of a block of keys and values
    y = torch.cat([_tiles(part, (k, v), read, copies) for part, read in zip(tiled.split(_TILES), blocks, strict=True)])
    return y[tile, query].to(q.dtype)


def _tiles(q: Tensor, caches: tuple[Tensor, Tensor], blocks: list[Block], copies: Tensor) -> Tensor:
    """q [N, Q, H, E] float32 -> [N, Q, H, E], with a softmax that is updated block by block

    If there are fewer than N tiles, the last rows of the result are whatever the copies contain.
    """
    (n, _, n_heads, head_dim), n_kv_heads = q.shape, caches[0].shape[2]
    q = q.transpose(1, 2).reshape(n * n_kv_heads, -1, head_dim)  # [N * K, H / K * Q, E]: heads with the same keys
    highest = q.new_full((*q.shape[:2], 1), -1e30)
    total, y = torch.zeros_like(highest), torch.zeros_like(q)
    for slots, bias in blocks:
        for cache, copy in zip(caches, copies, strict=True):
            _read(cache, slots, copy)
        keys, values = copies
        scores = torch.bmm(q, keys.mT)
        if bias is not None:
            scores.view(n, n_heads, _QUERIES, _TWIN_SLOTS)[: len(bias)].add_(bias)
        new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
        p, scale = _exp(scores - new_highest), _exp(highest - new_highest)
        total = total * scale + p.sum(-1, keepdim=True)
        y = y * scale + torch.bmm(p, values)
        highest = new_highest
    return (y / total).view(n, n_heads, _QUERIES, head_dim).transpose(1, 2)


def _read(cache: Tensor, slots: Tensor, copy: Tensor) -> None:
    """Copies slots [N, T] of the cache [n_pages, page_size, K, E] to the beginning of [N * K, T, E] float32."""
    n_kv_heads, head_dim = cache.shape[2:]
    rows = slots[:, None] * n_kv_heads + torch.arange(n_kv_heads, device=slots.device)[:, None]  # [N, K, T]
    out, cache, rows = copy.view(-1, head_dim)[: rows.numel()], cache.view(-1, head_dim), rows.flatten()
    if cache.dtype == copy.dtype:
        torch.index_select(cache, 0, rows, out=out)
    else:
        out.copy_(cache.index_select(0, rows))


def _exp(x: Tensor) -> Tensor:
    """Replaces the elements by their exponentials, in pieces that PyTorch does not divide among threads."""
    for piece in x.view(-1).split(_PIECE):
        piece.exp_()
    return x
