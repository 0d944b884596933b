"""Several samples in one row: each looks at itself alone.

S places of the row   N samples   H query heads   K key/value heads   E head_dim
"""

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Segments(NamedTuple):
    """Where the samples of a packed row [1, S] begin and end."""

    bounds: Tensor  # int32 [N + 1], from 0 to S; samples may be empty
    lengths: tuple[int, ...]  # places of each, for the way without a kernel; may be () where the kernel is used
    longest: int  # no sample has more places

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention inside each sample: q [1, H, S, E], k and v [1, K, S, E] -> [1, H, S, E]"""
        if q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return self._by_kernel(q, k, v)
        parts = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(a, b, c, is_causal=True) for a, b, c in parts], dim=2)

    def _by_kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [S, H, E]
        y = varlen_attn(q, k, v, self.bounds, self.bounds, self.longest, self.longest, **_causal())
        assert isinstance(y, Tensor)
        return y.transpose(0, 1)[None]

    def visible(self) -> Tensor:
        """Mask [1, 1, S, S], true = may look."""
        sample = torch.repeat_interleave(self.bounds.diff())  # of each place
        places = torch.arange(len(sample), device=sample.device)
        return ((sample[:, None] == sample) & (places[:, None] >= places))[None, None]


@cache
def _causal() -> dict[str, Any]:
    """The kernel's option for causal attention, which got another name after torch 2.10."""
    from torch.nn.attention.varlen import varlen_attn

    renamed = "is_causal" not in inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if renamed else {"is_causal": True}
