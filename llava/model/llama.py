"""The Llama-2 block: RMSNorm, rotary positions, grouped-query attention, SwiGLU. arXiv:2307.09288.

B batch   S new tokens   T cached tokens   D dim   H query heads   K key/value heads   E head_dim
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.config import DecoderConfig, RopeScaling
from llava.model.cache import NoCache
from llava.model.linear import Linear
from llava.model.segments import Segments

Mask = Tensor | Segments | None  # [B or 1, 1, S, T], true = may look; samples packed in a row; causal


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 and rounded before the weight, as in transformers."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]"""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Rope(nn.Module):
    """Rotary positions, arXiv:2104.09864, in the half-split layout of hub checkpoints."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        assert config.rope_theta is not None
        self.head_dim, self.theta, self.scaling = config.head_dim, config.rope_theta, config.rope_scaling

    def forward(self, pos: Tensor, length: int, dtype: torch.dtype, mask: object = None) -> tuple[Tensor, Tensor]:
        """pos [..., S] in a sequence of `length` tokens -> cos, sin [..., 1, S, E/2]; angles are float32.

        `mask` is for positions that are a bias, as MPT's.
        """
        angles = pos[..., None].float() * self.frequencies(length, pos.device)
        return angles.cos().to(dtype).unsqueeze(-3), angles.sin().to(dtype).unsqueeze(-3)

    def frequencies(self, length: int, device: torch.device) -> Tensor:
        """Radians a token, [E/2] float32."""
        theta, scaling = self.theta, self.scaling
        if scaling and scaling.kind == "dynamic" and length > scaling.original_max_seq:
            stretch = scaling.factor * length / scaling.original_max_seq - (scaling.factor - 1)
            theta *= stretch ** (self.head_dim / (self.head_dim - 2))
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=device).float() / self.head_dim
        frequencies = 1.0 / (theta**exponents)
        if scaling and scaling.kind == "linear":
            return frequencies / scaling.factor
        return _llama3(frequencies, scaling) if scaling and scaling.kind == "llama3" else frequencies


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow rotations are stretched, fast ones kept, those between mixed. Llama 3.1, arXiv:2407.21783."""
    turns = scaling.original_max_seq * frequencies / (2 * math.pi)  # within the trained context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, H, S, E] with rope's cos, sin [.., 1, S, E/2]: pairs (i, i + E/2) are turned by their angle."""
    cos, sin = rope  # wider than x where training computes in 16 bits beside a float32 residual stream
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def visible(pos: Tensor, window: int) -> Tensor:
    """pos [B] of one token a row -> mask [B, 1, 1, T]: it sees the slots up to its own."""
    return (torch.arange(window, device=pos.device) <= pos[:, None])[:, None, None]


class Attention(nn.Module):
    """Causal attention with a cache that belongs to the caller."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.grouped = config.n_kv_heads != config.n_heads
        self.rotated = [config.n_heads + config.n_kv_heads, config.n_kv_heads]
        self.heads = [config.n_heads, config.n_kv_heads]
        self.qkv = Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim, bias=False)
        self.out = Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, pos: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: NoCache) -> Tensor:
        """x [B, S, D] at pos [S] or [B, S]; mask as `Mask` says. -> [B, S, D]"""
        return self.attend(*self.heads_of(x, pos, rope, cache), mask)

    def last(self, x: Tensor, pos: Tensor, rope: tuple[Tensor, Tensor], at: Tensor, cache: NoCache) -> Tensor:
        """As `forward` with causal attention, but only at place `at` [B] of each row. -> [B, 1, D]"""
        q, k, v = self.heads_of(x, pos, rope, cache)
        q = q[torch.arange(len(q), device=q.device), :, at].unsqueeze(2)  # [B, H, 1, E]
        return self.attend(q, k, v, visible(at, k.shape[2]))

    def heads_of(
        self, x: Tensor, pos: Tensor, rope: tuple[Tensor, Tensor], cache: NoCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] -> q [B, H, S, E] of the new tokens; k, v [B, K, T, E] of all."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2K, S, E]
        qk, v = qkv.split(self.rotated, dim=1)
        q, k = rotate(qk, rope).split(self.heads, dim=1)
        return q, *cache.write(self.layer, pos, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """q [B, H, S, E], k and v [B, K, T, E] -> [B, S, D]"""
        if isinstance(mask, Segments):
            return self.out(mask.attend(q, k, v).transpose(1, 2).flatten(2))
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate = Linear(config.dim, config.mlp_dim, bias=False)
        self.up = Linear(config.dim, config.mlp_dim, bias=False)
        self.down = Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]"""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.dim, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, pos: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: NoCache) -> Tensor:
        """x [B, S, D] -> [B, S, D]; the other arguments as for Attention."""
        x = x + self.attn(self.attn_norm(x), pos, rope, mask, cache)
        return x + self.mlp(self.mlp_norm(x))

    def last(self, x: Tensor, pos: Tensor, rope: tuple[Tensor, Tensor], at: Tensor, cache: NoCache) -> Tensor:
        """As `forward` with causal attention, but only at place `at` [B] of each row. -> [B, 1, D]

        Of a prompt's other places the last block owes nothing but keys and values.
        """
        own = x[torch.arange(len(x), device=x.device), at].unsqueeze(1)
        own = own + self.attn.last(self.attn_norm(x), pos, rope, at, cache)
        return own + self.mlp(self.mlp_norm(own))
