"""Cache of the keys and values of processed tokens, in two dense tensors.

B batch   S new tokens   T slots   K key/value heads   E head_dim

The token at position p of a row is stored in slot p, so rows of different lengths need no left padding. Right
padding leaves stale entries after a row's last token; each entry is overwritten before a query attends to its slot.
"""

import torch
from torch import Tensor

from llava.config import DecoderConfig


class KVCache:
    """A dense cache with `slots` slots for each of `batch` rows, allocated once."""

    def __init__(self, config: DecoderConfig, batch: int, slots: int, *, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layers, batch, config.n_kv_heads, slots, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v [B, S, K, E] at positions [S] (the same for all rows) or [B, S].

        Returns all keys and values of the layer, each [B, K, T, E].
        """
        keys, values = self.k[layer], self.v[layer]
        if positions.dim() == 1:
            keys.index_copy_(2, positions, k.transpose(1, 2))
            values.index_copy_(2, positions, v.transpose(1, 2))
        else:
            keys[self.rows, :, positions] = k
            values[self.rows, :, positions] = v
        return keys, values
