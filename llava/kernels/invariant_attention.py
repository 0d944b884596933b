"""Attention over a paged cache in which the bits of a token's result do not depend on the other tokens of the batch.

Each token reads the slots of its sequence in blocks of `_SLOTS`, counted from slot 0, and updates its softmax in
float32 block by block. Blocks that it does not attend to leave its result as it is, so it does not matter whether they
are read.

S new tokens   N tokens of a tile   T slots   R sequences   P pages   H query heads   K key/value heads   E head_dim
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.kernels.support import can_run, jit, tl

_SLOTS = 64  # slots of a block
_TOKENS = 8  # queries of a tile in the eager twin


@dataclass(frozen=True, eq=False, kw_only=True)
class Queries:
    """The slots that each new token attends to: those of its sequence up to its position."""

    positions: Tensor  # int32 [S]
    rows: Tensor  # int32 [S], the row of `pages` of each token
    pages: Tensor  # int32 [R, P], the pages of each sequence, padded with any pages
    sliding_window: int | None = None  # attend only to this many tokens, the own one included
    alibi_slopes: Tensor | None = None  # float32 [H]


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
    """Computes the same with products of fixed shapes, for `_TOKENS` tokens at a time."""
    tiles = zip(q.split(_TOKENS), queries.positions.split(_TOKENS), queries.rows.split(_TOKENS), strict=True)
    return torch.cat([_tile(*tile, k, v, queries) for tile in tiles])


def _tile(q: Tensor, positions: Tensor, rows: Tensor, k: Tensor, v: Tensor, queries: Queries) -> Tensor:
    """q [N, H, E], positions and rows [N] -> [N, H, E], with a softmax that is updated block by block."""
    n, missing, n_heads = len(q), _TOKENS - len(q), q.shape[1]
    q32 = F.pad(q.float() * q.shape[-1] ** -0.5, (0, 0, 0, 0, 0, missing))[:, :, None]  # [N, H, 1, E]
    past, bias = _past(F.pad(positions, (0, missing)), F.pad(rows, (0, missing)), k.shape[1], queries)
    highest = q32.new_full((*q32.shape[:3], 1), -1e30)
    total, y = torch.zeros_like(highest), torch.zeros_like(q32)
    for slots, block_bias in zip(past.split(_SLOTS, dim=1), bias.split(_SLOTS, dim=-1), strict=True):
        keys, values = (_read(cache, slots, n_heads) for cache in (k, v))
        scores = torch.bmm(q32.flatten(0, 1), keys.mT).view(_TOKENS, n_heads, 1, _SLOTS) + block_bias
        new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
        p, scale = (scores - new_highest).exp(), (highest - new_highest).exp()
        total = total * scale + p.sum(-1, keepdim=True)
        y = y * scale + torch.bmm(p.flatten(0, 1), values).view(y.shape)
        highest = new_highest
    return (y / total)[:n, :, 0].to(q.dtype)


def _past(positions: Tensor, rows: Tensor, page_size: int, queries: Queries) -> tuple[Tensor, Tensor]:
    """positions and rows [N] -> slots of the cache int64 [N, T], T a multiple of `_SLOTS`, and bias [N, 1 or H, 1, T].

    Slots after a token's position are replaced by the first one of its sequence, because other slots may contain NaN.
    """
    n_slots = -(-queries.pages.shape[1] * page_size // _SLOTS) * _SLOTS
    slots, own = torch.arange(n_slots, device=positions.device), positions[:, None].long()
    of_past = torch.where(slots <= own, slots, 0)
    past = queries.pages[rows].gather(1, of_past // page_size) * page_size + of_past % page_size
    attended = slots <= own
    if queries.sliding_window is not None:
        attended &= slots > own - queries.sliding_window
    bias = torch.zeros(attended.shape, device=positions.device)[:, None, None]
    if queries.alibi_slopes is not None:
        bias = queries.alibi_slopes[:, None, None] * (slots - own)[:, None, None]
    return past.long(), bias.masked_fill(~attended[:, None, None], -math.inf)


def _read(cache: Tensor, slots: Tensor, n_heads: int) -> Tensor:
    """slots [N, T] of the cache [n_pages, page_size, K, E] -> keys or values [N * H, T, E] float32, contiguous."""
    x = cache.flatten(0, 1)[slots].transpose(1, 2)  # [N, K, T, E]
    return x.repeat_interleave(n_heads // x.shape[1], dim=1).float().flatten(0, 1).contiguous()
