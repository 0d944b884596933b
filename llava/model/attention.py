"""Attention contexts: which tokens a query attends to, and where keys and values come from.

The caller builds one context per forward pass. It contains the positions of the new tokens and, depending on its
class, a cache, a mask or the boundaries of packed samples. Every block calls `context.attend`, so training, prefill and
decoding run the same block code.

| Context          | Used for                                            |
|------------------|-----------------------------------------------------|
| `CausalContext`  | whole sequences without a cache; padded training    |
| `VarlenContext`  | training on several samples packed into one row     |
| `CacheContext`   | prefill and decode steps with a dense `KVCache`     |

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

from llava.model.kv_cache import KVCache


class AttentionContext(Protocol):
    """Interface of the attention contexts that the decoder accepts."""

    @property
    def positions(self) -> Tensor:
        """Positions of the new tokens in their sequences: int64 [S] if they are the same in all rows, else [B, S]."""
        ...

    @property
    def seq_len(self) -> int:
        """Number of tokens in the longest sequence, including the new ones. Dynamic RoPE scaling depends on it."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, S, H, E], k and v [B, S, K, E] of the new tokens -> y [B, S, H, E], one vector per query."""
        ...

    def queries(self, x: Tensor) -> Tensor:
        """Selects the tokens of x [B, S, ...] that are queries: all tokens, or only the last token of each sequence."""
        ...

    def last_token_only(self) -> "AttentionContext":
        """Returns a context in which only each sequence's last token is a query; keys and values cover all tokens."""
        ...

    def with_alibi(self, slopes: Tensor, dtype: torch.dtype) -> "AttentionContext":
        """Returns a context that adds linear biases of type `dtype` to the scores. slopes: [H] float32."""
        ...

    def with_sliding_window(self, n: int) -> "AttentionContext":
        """Returns a context in which a query attends only to the last `n` tokens, its own token included."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalContext:
    """Causal attention among the new tokens, without a cache."""

    positions: Tensor  # int64 [S] or [B, S]
    seq_len: int
    mask: Tensor | None = None  # [B or 1, 1 or H, S, T], bool (True: attend) or a bias; None: causal from position 0
    last: Tensor | None = None  # int64 [B, L], indices of the last tokens of the L sequences in each row
    last_only: bool = False  # only the tokens at `last` are queries

    @classmethod
    def of(cls, x: Tensor) -> "CausalContext":
        """Returns the context for x [B, S, D], whose rows start at position 0."""
        return CausalContext(positions=torch.arange(x.shape[1], device=x.device), seq_len=x.shape[1])

    @property
    def n_slots(self) -> int:
        """T, the number of tokens that a query can attend to."""
        return self.positions.shape[-1]

    def keys_and_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, S, K, E] of the new tokens -> keys, values [B, K, T, E] of all tokens attended to."""
        return k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `AttentionContext`."""
        keys, values = self.keys_and_values(layer, k, v)
        q = self.queries(q).transpose(1, 2)
        is_causal = False
        # The `if` makes `is_causal` a bool: in torch.compile, the comparison can be a SymBool, which SDPA rejects.
        if self.mask is None and q.shape[2] > 1:
            is_causal = True
        grouped = q.shape[1] != keys.shape[1]
        y = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=self.mask, is_causal=is_causal, enable_gqa=grouped
        )
        return y.transpose(1, 2)

    def queries(self, x: Tensor) -> Tensor:
        """See `AttentionContext`."""
        return x if self.last is None or not self.last_only else _take(x, self.last)

    def last_token_only(self) -> "CausalContext":
        """See `AttentionContext`. Requires `last`. With the new context, `attend` returns [B, L, H, E]."""
        assert self.last is not None
        if self.mask is None:
            mask = decode_mask(self.last, self.n_slots)
        else:
            by_query = self.mask.expand(len(self.last), -1, -1, -1).transpose(1, 2)  # [B, S, 1 or H, T]
            mask = _take(by_query, self.last).transpose(1, 2)
        return replace(self, mask=mask, last_only=True)

    def with_alibi(self, slopes: Tensor, dtype: torch.dtype) -> "CausalContext":
        """See `AttentionContext`."""
        mask = decode_mask(self.positions, self.n_slots) if self.mask is None else self.mask
        return replace(self, mask=alibi_bias(mask, slopes, dtype))

    def with_sliding_window(self, n: int) -> "CausalContext":
        """See `AttentionContext`. Without a mask, the context stays as it is if all tokens fit into the window."""
        if self.n_slots <= n:
            return self
        mask = decode_mask(self.positions, self.n_slots) if self.mask is None else self.mask
        return replace(self, mask=within_window(mask, n))


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheContext(CausalContext):
    """Attention over a dense cache, for prefill (`mask` is None) or a decode step with one token per row.

    A decode step for several rows requires `decode_mask`; a single row that attends to the whole window needs no mask.
    """

    cache: KVCache
    window: int  # number of slots read, starting at slot 0

    @property
    def n_slots(self) -> int:
        """T, the number of tokens that a query can attend to."""
        return self.window

    def keys_and_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v [B, S, K, E] in the cache -> keys, values [B, K, T, E] of the window."""
        keys, values = self.cache.write(layer, self.positions, k, v)
        return keys[:, :, : self.window], values[:, :, : self.window]


