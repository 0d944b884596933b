"""The decoder's forward pass for inference on a GPU, in few kernels. It shares the weights of a `Decoder`.

Computes what `Decoder.forward` computes, up to rounding: norms, rotations and activations are part of the kernels
beside them, and are not rounded in between. Only for plain weights in 16 bits; `why_not` says what else is in the way.

S new tokens, one packed row   R decoding rows, first in it   D dim   H query heads   K key/value heads   E head_dim
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llava.config import DecoderConfig
from llava.kernels.attend import Positions, RowPages, Scratch
from llava.kernels.fused_linear import Activation, Norm, fused_linear
from llava.kernels.paged_attention import paged_attention
from llava.kernels.rotary import rotate_and_store_
from llava.model import llama, mpt
from llava.model.attention import attention, kernel_has_windows, varlen_attention
from llava.model.decoder import Decoder
from llava.model.linear import Linear
from llava.model.paged import Chunk, PagedCache, with_bias

Attend = Callable[[int, Tensor], Tensor]  # layer, qkv [S, (H + 2 K) E] before the rotation -> y [S, H E]


class Layer(NamedTuple):
    """The weights of a block."""

    attn_norm: Norm
    qkv: Tensor
    clip: float | None
    out: Tensor
    mlp_norm: Norm
    up: Tensor
    gate: Tensor | None
    activation: Activation
    down: Tensor


class FusedDecoder:
    """Blocks, final norm and head of a decoder."""

    def __init__(self, decoder: Decoder, config: DecoderConfig):
        self.config = config
        self.layers = [_layer(block) for block in decoder.blocks]
        self.norm, self.head = _norm(decoder.norm), decoder.head.weight.detach()
        self.how = _positions(decoder, config)

    def __call__(self, x: Tensor, attend: Attend, select: Tensor | None = None) -> Tensor:
        """x [S, D] -> states [S, D] before the final norm, or [L, D] of the tokens at the indices `select` [L]."""
        for i, layer in enumerate(self.layers):
            qkv = fused_linear(x, layer.qkv, norm=layer.attn_norm, clip=layer.clip)
            y = attend(i, qkv)
            if select is not None and i == len(self.layers) - 1:
                x, y = x[select], y[select]
            x = fused_linear(y, layer.out, residual=x)
            y = fused_linear(x, layer.up, norm=layer.mlp_norm, gate=layer.gate, activation=layer.activation)
            x = fused_linear(y, layer.down, residual=x)
        return x

    def can_pack(self, x: Tensor) -> bool:
        """Returns whether one kernel attends with all chunks of a packed row x: on a GPU, without biases."""
        windows = self.how.window is None or kernel_has_windows()
        return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and self.how.slopes is None and windows

    def logits(self, x: Tensor) -> Tensor:
        """x [S, D] before the final norm -> logits [S, V] float32"""
        return fused_linear(x, self.head, norm=self.norm, out=x.new_empty(len(x), len(self.head), dtype=torch.float32))


def why_not(decoder: Decoder, config: DecoderConfig) -> str | None:
    """Returns why a decoder cannot be fused, or None if it can."""
    weight = decoder.norm.weight
    if weight.is_cuda and weight.dtype not in (torch.bfloat16, torch.float16):
        return "its weights are not in bfloat16 or float16"
    layers = [decoder.head, *(layer for block in decoder.blocks for layer in _linear_layers(block))]
    if not all(type(one) is Linear and one.bias is None for one in layers):
        return "its linear layers have adapters or are quantized"
    if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
        return "its rotation depends on the length of the sequence"
    return None


def _linear_layers(block: torch.nn.Module) -> list[torch.nn.Module]:
    assert isinstance(block, llama.Block | mpt.Block)
    gate = [block.mlp.gate] if isinstance(block, llama.Block) else []
    return [block.attn.qkv, block.attn.out, *gate, block.mlp.up, block.mlp.down]


def _layer(block: torch.nn.Module) -> Layer:
    if isinstance(block, llama.Block):
        gate, activation, clip = block.mlp.gate.weight.detach(), "silu", None
    else:
        assert isinstance(block, mpt.Block)
        gate, activation, clip = None, "gelu", block.attn.limit
    return Layer(
        attn_norm=_norm(block.attn_norm),
        qkv=block.attn.qkv.weight.detach(),
        clip=clip if clip is not None and clip < torch.inf else None,
        out=block.attn.out.weight.detach(),
        mlp_norm=_norm(block.mlp_norm),
        up=block.mlp.up.weight.detach(),
        gate=gate,
        activation=activation,  # type: ignore[arg-type]
        down=block.mlp.down.weight.detach(),
    )


def _norm(norm: torch.nn.Module) -> Norm:
    assert isinstance(norm, llama.RMSNorm | mpt.LayerNorm)
    return Norm("rms" if isinstance(norm, llama.RMSNorm) else "layer", norm.weight.detach(), norm.eps)


def _positions(decoder: Decoder, config: DecoderConfig) -> Positions:
    device = decoder.norm.weight.device
    positions = decoder.positions
    if isinstance(positions, mpt.Alibi):
        return Positions(slopes=positions.slopes(device))
    frequencies = positions.frequencies(config.max_seq, device)
    angles = torch.arange(config.max_seq, device=device).float()[:, None] * frequencies
    return Positions(cos=angles.cos(), sin=angles.sin(), window=config.sliding_window)


@dataclass(frozen=True, eq=False, kw_only=True)
class RowAttention:
    """Attention of decoding rows, one new token each."""

    decoder: FusedDecoder
    cache: PagedCache
    tables: Tensor  # int32 [R, P]; may have more rows than there are
    positions: Tensor  # int32 [R], of the new tokens; -1: the row only fills the batch
    max_tokens: int  # no row has more
    scratch: Scratch
    shared: Tensor | None = None  # with how many tokens the rows of each group begin alike; see `paged_attention`

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv [R, (H + 2 K) E] -> y [R, H E]. Stores the new keys and values."""
        n, cache = len(qkv), self.cache
        return paged_attention(
            qkv,
            RowPages(cache.k[layer], cache.v[layer], self.tables[:n], self.positions[:n]),
            self.decoder.how,
            self.scratch,
            n_heads=self.decoder.config.n_heads,
            max_tokens=self.max_tokens,
            shared=self.shared,
        )


