"""The MPT block: LayerNorm, attention with linear biases (ALiBi) and a GELU MLP, all without bias vectors.

Matches MosaicML's code as shipped with LLaVA v1.0.2 (llava/model/language_model/mpt).

B batch   S new tokens   D dim   H heads   E head_dim
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.config import DecoderConfig
from llava.model.attention import AttentionContext
from llava.model.linear import Linear


class LayerNorm(nn.LayerNorm):
    """LayerNorm without a bias vector. PyTorch computes it in float32 for 16-bit inputs."""

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps, bias=False)


class Alibi(nn.Module):
    """Attention with linear biases (ALiBi, arXiv:2108.12409), used instead of position embeddings."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        assert config.alibi_bias_max is not None
        self.n_heads, self.bias_max = config.n_heads, config.alibi_bias_max

    def forward(self, context: AttentionContext, dtype: torch.dtype) -> tuple[None, AttentionContext]:
        """Returns None (ALiBi has no rotary embedding), and a context that adds the biases to the attention scores."""
        return None, context.with_scores(alibi_slopes=self.slopes(context.positions.device), dtype=dtype)

    def slopes(self, device: torch.device) -> Tensor:
        """Returns the slopes [H], float32: 2^(-bias_max * i / H) for i = 1, …, H.

        If H is not a power of two, selects H of the slopes for the next larger power of two: first even i, then odd i.
        """
        n = 2 ** math.ceil(math.log2(self.n_heads))
        slopes = 2 ** (torch.arange(1, n + 1, device=device) * (-self.bias_max / n))
        return slopes if n == self.n_heads else torch.cat([slopes[1::2], slopes[::2]])[: self.n_heads]


class Attention(nn.Module):
    """Multi-head attention. The context's bias encodes both the causal mask and ALiBi."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.limit = math.inf if config.clip_qkv is None else config.clip_qkv
        self.qkv = Linear(config.dim, 3 * config.n_heads * config.head_dim, bias=False)
        self.out = Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """x [B, S, D] -> [B, S, D]"""
        qkv = self.qkv(x)
        if self.limit < math.inf:
            qkv = qkv.clamp(-self.limit, self.limit)
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(-3)  # [B, S, H, E] each
        return self.out(context.attend(self.layer, q, k, v).flatten(-2))


class MLP(nn.Module):
    """Two linear layers with an exact GELU in between."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.up = Linear(config.dim, config.mlp_dim, bias=False)
        self.down = Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]"""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection. Same interface as the Llama block."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.attn_norm = LayerNorm(config.dim, config.eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = LayerNorm(config.dim, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: None, context: AttentionContext, select: Tensor | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D], or [L, D] for the tokens of the flattened x at the indices `select` [L].

        MPT does not use `rope`.
        """
        x = x + self.attn(self.attn_norm(x), context)
        if select is not None:
            x = x.flatten(0, 1)[select]
        return x + self.mlp(self.mlp_norm(x))
