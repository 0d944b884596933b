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

    def forward(self, x: Tensor, context: AttentionContext | None = None) -> Tensor:
        """x [B, S, D] -> hidden states [B, S, D] after the final norm.

        Without a context, attention is causal and the rows of x start at position 0.
        """
        *_, last = self.states(x, context)
        return last

    def states(self, x: Tensor, context: AttentionContext | None = None) -> Iterator[Tensor]:
        """Like `forward`, but yields the hidden states after each block and, as the last item, after the final norm."""
        rope, context = self.positions(CausalContext.of(x) if context is None else context, x.dtype)
        for block in self.blocks:
            x = block(x, rope, context)
            yield x
        yield self.norm(x)

    def last_token_only(self, x: Tensor, context: AttentionContext) -> Tensor:
        """x [B, S, D] -> [sequences, D], the last token's hidden state in each sequence, after the final norm.

        Used for prefill: the last block computes keys and values for all tokens, but outputs only for the last tokens.
        """
        rope, context = self.positions(context, x.dtype)
        for block in self.blocks[:-1]:
            x = block(x, rope, context)
        x = self.blocks[-1](x, rope, context.last_token_only())
        return self.norm(x).flatten(0, 1)

    def logits(self, x: Tensor) -> Tensor:
        """x [..., D] after the final norm -> logits [..., V] float32"""
        return self.head(x).float()

    def lookup(self, ids: Tensor) -> Tensor:
        """ids [...] -> embeddings [..., D]. Negative ids (image tokens) yield placeholders that callers overwrite."""
        return self.embed(torch.clamp(ids, min=0))
