"""The Llama-2 block: RMSNorm, rotary positions, grouped-query attention, SwiGLU. arXiv:2307.09288.

B batch   S new tokens   D dim   H query heads   K key/value heads   E head_dim
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.config import DecoderConfig, RopeScaling
from llava.model.attention import AttentionContext
from llava.model.linear import Linear

Rotation = tuple[Tensor, Tensor]  # cosines and sines of the rotary angles, each [..., S, 1, E]; see `rotate`


class RMSNorm(nn.Module):
    """Root-mean-square norm. As in transformers, normalizes in float32 and casts back before applying the weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]"""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class Rope(nn.Module):
    """Rotary position embeddings, arXiv:2104.09864, in the half-split layout of Hugging Face checkpoints."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        assert config.rope_theta is not None
        self.head_dim, self.theta, self.scaling = config.head_dim, config.rope_theta, config.rope_scaling
        self.sliding_window = config.sliding_window

    def forward(self, context: AttentionContext, dtype: torch.dtype) -> tuple[Rotation, AttentionContext]:
        """Returns the rotation of the new tokens in `dtype` (angles computed in float32), and the context.

        If the config has a sliding window (Mistral, arXiv:2310.06825), the context is limited to it.
        """
        context = context.with_scores(sliding_window=self.sliding_window, dtype=dtype)
        angles = context.positions[..., None].float() * self.frequencies(context.seq_len, context.positions.device)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return (torch.cat([cos, cos], -1).unsqueeze(-2), torch.cat([-sin, sin], -1).unsqueeze(-2)), context

    def frequencies(self, seq_len: int | Tensor, device: torch.device) -> Tensor:
        """Returns the frequencies in radians per token, float32, for sequences of `seq_len` tokens.

        The result is [E/2]; with dynamic scaling and a tensor `seq_len` [...], it is [..., E/2].
        """
        scaling = self.scaling
        theta = self._dynamic_theta(seq_len, device) if scaling and scaling.kind == "dynamic" else self.theta
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=device).float() / self.head_dim
        frequencies = 1.0 / (theta**exponents)
        if scaling and scaling.kind == "linear":
            return frequencies / scaling.factor
        return _llama3(frequencies, scaling) if scaling and scaling.kind == "llama3" else frequencies

    def _dynamic_theta(self, seq_len: int | Tensor, device: torch.device) -> Tensor:
        """Dynamic NTK scaling: seq_len [...] -> theta [..., 1] float32, larger for sequences beyond `original_max_seq`.

        An int becomes a tensor, so that it gives the same values as the same length in a tensor.
        """
        assert self.scaling is not None
        if not isinstance(seq_len, Tensor):
            seq_len = torch.full((), seq_len, device=device)
        factor, relative = self.scaling.factor, seq_len.float() / self.scaling.original_max_seq
        stretch = (factor * relative - (factor - 1)).clamp(min=1)
        return (self.theta * stretch ** (self.head_dim / (self.head_dim - 2)))[..., None]


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1, arXiv:2407.21783: divides low frequencies by a factor, keeps high ones and interpolates in between."""
    turns = scaling.original_max_seq * frequencies / (2 * math.pi)  # full rotations within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * unscaled + frequencies / scaling.factor * (1 - unscaled)


def rotate(x: Tensor, rope: Rotation) -> Tensor:
    """x [B, S, H, E] -> [B, S, H, E]: rotates each pair of components (i, i + E/2) by its angle.

    Component i becomes x[i] cos - x[i + E/2] sin, and component i + E/2 becomes x[i + E/2] cos + x[i] sin. `rope`
    contains each cosine twice, and each sine first with a minus sign, because few wide operations are faster.
    """
    cos, sin = rope  # float32 in mixed-precision training even if x is 16-bit, hence the cast below
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.rotated = [config.n_heads + config.n_kv_heads, config.n_kv_heads]
        self.heads = [config.n_heads, config.n_kv_heads]
        self.qkv = Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim, bias=False)
        self.out = Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Rotation, context: AttentionContext) -> Tensor:
        """x [B, S, D] -> [B, S, D]. `context` holds any cache and determines which tokens a query attends to."""
        qk, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.rotated, dim=-2)  # [B, S, H + K | K, E]
        q, k = rotate(qk, rope).split(self.heads, dim=-2)  # [B, S, H | K, E]
        y = context.attend(self.layer, q, k, v)  # [B, S, H, E]
        return self.out(y.flatten(-2))


class MLP(nn.Module):
    """Gated feed-forward layer with SiLU activation (SwiGLU)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate = Linear(config.dim, config.mlp_dim, bias=False)
        self.up = Linear(config.dim, config.mlp_dim, bias=False)
        self.down = Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]"""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and MLP, each preceded by a norm and wrapped in a residual connection."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.dim, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rotation, context: AttentionContext, select: Tensor | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D], or [L, D] for the tokens of the flattened x at the indices `select` [L]."""
        x = x + self.attn(self.attn_norm(x), rope, context)
        if select is not None:
            x = x.flatten(0, 1)[select]
        return x + self.mlp(self.mlp_norm(x))
