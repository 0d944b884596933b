"""Computes each token independently of the rest of the batch, so that its logits are bit-identical.

The libraries choose the order of additions by the shapes of a product, so a row's result changes with the number of
rows beside it. Here, products have fixed shapes (`kernels/tiled_matmul.py`), and each query reads the cache in blocks
of a fixed size (`kernels/invariant_attention.py`). On a CPU, activation functions and powers are padded too, because
the last elements of a tensor are computed by other instructions if they do not fill a vector register. Nothing else in
the decoder mixes rows: norms are computed row by row, on a GPU by one thread block each.

S new tokens   H query heads   K key/value heads   E head_dim
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llava.kernels.invariant_attention import Queries, invariant_attention
from llava.kernels.tiled_matmul import tiled_matmul
from llava.model.paged import Chunk, Observer, PagedCache, observe_chunks, with_bias

_REGISTERS = 64  # elements, a multiple of what any vector register holds
_PIECE = 2**15  # elements of an elementwise operation that PyTorch does not divide among threads


class BatchInvariant(TorchFunctionMode):
    """While active, computes linear layers in tiles, and activation functions and powers in whole vector registers."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear:
            return tiled_matmul(*args, **(kwargs or {}))
        if function in (Tensor.matmul, Tensor.__matmul__) and args[1].dim() == 2:
            return tiled_matmul(args[0], args[1].mT)
        if function in (F.silu, F.gelu):
            return _elementwise(lambda x: function(x, *args[1:], **(kwargs or {})), args[0])
        if function in (torch.pow, Tensor.pow, Tensor.__pow__) and isinstance(args[1], Tensor):
            return _elementwise(function, *args)
        if function in (torch.pow, Tensor.pow, Tensor.__pow__):
            return _elementwise(lambda x: function(x, args[1]), args[0])
        return function(*args, **(kwargs or {}))


def _elementwise(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Applies a function to the elements of its inputs, all of which fill vector registers thanks to padding.

    A GPU computes all elements with the same instructions.
    """
    if inputs[0].device.type != "cpu":
        return function(*inputs)
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
    queries: Queries  # the slots that each token reads
    watched: Sequence[Chunk] = ()  # see `PagedContext`
    observe: Observer | None = None

    def with_scores(
        self, *, sliding_window: int | None = None, alibi_slopes: Tensor | None = None, dtype: torch.dtype
    ) -> "InvariantContext":
        """See `AttentionContext`."""
        queries = replace(self.queries, sliding_window=sliding_window, alibi_slopes=alibi_slopes)
        watched = [with_bias(one, sliding_window, alibi_slopes, dtype) for one in self.watched]
        return replace(self, queries=queries, watched=watched)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, S, H, E], k and v [1, S, K, E] -> y [1, S, H, E]. See `AttentionContext`."""
        self.cache.write(layer, self.slots, k[0], v[0])
        y = invariant_attention(q[0], self.cache.k[layer], self.cache.v[layer], self.queries)
        observe_chunks(self.cache, self.watched, self.observe, layer, q)
        return y[None]
