"""Attention of decoding rows, one new token each, over a paged cache, with the rotation and the cache write before it.

The tokens of a row are divided among several programs (split-K), as one per head cannot use the bandwidth of the memory
if there are few rows. The last program of a row and head to finish combines the partial results (arXiv:2311.01282).

R rows   H query heads   K key/value heads   G query heads per key/value head   E head_dim   P pages of a row
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.kernels.support import can_run, gdc_launch_dependents, gdc_wait, jit, launch_options, next_power_of_2, tl

_ALONE = (16, 2)  # tokens that a program reads at a time, and its warps, if each query has its own keys
_GROUPED = (32, 4)  # the same for several queries with the same keys
_PROGRAMS = 132 * 8  # programs that use the bandwidth of an H200


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
def paged_attention_kernel(
    qkv_ptr, k_ptr, v_ptr, table_ptr, position_ptr, cos_ptr, sin_ptr, slope_ptr, partial_ptr, stats_ptr, counter_ptr,
    out_ptr, table_stride, page_stride, token_stride, scale, window,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    SPLITS: tl.constexpr, SP: tl.constexpr, BT: tl.constexpr, PAGE: tl.constexpr,
    ROPE: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (head, split, row) attends to a part of the tokens. The one that the new token is in stores it, too."""
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
    position = tl.load(position_ptr + row)  # of the new token; -1: a row that only fills the batch
    table = table_ptr + row * table_stride
    e = tl.arange(0, EP)
    g = tl.arange(0, GP)
    low = 0
    if WINDOW:
        low = tl.maximum(position - window + 1, 0)
    base = low // BT * BT
    length = tl.cdiv(tl.cdiv(position + 1 - base, SPLITS), BT) * BT  # tokens of a split
    n_used = tl.cdiv(position + 1 - base, tl.maximum(length, 1))
    start = base + split * length
    end = tl.minimum(start + length, position)  # the new token is not in the cache yet
    token = start + tl.arange(0, BT)
    first_page = load_pages(table, token, low, end, PAGE)
    k = load_tokens(k_ptr, first_page, token, low, end, head, e, page_stride, token_stride, E, PAGE)
    v = load_tokens(v_ptr, first_page, token, low, end, head, e, page_stride, token_stride, E, PAGE)
    cos = tl.zeros([EP], tl.float32)
    sin = tl.zeros([EP], tl.float32)
    if ROPE:
        at = tl.maximum(position, 0) * (E // 2) + e % (E // 2)
        cos = tl.load(cos_ptr + at, mask=e < E, other=0.0)
        sin = tl.load(sin_ptr + at, mask=e < E, other=0.0)
        sin = tl.where(e < E // 2, -sin, sin)
    slope = tl.zeros([GP], tl.float32)
    if ALIBI:
        slope = tl.load(slope_ptr + head * G + g, mask=g < G, other=0.0)
    if PDL:
        gdc_wait()
    if split < n_used:
        qkv = qkv_ptr + row * (H + 2 * K) * E
        heads = (head * G + g)[:, None] * E
        valid = (g < G)[:, None] & (e < E)[None, :]
        q = rotated(qkv + heads, e[None, :], cos[None, :], sin[None, :], valid, ROPE, E)
        q = q * (scale * 1.4426950408889634)  # powers of two instead of e: exp2 is one instruction
        if GP == 1:
            highest, total, y = attend_alone(
                q, k, v, k_ptr, v_ptr, table, start, low, end, position, head, e, slope, page_stride, token_stride,
                E, EP, BT, PAGE, ALIBI,
            )  # fmt: skip
        else:
            highest, total, y = attend_grouped(
                q, k, v, k_ptr, v_ptr, table, start, low, end, position, head, e, slope, page_stride, token_stride,
                GP, E, EP, BT, PAGE, ALIBI,
            )  # fmt: skip
        if split == n_used - 1:
            new_k = rotated(qkv + (H + head) * E, e, cos, sin, e < E, ROPE, E).to(k.dtype)
            new_v = tl.load(qkv + (H + K + head) * E + e, mask=e < E, other=0.0)
            page = tl.load(table + position // PAGE).to(tl.int64)
            to = page * page_stride + (position % PAGE) * token_stride + head * E + e
            tl.store(k_ptr + to, new_k, mask=e < E)
            tl.store(v_ptr + to, new_v, mask=e < E)
            new_s = tl.sum(q * new_k.to(tl.float32)[None, :], 1)
            last_highest = tl.maximum(highest, new_s)
            new_p = tl.exp2(new_s - last_highest)
            last_shrink = tl.exp2(highest - last_highest)
            total = total * last_shrink + new_p
            y = y * last_shrink[:, None] + new_p[:, None] * new_v.to(tl.float32)[None, :]
            highest = last_highest
        out = out_ptr + row * H * E + heads + e[None, :]
        if SPLITS == 1:
            tl.store(out, (y / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid)
        else:
            first = (row * K + head) * SPLITS  # index of the first partial result of this row and head
            to_partial = ((first + split) * G + g)[:, None] * E + e[None, :]
            tl.store(partial_ptr + to_partial, y, mask=valid)
            to_stats = ((first + split) * G + g) * 2
            tl.store(stats_ptr + to_stats, highest, mask=g < G)
            tl.store(stats_ptr + to_stats + 1, total, mask=g < G)
            tl.debug_barrier()
            n_done = tl.atomic_add(counter_ptr + row * K + head, 1, sem="acq_rel")
            if n_done == n_used - 1:
                i = tl.arange(0, SP)
                for member in tl.static_range(G):
                    source = (first + i) * G + member
                    m = tl.load(stats_ptr + source * 2, mask=i < n_used, other=-1e30, cache_modifier=".cg")
                    t = tl.load(stats_ptr + source * 2 + 1, mask=i < n_used, other=0.0, cache_modifier=".cg")
                    mask = (i < n_used)[:, None] & (e < E)[None, :]
                    part = tl.load(
                        partial_ptr + source[:, None] * E + e[None, :], mask=mask, other=0.0, cache_modifier=".cg"
                    )
                    weight = tl.exp2(m - tl.max(m, 0))
                    mean = tl.sum(part * weight[:, None], 0) / tl.sum(t * weight, 0)
                    to_out = out_ptr + (row * H + head * G + member) * E + e
                    tl.store(to_out, mean.to(out_ptr.dtype.element_ty), mask=e < E)
                tl.store(counter_ptr + row * K + head, 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Positions:
    """How the positions of tokens enter the scores: by rotation, by biases or, with neither, not at all."""

    cos: Tensor | None = None  # [max_seq, E/2] float32
    sin: Tensor | None = None
    slopes: Tensor | None = None  # [H] float32, of ALiBi
    window: int | None = None  # a query attends to this many tokens, its own included


class Scratch:
    """Memory for the partial results of `paged_attention`, used again by every layer. The counters return to zero."""

    def __init__(self, n_rows: int, n_heads: int, n_kv_heads: int, head_dim: int, splits: int, device: torch.device):
        self.splits = splits
        partial = n_rows * n_heads * splits if splits > 1 else 1
        self.partial = torch.empty(partial * head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(partial * 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(n_rows * n_kv_heads, dtype=torch.int32, device=device)


def n_splits(n_rows: int, n_kv_heads: int, max_tokens: int) -> int:
    """Returns among how many programs to divide the tokens of a row and head."""
    wanted = -(-_PROGRAMS // (n_rows * n_kv_heads))
    return max(1, min(wanted, -(-max_tokens // _ALONE[0]), 64))


def paged_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    positions: Tensor,
    how: Positions,
    scratch: Scratch,
    *,
    n_heads: int,
    max_tokens: int,
) -> Tensor:
    """Stores the new keys and values and returns what the rows attend to: qkv [R, (H + 2 K) E] -> [R, H E].

    keys and values: of one layer, [n_pages, page_size, K, E]. tables: int32 [R, P]. positions: int32 [R], of the new
    tokens; a row with -1 only fills the batch and its result is undefined. max_tokens: no row has more.
    """
    if not can_run(qkv.device):
        return eager_paged_attention(qkv, keys, values, tables, positions, how, n_heads=n_heads)
    page_size, kv_heads, head_dim = keys.shape[1:]
    group = n_heads // kv_heads
    out = torch.empty(len(qkv), n_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    dummy = positions
    tokens, warps = _ALONE if group == 1 else _GROUPED
    paged_attention_kernel[(kv_heads, scratch.splits, len(qkv))](
        qkv, keys, values, tables, positions, dummy if how.cos is None else how.cos,
        dummy if how.sin is None else how.sin, dummy if how.slopes is None else how.slopes,
        scratch.partial, scratch.stats, scratch.counters, out,
        tables.stride(0), keys.stride(0), keys.stride(1), head_dim**-0.5, how.window or 0,
        n_heads, kv_heads, group, 1 if group == 1 else max(16, next_power_of_2(group)), head_dim,
        next_power_of_2(head_dim), scratch.splits, next_power_of_2(scratch.splits), tokens, page_size,
        how.cos is not None, how.slopes is not None, how.window is not None and how.window < max_tokens,
        **launch_options(qkv.device, num_warps=warps, num_stages=1),
    )  # fmt: skip
    return out


def eager_paged_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, tables: Tensor, positions: Tensor, how: Positions, *, n_heads: int
) -> Tensor:
    """The twin of `paged_attention`."""
    page_size, kv_heads, head_dim = keys.shape[1:]
    at = positions.long().clamp(min=0)
    q, k, v = qkv.view(len(qkv), -1, head_dim).split([n_heads, kv_heads, kv_heads], dim=1)
    if how.cos is not None and how.sin is not None:
        q, k = (eager_rotate(x, how.cos[at], how.sin[at]) for x in (q, k))
    pages = tables.gather(1, at[:, None] // page_size)[:, 0].long()
    live = positions >= 0
    for cache, new in ((keys, k), (values, v)):
        cache[pages[live], at[live] % page_size] = new[live]
    past = [x[tables.long().clamp(min=0)].flatten(1, 2) for x in (keys, values)]  # [R, T, K, E] each
    past_k, past_v = (x.repeat_interleave(n_heads // kv_heads, dim=2).float() for x in past)
    s = torch.einsum("rhe,rthe->rht", q.float(), past_k) * head_dim**-0.5
    distance = torch.arange(s.shape[-1], device=qkv.device) - at[:, None]  # [R, T]
    if how.slopes is not None:
        s = s + how.slopes[:, None] * distance[:, None]
    hidden = distance > 0 if how.window is None else (distance > 0) | (distance <= -how.window)
    p = s.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    return torch.einsum("rht,rthe->rhe", p, past_v.masked_fill(hidden[..., None, None], 0)).flatten(1).to(qkv.dtype)


def eager_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of components (i, i + E/2): x [S, H, E], cos and sin [S, E/2] float32 -> [S, H, E]."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
