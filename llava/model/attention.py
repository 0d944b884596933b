"""Attention contexts: which tokens a query attends to, and where keys and values come from.

The caller builds one context per forward pass. It contains the positions of the new tokens and, depending on its
class, a cache or the boundaries of packed samples. The decoder calls `with_scores` once per forward pass, and every
block calls `attend`, so training, prefill and decoding run the same block code.

| Context            | Used for                                            |
|--------------------|-----------------------------------------------------|
| `CausalContext`    | whole sequences without a cache; padded training    |
| `VarlenContext`    | several samples packed into one row                 |
| `PagedContext`     | steps of the engine, over a `PagedCache`            |
| `InvariantContext` | the same, with results that ignore the batch        |

B batch   S new tokens   T tokens attended to   N packed samples   D dim
H query heads   K key/value heads   E head_dim
"""

import inspect
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionContext(Protocol):
    """Interface of the attention contexts that the decoder accepts."""

    @property
    def positions(self) -> Tensor:
        """Positions of the new tokens in their sequences: int64 [S] if they are the same in all rows, else [B, S]."""
        ...

    @property
    def seq_len(self) -> int | Tensor:
        """Number of tokens in the sequence that each new token belongs to, including the new ones.

        An int if it is the same for all tokens, else int64 of the shape of `positions`. Only dynamic RoPE scaling
        depends on it.
        """
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, S, H, E], k and v [B, S, K, E] of the new tokens -> y [B, S, H, E]"""
        ...

    def with_scores(
        self, *, sliding_window: int | None = None, alibi_slopes: Tensor | None = None, dtype: torch.dtype
    ) -> "AttentionContext":
        """Returns the context that a decoder's blocks use; called once per forward pass, before `attend`.

        sliding_window: a query attends only to this many tokens, its own token included; None: to all up to its own.
        alibi_slopes: [H] float32, slopes of the linear biases added to the scores. dtype: type of these biases.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalContext:
    """Causal attention among the new tokens of rows that start at position 0, without a cache."""

    positions: Tensor  # int64 [S] or [B, S]
    seq_len: int | Tensor
    bias: Tensor | None = None  # [1, 1 or H, S, S], set by `with_scores`; None: plain causal attention

    @classmethod
    def of(cls, x: Tensor) -> "CausalContext":
        """Returns the context for x [B, S, D], whose rows start at position 0."""
        return CausalContext(positions=torch.arange(x.shape[1], device=x.device), seq_len=x.shape[1])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `AttentionContext`."""
        return attention(q, k.transpose(1, 2), v.transpose(1, 2), self.bias)

    def with_scores(
        self, *, sliding_window: int | None = None, alibi_slopes: Tensor | None = None, dtype: torch.dtype
    ) -> "CausalContext":
        """See `AttentionContext`."""
        n = self.positions.shape[-1]
        if alibi_slopes is None and (sliding_window is None or sliding_window >= n):
            return self
        return replace(self, bias=score_bias(_causal_mask(n, self.positions), sliding_window, alibi_slopes, dtype))


class Segments(NamedTuple):
    """Boundaries of the samples packed into a row [1, S]."""

    cu_seqlens: Tensor  # int32 [N + 1], cumulative lengths from 0 to S; samples may be empty
    lengths: tuple[int, ...]  # sample lengths; may be () if the varlen kernel is used
    max_seqlen: int  # upper bound on the length of a sample

    def mask(self, n: int) -> Tensor:
        """Returns the equivalent dense mask of a row of n tokens, bool [1, 1, n, n]: causal within each sample."""
        sample = torch.repeat_interleave(self.cu_seqlens.diff(), output_size=n)  # [S], the sample index of each token
        return _causal_mask(n, sample) & (sample[:, None] == sample)


@dataclass(frozen=True, kw_only=True, eq=False)
class VarlenContext:
    """Causal attention within each sample of a packed row (B = 1), without a cache."""

    positions: Tensor  # int64 [1, S], starting from 0 in each sample
    seq_len: int | Tensor
    segments: Segments
    sliding_window: int | None = None  # set by `with_scores`, like `bias`
    bias: Tensor | None = None  # [1, 1 or H, L, L] for the longest sample; shorter ones use its top left corner

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `AttentionContext`."""
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return self._kernel(q, k, v)
        samples = zip(*(x.split(self.segments.lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([self._attend_one(q, k, v) for q, k, v in samples], dim=1)

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds, longest = self.segments.cu_seqlens, self.segments.max_seqlen
        return varlen_attention(q[0], k[0], v[0], (bounds, bounds), (longest, longest), self.sliding_window)[None]

    def _attend_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, L, H, E], k and v [1, L, K, E] of one sample -> [1, L, H, E]"""
        n = q.shape[1]
        bias = None if self.bias is None else self.bias[..., :n, :n]
        return attention(q, k.transpose(1, 2), v.transpose(1, 2), bias)

    def with_scores(
        self, *, sliding_window: int | None = None, alibi_slopes: Tensor | None = None, dtype: torch.dtype
    ) -> "VarlenContext | CausalContext":
        """See `AttentionContext`. What the varlen kernel does not support becomes a dense bias over the whole row."""
        if alibi_slopes is None and (sliding_window is None or sliding_window >= self.segments.max_seqlen):
            return self
        if self.positions.is_cuda and (alibi_slopes is not None or not kernel_has_windows()):
            mask = self.segments.mask(self.positions.shape[-1])
            bias = score_bias(mask, sliding_window, alibi_slopes, dtype)
            return CausalContext(positions=self.positions, seq_len=self.seq_len, bias=bias)
        if not self.segments.lengths:  # only the varlen kernel is used, which has windows
            return replace(self, sliding_window=sliding_window)
        mask = _causal_mask(max(self.segments.lengths), self.positions)
        bias = score_bias(mask, sliding_window, alibi_slopes, dtype)
        return replace(self, sliding_window=sliding_window, bias=bias)


def attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Scaled dot-product attention: q [B, S, H, E], keys and values [B, K, T, E] -> [B, S, H, E].

    bias: [B or 1, 1 or H, S, T], added to the scores. None: causal attention if S = T; a single token attends to all T.
    """
    is_causal = False
    # The `if` makes `is_causal` a bool: in torch.compile, the comparison can be a SymBool, which SDPA rejects.
    if bias is None and q.shape[1] > 1:
        is_causal = True
    grouped = q.shape[2] != keys.shape[1]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=bias, is_causal=is_causal, enable_gqa=grouped
    )
    return y.transpose(1, 2)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[Tensor, Tensor], max_seqlen: tuple[int, int], window: int | None
) -> Tensor:
    """Causal attention of samples in a packed row, by PyTorch's kernel for GPUs: q [S, H, E], k and v [T, K, E] -> q's.

    cu_seqlens: of queries and of keys, int32 [N + 1]. A sample's last query attends to all of its keys.
    """
    from torch.nn.attention.varlen import varlen_attn

    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    y = varlen_attn(q, k, v, *cu_seqlens, *max_seqlen, **_causal(window))
    assert isinstance(y, Tensor)
    return y


