"""CLIP's image encoder, up to the layer whose features LLaVA uses. arXiv:2103.00020.

V views   N tokens (class token first)   P patches   D dim   H heads   E head_dim
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.config import VisionConfig
from llava.kernels.layer_norm import add_layer_norm, layer_norm
from llava.kernels.quick_gelu import eager_quick_gelu, quick_gelu
from llava.kernels.support import can_run
from llava.model.linear import Linear, linear


def _quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return quick_gelu(x) if uses_kernels(x) else eager_quick_gelu(x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": F.gelu}


def uses_kernels(x: Tensor) -> bool:
    """Returns whether kernels compute norms, sums and activations of x: in inference in 16 bits, where they can run."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return False
    return x.dtype in (torch.bfloat16, torch.float16) and can_run(x.device)


class Attention(nn.Module):
    """Bidirectional self-attention."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.out = Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [V, N, D] -> [V, N, D]"""
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, V, H, N, E]
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with the configured activation in between."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.up = Linear(config.dim, config.mlp_dim)
        self.down = Linear(config.mlp_dim, config.dim)
        self.activation: Callable[[Tensor], Tensor] = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """x [V, N, D] -> [V, N, D]"""
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.dim, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """x [V, N, D] -> [V, N, D]"""
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Patch(nn.Module):
    """Patch embedding: a linear layer applied to each patch; the weight has the shape of CLIP's convolution kernel."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.size = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.dim, 3, self.size, self.size))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [V, 3, height, width] -> [V, P, D], patches in row-major order.

        Incomplete patches at the right and bottom edges are dropped.
        """
        p = self.size
        rows, cols = pixels.shape[2] // p, pixels.shape[3] // p
        whole = pixels[:, :, : rows * p, : cols * p]
        patches = whole.unflatten(3, (cols, p)).unflatten(2, (rows, p))  # [V, 3, rows, p, cols, p]
        return linear(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), self.weight.flatten(1))


class Vision(nn.Module):
    """The vision tower. Blocks after the selected layer are not built."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch = Patch(config)
        self.cls = nn.Parameter(torch.empty(config.dim))
        self.pos = nn.Parameter(torch.empty(config.grid**2 + 1, config.dim))
        self.pre_norm = nn.LayerNorm(config.dim, config.eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.first = 0 if config.select_feature == "cls_patch" else 1

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [V, 3, size, size] -> features [V, P or P + 1, D] of the selected layer"""
        patches = self.patch(pixels)
        cls = self.cls.expand(len(patches), 1, -1)
        x = self.pre_norm(torch.cat([cls, patches], dim=1) + self.pos)
        if self.blocks and uses_kernels(x):
            return self._fused(x)[:, self.first :]
        for block in self.blocks:
            x = block(x)
        return x[:, self.first :]

    def _fused(self, x: Tensor) -> Tensor:
        """Runs the blocks on x [V, N, D], each residual sum in one kernel with the norm that follows it."""
        blocks = cast(list[Block], list(self.blocks))
        norms = [norm for block in blocks for norm in (block.attn_norm, block.mlp_norm)]
        layers: list[nn.Module] = [layer for block in blocks for layer in (block.attn, block.mlp)]
        y = layers[0](layer_norm(x, norms[0].weight, norms[0].bias, norms[0].eps))
        for norm, layer in zip(norms[1:], layers[1:], strict=True):
            x, normed = add_layer_norm(x, y, norm.weight, norm.bias, norm.eps)
            y = layer(normed)
        return x + y
