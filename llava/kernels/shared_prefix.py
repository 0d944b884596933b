"""Attention of decoding rows to the tokens with which several of them begin alike, such as a picture.

The keys and values of these tokens are read once for a group of rows, on the matrix units. The results are partial ones
that `paged_attention` combines with those of each row's own tokens (cascade attention).

R rows   H query heads   K key/value heads   E head_dim
"""

from __future__ import annotations

from torch import Tensor

from llava.kernels.attend import (
    ALONE,
    GROUPED,
    SHARED_ROWS,
    Positions,
    RowPages,
    Scratch,
    attend_grouped,
    load_pages,
    load_tokens,
    rotated,
)
from llava.kernels.support import gdc_launch_dependents, gdc_wait, jit, launch_options, next_power_of_2, tl


@jit
def shared_prefix_kernel(
    qkv_ptr, k_ptr, v_ptr, table_ptr, position_ptr, cos_ptr, sin_ptr, shared_ptr, partial_ptr, stats_ptr, n_rows,
    table_stride, page_stride, token_stride, scale,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, SPLITS: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr, PAGE: tl.constexpr, ROPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (head, part, group) attends with ROWS rows to a part of the tokens with which they begin alike."""
    head, part, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
    n_shared = tl.load(shared_ptr + group)
    length = tl.cdiv(tl.cdiv(n_shared, SHARED), UNIT) * UNIT
    start = part * length
    end = tl.minimum(start + length, n_shared)
    table = table_ptr + group * ROWS * table_stride  # of the first row
    row = group * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EP)
    token = start + tl.arange(0, BT)
    page = load_pages(table, token, 0, end, PAGE)
    k = load_tokens(k_ptr, page, token, 0, end, head, e, page_stride, token_stride, E, PAGE)
    v = load_tokens(v_ptr, page, token, 0, end, head, e, page_stride, token_stride, E, PAGE)
    cos = tl.zeros([ROWS, EP], tl.float32)
    sin = tl.zeros([ROWS, EP], tl.float32)
    valid = (row < n_rows)[:, None] & (e < E)[None, :]
    if ROPE:
        position = tl.maximum(tl.load(position_ptr + row, mask=row < n_rows, other=0), 0)
        angle = position[:, None] * (E // 2) + (e % (E // 2))[None, :]
        cos = tl.load(cos_ptr + angle, mask=valid, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=valid, other=0.0)
        sin = tl.where((e < E // 2)[None, :], -sin, sin)
    if PDL:
        gdc_wait()
    if start < end:
        q = rotated(qkv_ptr + (row * (H + 2 * K) + head)[:, None] * E, e[None, :], cos, sin, valid, ROPE, E)
        q = q * (scale * 1.4426950408889634)
        slope = tl.zeros([ROWS], tl.float32)
        highest, total, y = attend_grouped(
            q, k, v, k_ptr, v_ptr, table, start, 0, end, 0, head, e, slope, page_stride, token_stride,
            ROWS, E, EP, BT, PAGE, False,
        )  # fmt: skip
        to = (row * K + head) * (SPLITS + SHARED) + SPLITS + part
        tl.store(partial_ptr + to[:, None] * E + e[None, :], y, mask=valid)
        tl.store(stats_ptr + to * 2, highest, mask=row < n_rows)
        tl.store(stats_ptr + to * 2 + 1, total, mask=row < n_rows)


def shared_prefix(
    qkv: Tensor, pages: RowPages, how: Positions, scratch: Scratch, shared: Tensor, *, n_heads: int
) -> None:
    """Attends to the tokens with which the rows of a group begin alike. The results are in `scratch`. Needs Triton."""
    keys, values, tables, positions = pages
    page_size, kv_heads, head_dim = keys.shape[1:]
    assert kv_heads == n_heads
    assert how.slopes is None
    assert how.window is None
    cos, sin = (positions if x is None else x for x in (how.cos, how.sin))
    tokens, warps = GROUPED
    shared_prefix_kernel[(kv_heads, scratch.shared_splits, len(shared))](
        qkv, keys, values, tables, positions, cos, sin, shared, scratch.partial, scratch.stats, len(qkv),
        tables.stride(0), keys.stride(0), keys.stride(1), head_dim**-0.5, n_heads, kv_heads, head_dim,
        max(16, next_power_of_2(head_dim)), scratch.splits, scratch.shared_splits, SHARED_ROWS, tokens, ALONE[0],
        page_size, how.cos is not None, **launch_options(qkv.device, num_warps=warps, num_stages=1),
    )  # fmt: skip