def decode_mask(positions: Tensor, n_slots: int) -> Tensor:
    """positions [B, S] or [S] -> mask [B or 1, 1, S, T], True for slots up to and including each position."""
    return torch.arange(n_slots, device=positions.device) <= torch.atleast_2d(positions)[:, None, :, None]


def score_bias(mask: Tensor, sliding_window: int | None, alibi_slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns what to add to the scores: mask [B or 1, 1, S, T] (True: attend) -> [B or 1, 1 or H, S, T].

    The bias is -inf where the mask is False or the slot is outside the window. Attention would convert a bool mask to
    this form in each layer.
    """
    if sliding_window is not None:
        mask = within_window(mask, sliding_window)
    if alibi_slopes is not None:
        return alibi_bias(mask, alibi_slopes, dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def alibi_bias(mask: Tensor, slopes: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ALiBi biases, arXiv:2108.12409, which lower scores in proportion to the distance from query to key.

    mask [B or 1, 1, S, T] (True: attend), slopes [H] float32 -> bias [B or 1, H, S, T], -inf where the mask is False.
    Distances are measured from the query's own token, the last one it attends to, so that the biases of nearby tokens
    are small and lose little precision in 16-bit types.
    """
    slots = torch.arange(mask.shape[-1], device=mask.device)
    distance = slots - (slots * mask).amax(-1, keepdim=True)  # [B or 1, 1, S, T], <= 0 where the mask is True
    bias = slopes[:, None, None] * distance
    return bias.masked_fill_(~mask, -math.inf).to(dtype)


def within_window(mask: Tensor, n: int) -> Tensor:
    """mask [B or 1, 1, S, T] (True: attend) -> mask of the same shape, True only for the last `n` slots of each query.

    The slots are counted back from the query's own token, the last one that it attends to.
    """
    slots = torch.arange(mask.shape[-1], device=mask.device)
    return mask & (slots > (slots * mask).amax(-1, keepdim=True) - n)


def _causal_mask(n: int, like: Tensor) -> Tensor:
    """Returns the mask [1, 1, n, n] of n tokens that start at position 0, on the device of `like`."""
    return decode_mask(torch.arange(n, device=like.device), n)


def _causal(sliding_window: int | None) -> dict[str, Any]:
    """Returns the `varlen_attn` keyword argument for causal attention; its name changed after torch 2.10."""
    if not kernel_has_windows():
        return {"is_causal": True}
    return {"window_size": (-1 if sliding_window is None else sliding_window - 1, 0)}


@cache
def kernel_has_windows() -> bool:
    """Returns whether this version's `varlen_attn` has sliding windows."""
    from torch.nn.attention.varlen import varlen_attn

    return "is_causal" not in inspect.signature(varlen_attn).parameters