class Segments(NamedTuple):
    """Boundaries of the samples packed into a row [1, S]."""

    cu_seqlens: Tensor  # int32 [N + 1], cumulative lengths from 0 to S; samples may be empty
    lengths: tuple[int, ...]  # sample lengths; may be () if the varlen kernel is used
    max_seqlen: int  # upper bound on the length of a sample

    def last(self) -> Tensor:
        """Index of each sample's last token, int64 [1, N]. For an empty sample, the index just before its start."""
        return self.cu_seqlens[None, 1:].long() - 1

    def mask(self) -> Tensor:
        """Returns the equivalent dense mask, bool [1, 1, S, S]: causal within each sample."""
        sample = torch.repeat_interleave(self.cu_seqlens.diff())  # [S], the sample index of each token
        index = torch.arange(len(sample), device=sample.device)
        return ((sample[:, None] == sample) & (index[:, None] >= index))[None, None]


@dataclass(frozen=True, kw_only=True, eq=False)
class VarlenContext:
    """Causal attention within each sample of a packed row (B = 1), without a cache."""

    positions: Tensor  # int64 [1, S], starting from 0 in each sample
    seq_len: int
    segments: Segments
    last_only: bool = False  # only the last token of each sample is a query
    sliding_window: int | None = None  # number of tokens that a query attends to; None: all up to its own

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `AttentionContext`."""
        if q.shape[2] != k.shape[2]:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        on_gpu = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
        return self.queries(self._kernel(q, k, v) if on_gpu else self._one_by_one(q, k, v))

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if self.sliding_window is not None and not _kernel_has_windows():
            return self._dense(q, k, v, self.sliding_window)
        cu_seqlens, max_seqlen = self.segments.cu_seqlens, self.segments.max_seqlen
        causal = _causal(self.sliding_window)
        y = varlen_attn(q[0], k[0], v[0], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **causal)
        assert isinstance(y, Tensor)
        return y[None]

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        mask = within_window(self.segments.mask(), window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        samples = zip(*(x.transpose(1, 2).split(self.segments.lengths, dim=2) for x in (q, k, v)), strict=True)
        ys = [self._attend_one(q, k, v) for q, k, v in samples]
        return torch.cat(ys, dim=2).transpose(1, 2)

    def _attend_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [1, H, L, E] of one sample -> [1, H, L, E]"""
        n, mask = q.shape[2], None
        if self.sliding_window is not None and n > self.sliding_window:
            mask = within_window(decode_mask(torch.arange(n, device=q.device), n), self.sliding_window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    def queries(self, x: Tensor) -> Tensor:
        """See `AttentionContext`."""
        return _take(x, self.segments.last()) if self.last_only else x

    def last_token_only(self) -> "VarlenContext":
        """See `AttentionContext`. With the new context, `attend` returns [1, N, H, E]."""
        return replace(self, last_only=True)

    def with_alibi(self, slopes: Tensor, dtype: torch.dtype) -> CausalContext:
        """See `AttentionContext`. The varlen kernel does not support biases, so the new context uses a dense mask."""
        mask = alibi_bias(self.segments.mask(), slopes, dtype)
        return CausalContext(positions=self.positions, seq_len=self.seq_len, mask=mask, last=self.segments.last())

    def with_sliding_window(self, n: int) -> "VarlenContext":
        """See `AttentionContext`."""
        return replace(self, sliding_window=n) if self.segments.max_seqlen > n else self


def decode_mask(positions: Tensor, n_slots: int) -> Tensor:
    """positions [B, S] or [S] -> mask [B or 1, 1, S, T], True for slots up to and including each position."""
    return torch.arange(n_slots, device=positions.device) <= torch.atleast_2d(positions)[:, None, :, None]


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


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, ...], index [B, L] -> [B, L, ...]"""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def _causal(sliding_window: int | None) -> dict[str, Any]:
    """Returns the `varlen_attn` keyword argument for causal attention; its name changed after torch 2.10."""
    if not _kernel_has_windows():
        return {"is_causal": True}
    return {"window_size": (-1 if sliding_window is None else sliding_window - 1, 0)}


@cache
def _kernel_has_windows() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "is_causal" not in inspect.signature(varlen_attn).parameters
