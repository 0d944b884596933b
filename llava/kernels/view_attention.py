"""Attention among the tokens of each view, of which there are few, and no round number.

CLIP at 336 pixels has 577 tokens. Libraries compute tiles of 128 x 128, so they spend a fifth of the time on tokens
that do not exist. This kernel has smaller tiles, and the keys that do not fill one are computed 16 at a time.

V views   N tokens   H heads   E head_dim
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from llava.kernels.support import can_run, is_interpreted, jit, tl, triton

_FEW_VIEWS = 8  # with fewer, the tiles of a library keep the GPU as busy
_HEAD_DIMS = (16, 32, 64, 128)


@jit
def view_attention_kernel(
    qkv_ptr, y_ptr, scale, N: tl.constexpr, H: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LAST: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Computes BM tokens of one head of one view. scale: of the logits, to the base 2."""
    view, head = tl.program_id(1) // H, tl.program_id(1) % H
    row = 3 * H * E
    m, e = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, E)
    q_ptr = qkv_ptr + view.to(tl.int64) * N * row + head * E
    q = tl.load(q_ptr + m[:, None] * row + e[None, :], mask=(m < N)[:, None], other=0.0)
    if WIDEN:  # the interpreter cannot multiply bfloat16
        q = q.to(tl.float32)
    highest, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    y = tl.zeros([BM, E], tl.float32)
    for start in range(0, N // BN * BN, BN):
        n = start + tl.arange(0, BN)
        k = tl.load(q_ptr + H * E + n[None, :] * row + e[:, None])
        v = tl.load(q_ptr + 2 * H * E + n[:, None] * row + e[None, :])
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        logits = tl.dot(q, k)
        before, highest = highest, tl.maximum(highest, tl.max(logits, 1))
        weight = tl.exp2((logits - highest[:, None]) * scale)
        kept = tl.exp2((before - highest) * scale)
        total = total * kept + tl.sum(weight, 1)
        y = tl.dot(weight.to(v.dtype), v, y * kept[:, None])
    for start in range(N // BN * BN, N, LAST):
        n = start + tl.arange(0, LAST)
        k = tl.load(q_ptr + H * E + n[None, :] * row + e[:, None], mask=(n < N)[None, :], other=0.0)
        v = tl.load(q_ptr + 2 * H * E + n[:, None] * row + e[None, :], mask=(n < N)[:, None], other=0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        logits = tl.where((n < N)[None, :], tl.dot(q, k), float("-inf"))
        before, highest = highest, tl.maximum(highest, tl.max(logits, 1))
        weight = tl.exp2((logits - highest[:, None]) * scale)
        kept = tl.exp2((before - highest) * scale)
        total = total * kept + tl.sum(weight, 1)
        y = tl.dot(weight.to(v.dtype), v, y * kept[:, None])
    y_ptr += view.to(tl.int64) * N * H * E + head * E
    tl.store(y_ptr + m[:, None] * H * E + e[None, :], (y / total[:, None]).to(y_ptr.dtype.element_ty), (m < N)[:, None])


def view_attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Queries, keys and values side by side, qkv [V, N, 3 * H * E] -> [V, N, H * E]. Every token attends to all."""
    head_dim = qkv.shape[-1] // (3 * n_heads)
    if len(qkv) < _FEW_VIEWS or head_dim not in _HEAD_DIMS or qkv.element_size() != 2 or not can_run(qkv.device):
        return eager_view_attention(qkv, n_heads)
    return tiled_view_attention(qkv, n_heads)


def tiled_view_attention(qkv: Tensor, n_heads: int) -> Tensor:
    """The same by the kernel, for any number of views."""
    (n_views, n, width), side = qkv.shape, 32 if is_interpreted() else 64
    head_dim = width // (3 * n_heads)
    y = qkv.new_empty(n_views, n, width // 3)
    view_attention_kernel[(triton.cdiv(n, side), n_views * n_heads)](
        qkv.contiguous(), y, head_dim**-0.5 / math.log(2), n, n_heads, head_dim, side, side, 16, is_interpreted(),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return y


def eager_view_attention(qkv: Tensor, n_heads: int) -> Tensor:
    """The twin of `view_attention`."""
    q, k, v = qkv.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)  # [V, H, N, E]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
