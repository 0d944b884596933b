"""What a request can ask for besides its reply, and the results.

S new tokens   D dim   H heads   T tokens attended to
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.config import DecoderConfig
from llava.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Intermediate results to return for a request. Its whole prompt is then computed, nothing is taken from caches.

    Layers are numbered as in `Assistant.hidden_states`: 0 is the input embeddings, k the output of block k, and the
    last one the output of the final norm. The last token of a reply has no results, as it is not computed.

    To see where each token of a reply comes from, use `first_query=-1`: query i is then the token before the reply's
    token i, from which that token is predicted.
    """

    hidden_states: tuple[int, ...] = ()  # layers, from 0
    attention: tuple[int, ...] = ()  # blocks, from 0
    heads: tuple[int, ...] | None = None  # heads whose attention is recorded; None: all
    mean_heads: bool = False  # record the mean of these heads instead, as one head
    first_query: int = 0  # attention is recorded from this position on; below 0: counted from the end of the prompt
    images_only: bool = False  # record only the attention to image tokens

    def resolve(self, config: DecoderConfig, n_prompt: int) -> "Capture":
        """Returns a copy whose `first_query` is a position. Raises ConfigError if a layer or head does not exist."""
        for name, numbers, n in (
            ("hidden_states", self.hidden_states, config.n_layers + 1),
            ("attention", self.attention, config.n_layers),
            ("heads", self.heads or (), config.n_heads),
        ):
            if missing := [number for number in numbers if not 0 <= number < n]:
                raise ConfigError(f"capture: {name} contains {missing[0]}; expected numbers from 0 to {n - 1}")
        first = self.first_query + n_prompt if self.first_query < 0 else self.first_query
        return replace(self, first_query=max(0, first))


@dataclass(eq=False, kw_only=True)
class Captured:
    """The results that a `Capture` asks for, on the CPU, in one piece per step.

    Pieces are stored by the position of their first token, so that a step that is computed again replaces its own.
    """

    states: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # by layer: [S, D]
    attention: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # by block: [H, S, T] float32
    images: list[range] = field(default_factory=list)  # positions of the tokens of each picture
    images_only: bool = False  # T are only image tokens

    def hidden_states(self, layer: int) -> Tensor:
        """Returns the hidden states of all computed tokens, [tokens, D]."""
        return torch.cat(list(self.states[layer].values()))

    def probabilities(self, block: int) -> Tensor:
        """Returns the attention probabilities [H, queries, tokens] float32; later tokens have probability 0.

        With `images_only`, the tokens are those of all pictures, in order.
        """
        pieces = list(self.attention[block].values())
        n = max(piece.shape[-1] for piece in pieces)
        return torch.cat([F.pad(piece, (0, n - piece.shape[-1])) for piece in pieces], dim=1)

    def image_attention(self, block: int) -> list[Tensor]:
        """Returns the attention probabilities to the tokens of each picture, [H, queries, tokens] float32."""
        p = self.probabilities(block)
        if self.images_only:
            return list(p.split([len(image) for image in self.images], dim=-1))
        p = F.pad(p, (0, max(0, max((image.stop for image in self.images), default=0) - p.shape[-1])))
        return [p[..., image.start : image.stop] for image in self.images]
