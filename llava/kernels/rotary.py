"""Rotates the queries and keys of new tokens, and stores their keys and values in the pages of a cache, in one pass.

S new tokens   H query heads   K key/value heads   E head_dim
"""

from __future__ import annotations

from torch import Tensor

from llava.kernels.attend import Positions, eager_rotate
from llava.kernels.support import can_run, gdc_launch_dependents, gdc_wait, jit, launch_options, next_power_of_2, tl

_HEADS = 8  # heads of a program


@jit
def rotary_kernel(
    qkv_ptr, k_ptr, v_ptr, slot_ptr, position_ptr, cos_ptr, sin_ptr, slot_stride,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, ROPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, group of BH heads): rotates in place, and stores the heads that are keys or values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    i = tl.arange(0, HALF)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = token * (H + 2 * K) * E + head[:, None] * E + i[None, :]
    mask = (head < H + 2 * K)[:, None] & (i < E // 2)[None, :]
    a = tl.load(qkv_ptr + at, mask=mask, other=0.0)
    b = tl.load(qkv_ptr + at + E // 2, mask=mask, other=0.0)
    if ROPE:
        position = tl.load(position_ptr + token)
        cos = tl.load(cos_ptr + position * (E // 2) + i, mask=i < E // 2, other=0.0)[None, :]
        sin = tl.load(sin_ptr + position * (E // 2) + i, mask=i < E // 2, other=0.0)[None, :]
        turns = (head < H + K)[:, None]
        x, y = a.to(tl.float32), b.to(tl.float32)
        a = tl.where(turns, (x * cos - y * sin).to(a.dtype), a)
        b = tl.where(turns, (y * cos + x * sin).to(b.dtype), b)
        tl.store(qkv_ptr + at, a, mask=mask & turns)
        tl.store(qkv_ptr + at + E // 2, b, mask=mask & turns)
    slot = tl.load(slot_ptr + token)
    mask &= slot >= 0
    to_k = slot * slot_stride + (head - H)[:, None] * E + i[None, :]
    is_k = mask & ((head >= H) & (head < H + K))[:, None]
    tl.store(k_ptr + to_k, a, mask=is_k)
    tl.store(k_ptr + to_k + E // 2, b, mask=is_k)
    is_v = mask & (head >= H + K)[:, None]
    tl.store(v_ptr + to_k - K * E, a, mask=is_v)
    tl.store(v_ptr + to_k - K * E + E // 2, b, mask=is_v)


def rotate_and_store_(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, how: Positions, *, n_heads: int
) -> None:
    """Rotates queries and keys in qkv [S, (H + 2 K) E] in place, and stores keys and values in the cache.

    keys and values: of one layer, [n_pages, page_size, K, E]; slot s is the token s % page_size of page s // page_size.
    slots, positions: int64 [S]; a token with slot -1 is not stored. Without rotation in `how`, only stores.
    """
    if not can_run(qkv.device):
        return eager_rotate_and_store_(qkv, keys, values, slots, positions, how, n_heads=n_heads)
    kv_heads, head_dim = keys.shape[2:]
    cos, sin = (positions if x is None else x for x in (how.cos, how.sin))
    rotary_kernel[(len(qkv), -(-(n_heads + 2 * kv_heads) // _HEADS))](
        qkv, keys, values, slots, positions, cos, sin, keys.stride(1), n_heads, kv_heads, head_dim,
        next_power_of_2(head_dim // 2), _HEADS, how.cos is not None, **launch_options(qkv.device, num_warps=2),
    )  # fmt: skip
    return None


def eager_rotate_and_store_(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, how: Positions, *, n_heads: int
) -> None:
    """The twin of `rotate_and_store_`."""
    kv_heads, head_dim = keys.shape[2:]
    qk, v = qkv.view(len(qkv), -1, head_dim).split([n_heads + kv_heads, kv_heads], dim=1)
    if how.cos is not None and how.sin is not None:
        qk.copy_(eager_rotate(qk, how.cos[positions], how.sin[positions]))
    stored = slots >= 0
    keys.flatten(0, 1)[slots[stored]] = qk[stored, n_heads:]
    values.flatten(0, 1)[slots[stored]] = v[stored]
