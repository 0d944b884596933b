"""The language model: embedding table, blocks, final norm, head.

B batch   S new tokens   D dim   V vocabulary size
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llava.config import DecoderConfig
from llava.model import llama, mpt
from llava.model.attention import AttentionContext, CausalContext
from llava.model.linear import Linear


class Decoder(nn.Module):
    """Llama or MPT: maps embeddings to hidden states, and hidden states to logits."""

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

    def forward(self, x: Tensor, context: AttentionContext | None = None, select: Tensor | None = None) -> Tensor:
        """x [B, S, D] -> hidden states [B, S, D] after the final norm.

        Without a context, attention is causal and the rows of x start at position 0.
        select: int64 [L], indices into the tokens of x flattened to [B * S]; the result is then [L, D], the hidden
        states of these tokens only, and the last block's MLP skips the others.
        """
        for state in self.states(x, context, select):  # keeps only one state at a time
            x = state
        return x

    def states(
        self, x: Tensor, context: AttentionContext | None = None, select: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Like `forward`, but yields the hidden states after each block and, as the last item, after the final norm.

        `select` applies from the last block on.
        """
        rope, context = self.positions(CausalContext.of(x) if context is None else context, x.dtype)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, rope, context, select if i == last else None)
            yield x
        yield self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """x [..., D] after the final norm -> logits [..., V] float32"""
        return self.head(x).float()

    def lookup(self, ids: Tensor) -> Tensor:
        """ids [...] -> embeddings [..., D]. Negative ids (image tokens) yield placeholders that callers overwrite."""
        return self.embed(torch.clamp(ids, min=0))
