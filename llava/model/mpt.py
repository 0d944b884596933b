"""The MPT block: LayerNorm, attention with linear biases, GELU; no bias vectors anywhere.

Matched: MosaicML's code as LLaVA v1.0.2 ships it (llava/model/language_model/mpt).

B batch   S new tokens   T cached tokens   D dim   H heads   E head_dim
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.config import DecoderConfig
from llava.model.cache import NoCache
from llava.model.linear import Linear
from llava.model.llama import Mask
from llava.model.segments import Segments


class LayerNorm(nn.LayerNorm):
    """Without a bias vector; 16-bit values are widened inside."""

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps, bias=False)


class Alibi(nn.Module):
    """Attention with linear biases, arXiv:2108.12409: a token counts less the farther back it lies."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        assert config.alibi_bias_max is not None
        self.n_heads, self.bias_max = config.n_heads, config.alibi_bias_max

    def forward(self, pos: Tensor, length: int, dtype: torch.dtype, mask: Mask = None) -> Tensor:
        """What is added to the scores: [B or 1, H, S, T], -inf where a token may not look.

        mask [B or 1, 1, S, T], true = may look. None is causal: pos [S] or [B, S] among T = `length` slots. The last
        slot that a token sees is its own; distances count from there, so that rounding is least where it matters.
        """
        seen = mask.visible() if isinstance(mask, Segments) else mask
        slots = torch.arange(length if seen is None else seen.shape[-1], device=pos.device)
        if seen is None:
            seen = slots <= torch.atleast_2d(pos)[:, None, :, None]
        distance = slots - (slots * seen).amax(-1, keepdim=True)  # [B or 1, 1, S, T], 0 and below
        bias = self.slopes(pos.device)[:, None, None] * distance
        return bias.masked_fill_(~seen, -math.inf).to(dtype)

    def slopes(self, device: torch.device) -> Tensor:
        """[H] float32: from 2^(-max / H) to 2^-max where H is a power of two, else picked from the next power's."""
        n = 2 ** math.ceil(math.log2(self.n_heads))
        slopes = 2 ** (torch.arange(1, n + 1, device=device) * (-self.bias_max / n))
        return slopes if n == self.n_heads else torch.cat([slopes[1::2], slopes[::2]])[: self.n_heads]


class Attention(nn.Module):
    """Attention with a cache that belongs to the caller; what may be seen, and how well, is in the bias."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.limit = math.inf if config.clip_qkv is None else config.clip_qkv
        self.qkv = Linear(config.dim, 3 * config.n_heads * config.head_dim, bias=False)
        self.out = Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, pos: Tensor, bias: Tensor, cache: NoCache) -> Tensor:
        """x [B, S, D] at pos [S] or [B, S]; bias [B or 1, H, S, T]. -> [B, S, D]"""
        return self.attend(*self.heads_of(x, pos, cache), bias)

    def last(self, x: Tensor, pos: Tensor, bias: Tensor, at: Tensor, cache: NoCache) -> Tensor:
        """As `forward`, but only at place `at` [B] of each row; bias [1, H, S, T]. -> [B, 1, D]"""
        q, k, v = self.heads_of(x, pos, cache)
        q = q[torch.arange(len(q), device=q.device), :, at].unsqueeze(2)  # [B, H, 1, E]
        return self.attend(q, k, v, bias[0, :, at].transpose(0, 1).unsqueeze(2))

    def heads_of(self, x: Tensor, pos: Tensor, cache: NoCache) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] -> q [B, H, S, E] of the new tokens; k, v [B, H, T, E] of all."""
        qkv = self.qkv(x)
        if self.limit < math.inf:
            qkv = qkv.clamp(-self.limit, self.limit)
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return q, *cache.write(self.layer, pos, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """q [B, H, S, E], k and v [B, H, T, E] -> [B, S, D]"""
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with exact GELU between."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.up = Linear(config.dim, config.mlp_dim, bias=False)
        self.down = Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]"""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual. Called as Llama's block."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.attn_norm = LayerNorm(config.dim, config.eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = LayerNorm(config.dim, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, pos: Tensor, bias: Tensor, mask: Mask, cache: NoCache) -> Tensor:
        """x [B, S, D] -> [B, S, D]; the bias has taken in the mask already."""
        x = x + self.attn(self.attn_norm(x), pos, bias, cache)
        return x + self.mlp(self.mlp_norm(x))

    def last(self, x: Tensor, pos: Tensor, bias: Tensor, at: Tensor, cache: NoCache) -> Tensor:
        """As `forward` for a prompt, but only at place `at` [B] of each row. -> [B, 1, D]"""
        own = x[torch.arange(len(x), device=x.device), at].unsqueeze(1)
        own = own + self.attn.last(self.attn_norm(x), pos, bias, at, cache)
        return own + self.mlp(self.mlp_norm(own))
