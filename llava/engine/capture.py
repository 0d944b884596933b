"""What a request can ask for besides its reply, and the results.

S new tokens   D dim   H heads   T tokens attended to
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Intermediate results to return for a request. Its whole prompt is then computed, nothing is taken from caches.

    Layers are numbered as in `Assistant.hidden_states`: 0 is the input embeddings, k the output of block k, and the
    last one the output of the final norm.
    """

    hidden_states: tuple[int, ...] = ()  # layers, from 0
    attention: tuple[int, ...] = ()  # blocks, from 0
    first_query: int = 0  # attention is recorded for the tokens from this position on


@dataclass(eq=False, kw_only=True)
class Captured:
    """The results that a `Capture` asks for, on the CPU, in one piece per step."""

    states: dict[int, list[Tensor]] = field(default_factory=dict)  # by layer: [S, D]
    attention: dict[int, list[Tensor]] = field(default_factory=dict)  # by block: [H, S, T] float32

    def hidden_states(self, layer: int) -> Tensor:
        """Returns the hidden states of all computed tokens, [tokens, D]."""
        return torch.cat(self.states[layer])

    def probabilities(self, block: int) -> Tensor:
        """Returns the attention probabilities [H, queries, tokens] float32; later tokens have probability 0."""
        pieces = self.attention[block]
        n = max(piece.shape[-1] for piece in pieces)
        return torch.cat([F.pad(piece, (0, n - piece.shape[-1])) for piece in pieces], dim=1)
