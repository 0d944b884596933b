"""The language model: embedding table, blocks, final norm, head.

B batch   S new tokens   T cached tokens   D dim   V vocabulary rows
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from llava.config import DecoderConfig
from llava.model import llama, mpt
from llava.model.cache import NoCache
from llava.model.linear import Linear
from llava.model.llama import Mask


class Decoder(nn.Module):
    """Vectors in, vectors or logits out."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.dim, _weight=torch.empty(config.vocab_size, config.dim))
        is_mpt = config.kind == "mpt"
        block = mpt.Block if is_mpt else llama.Block
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.n_layers))
        norm = mpt.LayerNorm if is_mpt else llama.RMSNorm
        self.norm = norm(config.dim, config.eps)
        self.head = Linear(config.dim, config.vocab_size, bias=False)
        self.positions = mpt.Alibi(config) if is_mpt else llama.Rope(config)
        if config.tied:
            self.head.weight = self.embed.weight

    def last(self, x: Tensor, pos: Tensor, at: Tensor, cache: NoCache) -> Tensor:
        """A whole prompt x [B, S, D] at pos [S], of which one place a row is wanted: `at` [B] -> [B, D], normed."""
        places = self.positions(pos, x.shape[1], x.dtype)
        for block in self.blocks[:-1]:
            x = block(x, pos, places, None, cache)
        final = cast(llama.Block | mpt.Block, self.blocks[-1])
        return self.norm(final.last(x, pos, places, at, cache))[:, 0]

    def forward(
        self, x: Tensor, pos: Tensor, *, mask: Mask = None, cache: NoCache | None = None, length: int = 0
    ) -> Tensor:
        """x [B, S, D] at pos [S] or [B, S] -> [B, S, D] after the final norm.

        mask [B or 1, 1, S, T], true = may look; or the bounds of samples packed in a row; None is causal, for a prompt
        from position 0 or for one token that may look at all of the cache. `length`: tokens in the sequence so far, new
        ones included (default: S).
        """
        *_, last = self.states(x, pos, mask=mask, cache=cache, length=length)
        return last

    def states(
        self, x: Tensor, pos: Tensor, *, mask: Mask = None, cache: NoCache | None = None, length: int = 0
    ) -> Iterator[Tensor]:
        """As `forward`, but each state in turn: after every block, then after the last block and the final norm."""
        cache = cache or NoCache()
        places = self.positions(pos, length or x.shape[1], x.dtype, mask)
        for block in self.blocks:
            x = block(x, pos, places, mask, cache)
            yield x
        yield self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """x [..., D] after the final norm -> [..., V] float32"""
        return self.head(x).float()

    def lookup(self, ids: Tensor) -> Tensor:
        """ids [...] -> vectors [..., D]; a negative id (a picture's place) gets an arbitrary one, to be overwritten."""
        return self.embed(torch.clamp(ids, min=0))
