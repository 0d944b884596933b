"""Parts of the attention kernels: reading a paged cache, rotation, and the softmax over blocks of tokens.

T tokens of a block   G queries with the same keys   H query heads   K key/value heads   E head_dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llava.kernels.support import jit, tl

ALONE = (16, 2)  # tokens that a program reads at a time, and its warps, if each query has its own keys
GROUPED = (32, 4)  # the same for several queries with the same keys
SHARED_ROWS = 16  # rows of a group that reads its common beginning once


@jit
def load_pages(table_ptr, token, low, end, PAGE: tl.constexpr):
    """Loads the pages of tokens of a row; page 0 for those outside of low <= token < end."""
    return tl.load(table_ptr + token // PAGE, mask=(token >= low) & (token < end), other=0).to(tl.int64)


@jit
def load_tokens(
    ptr, page, token, low, end, head, e, page_stride, token_stride, E: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """Loads the keys or values [T, E] of tokens; zeros for those outside of low <= token < end."""
    valid = (token >= low) & (token < end)
    at = page * page_stride + (token % PAGE) * token_stride + head * E
    return tl.load(ptr + at[:, None] + e[None, :], mask=valid[:, None] & (e < E)[None, :], other=0.0)


@jit
def attend_alone(
    q, k, v, k_ptr, v_ptr, table, start, low, end, position, head, e, slope, page_stride, token_stride,
    E: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr, PAGE: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Attends with a single query q [1, E], starting with the keys and values k and v [BT, E].

    Each of the BT slots has its own softmax over every BT-th token. They are joined once at the end, so that threads
    wait for each other only there. Returns the highest score [1], the sum of the weights [1] and that of the values.
    """
    highest = tl.full([BT], -1e30, tl.float32)
    total = tl.zeros([BT], tl.float32)
    y = tl.zeros([BT, EP], tl.float32)
    slot = tl.arange(0, BT)
    page = load_pages(table, start + BT + slot, low, end, PAGE)
    while start < end:
        token = start + BT + slot
        next_k = load_tokens(k_ptr, page, token, low, end, head, e, page_stride, token_stride, E, PAGE)
        next_v = load_tokens(v_ptr, page, token, low, end, head, e, page_stride, token_stride, E, PAGE)
        page = load_pages(table, token + BT, low, end, PAGE)
        s = tl.sum(k.to(tl.float32) * q, 1)
        if ALIBI:
            s += tl.sum(slope, 0) * (start + slot - position).to(tl.float32) * 1.4426950408889634
        valid = (start + slot >= low) & (start + slot < end)
        new_highest = tl.where(valid, tl.maximum(highest, s), highest)
        p = tl.where(valid, tl.exp2(s - new_highest), 0.0)
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + p
        y = y * shrink[:, None] + p[:, None] * v.to(tl.float32)
        highest = new_highest
        k, v = next_k, next_v
        start += BT
    top = tl.max(highest, 0)
    weight = tl.exp2(highest - top)
    one = tl.zeros([1], tl.float32)
    return one + top, one + tl.sum(total * weight, 0), tl.sum(y * weight[:, None], 0)[None, :]


@jit
def attend_grouped(
    q, k, v, k_ptr, v_ptr, table, start, low, end, position, head, e, slope, page_stride, token_stride,
    GP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr, PAGE: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Like `attend_alone`, for several queries q [G, E] with the same keys and values, on the matrix units."""
    highest = tl.full([GP], -1e30, tl.float32)
    total = tl.zeros([GP], tl.float32)
    y = tl.zeros([GP, EP], tl.float32)
    slot = tl.arange(0, BT)
    page = load_pages(table, start + BT + slot, low, end, PAGE)
    while start < end:
        token = start + BT + slot
        next_k = load_tokens(k_ptr, page, token, low, end, head, e, page_stride, token_stride, E, PAGE)
        next_v = load_tokens(v_ptr, page, token, low, end, head, e, page_stride, token_stride, E, PAGE)
        page = load_pages(table, token + BT, low, end, PAGE)
        s = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="ieee")
        if ALIBI:
            s += slope[:, None] * (start + slot - position).to(tl.float32)[None, :] * 1.4426950408889634
        s = tl.where(((start + slot >= low) & (start + slot < end))[None, :], s, -1e30)
        new_highest = tl.maximum(highest, tl.max(s, 1))  # the first block has a token that is attended to
        p = tl.exp2(s - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(p, 1)
        y = y * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = new_highest
        k, v = next_k, next_v
        start += BT
    return highest, total, y


@jit
def rotated(ptr, e, cos, sin, mask, ROPE: tl.constexpr, E: tl.constexpr):
    """Loads vectors [..., E] and rotates each pair of components (i, i + E/2). e and mask broadcast to the result."""
    x = tl.load(ptr + e, mask=mask, other=0.0).to(tl.float32)
    if ROPE:
        other = tl.load(ptr + (e + E // 2) % E, mask=mask, other=0.0).to(tl.float32)
        x = x * cos + other * sin
    return x


@jit
def parts_of(n_tokens, PARTS: tl.constexpr, BT: tl.constexpr):
    """Returns how many of PARTS parts, each a multiple of BT tokens, it takes to divide n_tokens."""
    length = tl.cdiv(tl.cdiv(n_tokens, PARTS), BT) * BT
    return tl.cdiv(n_tokens, tl.maximum(length, 1))


@dataclass(frozen=True, eq=False, kw_only=True)
class Positions:
    """How the positions of tokens enter the scores: by rotation, by biases or, with neither, not at all."""

    cos: Tensor | None = None  # [max_seq, E/2] float32
    sin: Tensor | None = None
    slopes: Tensor | None = None  # [H] float32, of ALiBi
    window: int | None = None  # a query attends to this many tokens, its own included


class RowPages(NamedTuple):
    """The cache of a layer, and where the decoding rows, one new token each, are in it."""

    keys: Tensor  # [n_pages, page_size, K, E]
    values: Tensor
    tables: Tensor  # int32 [R, P], the pages of each row
    positions: Tensor  # int32 [R], of the new tokens; -1: the row only fills the batch, and its result is undefined


class Scratch:
    """Memory for the partial results of `paged_attention`, used again by every layer. The counters return to zero."""

    def __init__(
        self,
        n_rows: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        splits: int,
        device: torch.device,
        *,
        shared_splits: int = 0,
    ):
        """splits: parts into which the tokens of a row are divided. shared_splits: those of a shared beginning."""
        self.splits, self.shared_splits = splits, shared_splits
        n_parts = splits + shared_splits
        partial = n_rows * n_heads * n_parts if n_parts > 1 else 1
        self.partial = torch.empty(partial * head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(partial * 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(n_rows * n_kv_heads, dtype=torch.int32, device=device)


def eager_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of components (i, i + E/2): x [S, H, E], cos and sin [S, E/2] float32 -> [S, H, E]."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
