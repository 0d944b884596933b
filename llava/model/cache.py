"""Keys and values of the tokens seen so far.

B batch   S new tokens   T slots   K key/value heads   E head_dim

A token at position p of its row lies in slot p. Rows of different lengths therefore need no padding on the left: what a
padded row writes behind its end is overwritten before a query may look there.
"""

import torch
from torch import Tensor

from llava.config import DecoderConfig


class NoCache:
    """Attention among the new tokens alone: a whole prompt at once, training."""

    def write(self, layer: int, pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, K, S, E], returned as they are."""
        return k, v


class KVCache(NoCache):
    """Room for `slots` tokens of each of `batch` rows, allocated once."""

    def __init__(self, config: DecoderConfig, batch: int, slots: int, *, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layers, batch, config.n_kv_heads, slots, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]
        self.window = slots  # attention reads the slots before this one

    def write(self, layer: int, pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, K, S, E] of tokens at pos [S] (all rows alike) or [B, S] -> all up to the window, [B, K, T, E]."""
        keys, values = self.k[layer], self.v[layer]
        if pos.dim() == 1:
            keys.index_copy_(2, pos, k)
            values.index_copy_(2, pos, v)
        else:
            keys[self.rows, :, pos] = k.transpose(1, 2)
            values[self.rows, :, pos] = v.transpose(1, 2)
        return keys[:, :, : self.window], values[:, :, : self.window]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows [B'] alone, in this order."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.rows = self.rows[: len(rows)]
