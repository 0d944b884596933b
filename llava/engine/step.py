"""The two functions that run the model while an answer is written; what `torch.compile` is given.

B rows   S places of the longest prompt   T slots of the window   D dim   V vocabulary rows
"""

import torch
from torch import Tensor

from llava.model.cache import KVCache
from llava.model.llava import Llava


def prefill(model: Llava, x: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
    """Prompts x [B, S, D], padded on the right, of lengths [B] -> logits [B, V] float32 behind each one's last token.

    No mask is needed: attention is causal, so that a prompt never looks at the padding behind it.
    """
    pos = torch.arange(x.shape[1], device=x.device)
    return model.decoder.logits(model.decoder.last(x, pos, lengths - 1, cache))


def decode_step(model: Llava, ids: Tensor, pos: Tensor, mask: Tensor | None, cache: KVCache, length: int) -> Tensor:
    """One token a row: ids [B] at pos [B] -> logits [B, V] float32. mask [B, 1, 1, T]; None: one row that sees all.

    `length`: tokens of the longest row, the new one included.
    """
    x = model.decoder.lookup(ids)[:, None]
    at = pos if mask is None else pos[:, None]
    return model.decoder.logits(model.decoder(x, at, mask=mask, cache=cache, length=length)[:, -1])
