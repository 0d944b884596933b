"""CLIP's image encoder, up to the layer whose features LLaVA uses. arXiv:2103.00020.

V views   N tokens (class token first)   P patches   D dim   H heads   E head_dim
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.config import VisionConfig
from llava.kernels.layer_norm import layer_norm
from llava.kernels.linear_quick_gelu import linear_quick_gelu
from llava.kernels.quick_gelu import eager_quick_gelu
from llava.kernels.support import can_run
from llava.model.linear import Linear, linear

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": eager_quick_gelu, "gelu": F.gelu}
_ALIGNED = 8  # 16-bit values in 16 bytes: rows of other lengths make a product four times as slow on a GPU


def uses_kernels(x: Tensor) -> bool:
    """Returns whether kernels compute norms and activations of x: in inference in 16 bits, where they can run."""
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
        return self.out(self.mix(x))

    def mix(self, x: Tensor) -> Tensor:
        """Everything before the output layer. x [V, N, D] -> [V, N, D]"""
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, V, H, N, E]
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return y.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Two linear layers with the configured activation in between."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.up = Linear(config.dim, config.mlp_dim)
        self.down = Linear(config.mlp_dim, config.dim)
        self.activation: Callable[[Tensor], Tensor] = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """x [V, N, D] -> [V, N, D]"""
        return self.down(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """Everything before the second layer. x [V, N, D] -> [V, N, mlp_dim]"""
        if self.activation is eager_quick_gelu and type(self.up) is Linear and uses_kernels(x):
            return linear_quick_gelu(x, self.up.weight, self.up.bias)
        return self.activation(self.up(x))


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
        patches, weight = patches.permute(0, 2, 4, 1, 3, 5), self.weight.flatten(1)
        if uses_kernels(pixels) and (missing := -weight.shape[1] % _ALIGNED):
            padded = patches.new_zeros(*patches.shape[:3], weight.shape[1] + missing)
            padded[..., :-missing].unflatten(-1, (3, p, p)).copy_(patches)
            return linear(padded.flatten(1, 2), F.pad(weight, (0, missing)))
        return linear(patches.flatten(3).flatten(1, 2), weight)


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
        if uses_kernels(patches) and self._can_fuse:
            return self._fused(patches)
        cls = self.cls.expand(len(patches), 1, -1)
        x = self.pre_norm(torch.cat([cls, patches], dim=1) + self.pos)
        for block in self.blocks:
            x = block(x)
        return x[:, self.first :]

    @property
    def _can_fuse(self) -> bool:
        """Whether the layers that add to the residual stream are ordinary ones, so that a product can do that."""
        blocks = cast(list[Block], list(self.blocks))
        return all(type(layer) is Linear for block in blocks for layer in (block.attn.out, block.mlp.down))

    def _fused(self, patches: Tensor) -> Tensor:
        """The same with fewer passes over memory: products add to the residual stream when they write their results.

        They then cannot add their biases, too. The stream lacks the sum of all biases so far, and each norm adds it.
        """
        blocks = cast(list[Block], list(self.blocks))
        x = patches.new_empty(len(patches), len(self.pos), self.pos.shape[1])
        torch.add(patches, self.pos[1:], out=x[:, 1:])
        x[:, 0] = self.cls + self.pos[0]
        x = _normed(x, self.pre_norm)
        stream = x.flatten(0, 1)
        biases = [layer.bias for block in blocks for layer in (block.attn.out, block.mlp.down)]
        lacking = torch.stack([torch.zeros_like(self.cls), *biases]).cumsum(0, dtype=torch.float32)
        for i, block in enumerate(blocks):
            y = block.attn.mix(_normed(x, block.attn_norm, lacking[2 * i]))
            stream.addmm_(y.flatten(0, 1), block.attn.out.weight.T)
            y = block.mlp.hidden(_normed(x, block.mlp_norm, lacking[2 * i + 1]))
            stream.addmm_(y.flatten(0, 1), block.mlp.down.weight.T)
        return x[:, self.first :].add_(lacking[-1])


def _normed(x: Tensor, norm: nn.LayerNorm, shift: Tensor | None = None) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps, shift)
