"""Computes each token independently of the rest of the batch, so that its logits are bit-identical.

The libraries choose the order of additions by the shapes of a product, so a row's result changes with the number of
rows beside it. Here, all products have fixed shapes: rows are computed in tiles of `_ROWS`, padded with zeros, and each
query reads the cache in blocks of `_SLOTS`. Activation functions and powers are padded too, because the last elements
of a tensor are computed by other instructions if they do not fill a vector register. Nothing else in the decoder mixes
rows.

S new tokens   N tokens of a tile   T tokens attended to   H query heads   K key/value heads   E head_dim
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llava.model.attention import decode_mask, score_bias
from llava.model.paged import Chunk, Observer, PagedCache, observe_chunks, with_bias

_ROWS = 32  # rows of a tile in a linear layer
_TOKENS = 8  # queries of a tile in attention
_SLOTS = 64  # cache slots of a block in attention
_REGISTERS = 64  # elements, a multiple of what any vector register holds
_PIECE = 2**15  # elements of an elementwise operation that PyTorch does not divide among threads


class BatchInvariant(TorchFunctionMode):
    """While active, computes linear layers in tiles, and activation functions and powers in whole vector registers."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear:
            return _tiled(lambda x: F.linear(x, *args[1:], **(kwargs or {})), args[0])
        if function in (Tensor.matmul, Tensor.__matmul__) and args[1].dim() == 2:
            return _tiled(lambda x: x @ args[1], args[0])
        if function in (F.silu, F.gelu):
            return _elementwise(lambda x: function(x, *args[1:], **(kwargs or {})), args[0])
        if function in (torch.pow, Tensor.pow, Tensor.__pow__) and isinstance(args[1], Tensor):
            return _elementwise(function, *args)
        if function in (torch.pow, Tensor.pow, Tensor.__pow__):
            return _elementwise(lambda x: function(x, args[1]), args[0])
        return function(*args, **(kwargs or {}))


def round_up(n_slots: int) -> int:
    """Returns the next multiple of the block size of `InvariantContext.past`."""
    return -(-n_slots // _SLOTS) * _SLOTS


def _tiled(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """x [..., I] -> [..., O], for a function that maps each row by itself."""
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    padded = F.pad(rows, (0, 0, 0, -n % _ROWS))
    y = torch.cat([function(tile) for tile in padded.split(_ROWS)])[:n]
    return y.view(*x.shape[:-1], y.shape[-1])


def _elementwise(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Applies a function to the elements of its inputs, all of which fill vector registers thanks to padding."""
    inputs = torch.broadcast_tensors(*inputs)
    n = inputs[0].numel()
    padded = [F.pad(x.flatten(), (0, -n % _REGISTERS), value=1.0).split(_PIECE) for x in inputs]
    return torch.cat([function(*pieces) for pieces in zip(*padded, strict=True)])[:n].view(inputs[0].shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class InvariantContext:
    """Like `PagedContext`, but each token attends by itself, in blocks of fixed size. See `AttentionContext`."""

    cache: PagedCache
    positions: Tensor  # int64 [1, S]
    seq_len: int | Tensor
    slots: Tensor  # int64 [S], where the keys and values of the new tokens are stored
    past: Tensor  # int64 [S, T], the slots that each token reads, padded with own slots to a multiple of `_SLOTS`
    bias: Tensor | None = None  # [S, 1 or H, 1, T], set by `with_scores`
    watched: Sequence[Chunk] = ()  # see `PagedContext`
    observe: Observer | None = None

    def with_scores(
        self, *, sliding_window: int | None = None, alibi_slopes: Tensor | None = None, dtype: torch.dtype
    ) -> "InvariantContext":
        """See `AttentionContext`."""
        mask = decode_mask(self.positions.T, self.past.shape[1])
        bias = score_bias(mask, sliding_window, alibi_slopes, torch.float32)
        watched = [with_bias(one, sliding_window, alibi_slopes, dtype) for one in self.watched]
        return replace(self, bias=bias, watched=watched)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, S, H, E], k and v [1, S, K, E] -> y [1, S, H, E]. See `AttentionContext`."""
        assert self.bias is not None
        self.cache.write(layer, self.slots, k[0], v[0])
        bias = self.bias.expand(-1, q.shape[2], -1, -1)
        tiles = zip(q[0].split(_TOKENS), self.past.split(_TOKENS), bias.split(_TOKENS), strict=True)
        y = torch.cat([self._tile(layer, *tile) for tile in tiles])
        observe_chunks(self.cache, self.watched, self.observe, layer, q)
        return y[None]

    def _tile(self, layer: int, q: Tensor, past: Tensor, bias: Tensor) -> Tensor:
        """q [N, H, E], past [N, T], bias [N, H, 1, T] -> [N, H, E], with a softmax that is updated block by block."""
        n, missing = len(q), _TOKENS - len(q)
        q32 = F.pad(q.float() * q.shape[-1] ** -0.5, (0, 0, 0, 0, 0, missing))[:, :, None]  # [N, H, 1, E]
        past, bias = F.pad(past, (0, 0, 0, missing)), F.pad(bias, (0, 0, 0, 0, 0, 0, 0, missing))
        highest = q32.new_full((*q32.shape[:3], 1), -1e30)
        total, y = torch.zeros_like(highest), torch.zeros_like(q32)
        for slots, block_bias in zip(past.split(_SLOTS, dim=1), bias.split(_SLOTS, dim=-1), strict=True):
            k, v = self._read(layer, slots, q.shape[1])
            scores = torch.bmm(q32.flatten(0, 1), k.flatten(0, 1).mT).view(block_bias.shape) + block_bias
            new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
            p, scale = (scores - new_highest).exp(), (highest - new_highest).exp()
            total = total * scale + p.sum(-1, keepdim=True)
            y = y * scale + torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).view(y.shape)
            highest = new_highest
        return (y / total)[:n, :, 0].to(q.dtype)

    def _read(self, layer: int, slots: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
        """slots [N, T] -> keys and values [N, H, T, E] float32, contiguous."""
        found = []
        for cache in (self.cache.k, self.cache.v):
            x = cache[layer].flatten(0, 1)[slots].transpose(1, 2)  # [N, K, T, E]
            found.append(x.repeat_interleave(n_heads // x.shape[1], dim=1).float().contiguous())
        return found[0], found[1]
