"""Attention of decoding rows, one new token each, over a paged cache, with the rotation and the cache write before it.

The tokens of a row are divided among several programs (split-K), as one per head cannot use the bandwidth of the memory
if there are few rows. The last program of a row and head to finish combines the partial results (arXiv:2311.01282).

R rows   H query heads   K key/value heads   G query heads per key/value head   E head_dim   P pages of a row
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.kernels.attend import (
    ALONE,
    GROUPED,
    SHARED_ROWS,
    Positions,
    RowPages,
    Scratch,
    attend_alone,
    attend_grouped,
    eager_rotate,
    load_pages,
    load_tokens,
    parts_of,
    rotated,
)
from llava.kernels.shared_prefix import shared_prefix
from llava.kernels.support import can_run, gdc_launch_dependents, gdc_wait, jit, launch_options, next_power_of_2, tl

_PROGRAMS = 132 * 8  # programs that use the bandwidth of an H200


@jit
def paged_attention_kernel(
    qkv_ptr, k_ptr, v_ptr, table_ptr, position_ptr, cos_ptr, sin_ptr, slope_ptr, shared_ptr, partial_ptr,
    stats_ptr, counter_ptr, out_ptr, table_stride, page_stride, token_stride, scale, window,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    SPLITS: tl.constexpr, SHARED: tl.constexpr, SP: tl.constexpr, BT: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, ROPE: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (head, split, row) attends to a part of the tokens. The one that the new token is in stores it, too.

    With SHARED > 0, `shared_prefix` has attended to the first tokens already, in up to SHARED parts.
    """
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
    n_shared = 0
    if SHARED > 0:
        n_shared = tl.load(shared_ptr + row // ROWS)
        base = n_shared
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
        if SPLITS + SHARED == 1:
            tl.store(out, (y / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid)
        else:
            first = (row * K + head) * (SPLITS + SHARED)  # index of the first partial result of this row and head
            to_partial = ((first + split) * G + g)[:, None] * E + e[None, :]
            tl.store(partial_ptr + to_partial, y, mask=valid)
            to_stats = ((first + split) * G + g) * 2
            tl.store(stats_ptr + to_stats, highest, mask=g < G)
            tl.store(stats_ptr + to_stats + 1, total, mask=g < G)
            tl.debug_barrier()
            n_done = tl.atomic_add(counter_ptr + row * K + head, 1, sem="acq_rel")
            if n_done == n_used - 1:
                i = tl.arange(0, SP)
                used = i < n_used
                if SHARED > 0:
                    used |= (i >= SPLITS) & (i < SPLITS + parts_of(n_shared, SHARED, BT))
                for member in tl.static_range(G):
                    source = (first + i) * G + member
                    m = tl.load(stats_ptr + source * 2, mask=used, other=-1e30, cache_modifier=".cg")
                    t = tl.load(stats_ptr + source * 2 + 1, mask=used, other=0.0, cache_modifier=".cg")
                    mask = used[:, None] & (e < E)[None, :]
                    part = tl.load(
                        partial_ptr + source[:, None] * E + e[None, :], mask=mask, other=0.0, cache_modifier=".cg"
                    )
                    weight = tl.exp2(m - tl.max(m, 0))
                    mean = tl.sum(part * weight[:, None], 0) / tl.sum(t * weight, 0)
                    to_out = out_ptr + (row * H + head * G + member) * E + e
                    tl.store(to_out, mean.to(out_ptr.dtype.element_ty), mask=e < E)
                tl.store(counter_ptr + row * K + head, 0)


def n_splits(n_rows: int, n_kv_heads: int, max_tokens: int) -> int:
    """Returns among how many programs to divide the tokens of a row and head."""
    wanted = -(-_PROGRAMS // (n_rows * n_kv_heads))
    return max(1, min(wanted, -(-max_tokens // ALONE[0]), 64))


def paged_attention(
    qkv: Tensor,
    pages: RowPages,
    how: Positions,
    scratch: Scratch,
    *,
    n_heads: int,
    max_tokens: int,
    shared: Tensor | None = None,
) -> Tensor:
    """Stores the new keys and values and returns what the rows attend to: qkv [R, (H + 2 K) E] -> [R, H E].

    max_tokens: no row has more. shared: int32 [R / SHARED_ROWS], with how many tokens the rows of each group begin
    alike, in whole pages; None: not known. They are then read once for the group, which needs `Scratch.shared_splits`
    and excludes windows and biases.
    """
    if not can_run(qkv.device):
        return eager_paged_attention(qkv, pages, how, n_heads=n_heads)
    keys, values, tables, positions = pages
    page_size, kv_heads, head_dim = keys.shape[1:]
    group = n_heads // kv_heads
    out = torch.empty(len(qkv), n_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    dummy = positions
    n_shared = scratch.shared_splits if shared is not None else 0
    assert n_shared or shared is None
    if shared is not None:
        shared_prefix(qkv, pages, how, scratch, shared, n_heads=n_heads)
    tokens, warps = ALONE if group == 1 else GROUPED
    has_window = how.window is not None and how.window < max_tokens
    n_parts = scratch.splits + n_shared
    paged_attention_kernel[(kv_heads, scratch.splits, len(qkv))](
        qkv, keys, values, tables, positions, dummy if how.cos is None else how.cos,
        dummy if how.sin is None else how.sin, dummy if how.slopes is None else how.slopes,
        dummy if shared is None else shared, scratch.partial, scratch.stats, scratch.counters, out,
        tables.stride(0), keys.stride(0), keys.stride(1), head_dim**-0.5, how.window or 0,
        n_heads, kv_heads, group, 1 if group == 1 else max(16, next_power_of_2(group)), head_dim,
        max(16, next_power_of_2(head_dim)), scratch.splits, n_shared, next_power_of_2(n_parts), tokens, page_size,
        SHARED_ROWS, how.cos is not None, how.slopes is not None, has_window,
        **launch_options(qkv.device, num_warps=warps, num_stages=1),
    )  # fmt: skip
    return out


def eager_paged_attention(qkv: Tensor, pages: RowPages, how: Positions, *, n_heads: int) -> Tensor:
    """The twin of `paged_attention`."""
    keys, values, tables, positions = pages
    page_size, kv_heads, head_dim = keys.shape[1:]
    at = positions.long().clamp(min=0)
    q, k, v = qkv.view(len(qkv), -1, head_dim).split([n_heads, kv_heads, kv_heads], dim=1)
    if how.cos is not None and how.sin is not None:
        q, k = (eager_rotate(x, how.cos[at], how.sin[at]) for x in (q, k))
    own = tables.gather(1, at[:, None] // page_size)[:, 0].long()
    live = positions >= 0
    for cache, new in ((keys, k), (values, v)):
        cache[own[live], at[live] % page_size] = new[live]
    past = [x[tables.long().clamp(min=0)].flatten(1, 2) for x in (keys, values)]  # [R, T, K, E] each
    past_k, past_v = (x.repeat_interleave(n_heads // kv_heads, dim=2).float() for x in past)
    s = torch.einsum("rhe,rthe->rht", q.float(), past_k) * head_dim**-0.5
    distance = torch.arange(s.shape[-1], device=qkv.device) - at[:, None]  # [R, T]
    if how.slopes is not None:
        s = s + how.slopes[:, None] * distance[:, None]
    hidden = distance > 0 if how.window is None else (distance > 0) | (distance <= -how.window)
    p = s.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    return torch.einsum("rht,rthe->rhe", p, past_v.masked_fill(hidden[..., None, None], 0)).flatten(1).to(qkv.dtype)