class PackedChunks(NamedTuple):
    """Chunks of prompts in a packed row, and the tokens they attend to, for the kernel that takes them all together."""

    cu_seqlens: tuple[Tensor, Tensor]  # int32 [N + 1] each, cumulative numbers of new tokens and of those attended to
    max_seqlen: tuple[int, int]
    past: Tensor | None  # int64 [T], slots of the tokens attended to; None: no chunk has earlier tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedAttention:
    """Attention of a packed row: decoding rows, then chunks of prompts."""

    decoder: FusedDecoder
    cache: PagedCache
    slots: Tensor  # int64 [S - R], where the keys and values of the chunks are stored; -1: nowhere
    positions: Tensor  # int64 [S - R]
    chunks: Sequence[Chunk]  # one by one; their indices count from the first token that is no row
    packed: PackedChunks | None = None  # all together; None: one by one
    n_rows: int = 0
    rows: RowAttention | None = None

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv [S, (H + 2 K) E] -> y [S, H E]. Stores the new keys and values."""
        config, new = self.decoder.config, qkv[self.n_rows :]
        keys, values = self.cache.k[layer], self.cache.v[layer]
        rotate_and_store_(new, keys, values, self.slots, self.positions, self.decoder.how, n_heads=config.n_heads)
        heads = [config.n_heads, config.n_kv_heads, config.n_kv_heads]
        q, k, v = new.unflatten(-1, (-1, config.head_dim)).split(heads, dim=1)
        y = self._attend(layer, q, k, v).flatten(1)
        return y if self.rows is None else torch.cat([self.rows(layer, qkv[: self.n_rows]), y])

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [S - R, H, E], k and v [S - R, K, E] -> [S - R, H, E]"""
        if self.packed is not None:
            if (past := self.packed.past) is not None:
                k, v = (x[layer].flatten(0, 1).index_select(0, past) for x in (self.cache.k, self.cache.v))
            window = self.decoder.config.sliding_window
            return varlen_attention(q, k, v, self.packed.cu_seqlens, self.packed.max_seqlen, window)
        parts = []
        for one in self.chunks:
            new_k, new_v = k[None, one.tokens], v[None, one.tokens]
            past_k, past_v = self.cache.past(layer, one) if one.position else (new_k, new_v)
            y = attention(q[None, one.tokens], past_k.transpose(1, 2), past_v.transpose(1, 2), one.bias)
            parts.append(y[0])
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def with_biases(decoder: FusedDecoder, chunks: Sequence[Chunk], dtype: torch.dtype) -> list[Chunk]:
    """Returns the chunks with the biases that attention one by one needs."""
    how, found = decoder.how, []
    for one in chunks:
        plain = one.position == 0 and how.slopes is None and (how.window is None or one.n <= how.window)
        found.append(one if plain else with_bias(one, how.window, how.slopes, dtype))
    return found
