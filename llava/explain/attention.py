"""How much of a token's attention goes to each image token.

S tokens of prompt and reply   N tokens of the reply   T image tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.config import DecoderConfig
from llava.engine.capture import Capture, Captured
from llava.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Focus:
    """Whose attention is shown: the mean of some heads in some blocks of the decoder."""

    layers: tuple[int, ...] | None = None  # blocks, from 0; None: all
    heads: tuple[int, ...] | None = None  # None: all
    rollout: bool = False  # follow the attention through these blocks (arXiv:2005.00928) instead of taking their mean

    def resolved(self, config: DecoderConfig) -> "Focus":
        """Returns a copy that lists its blocks. Raises ConfigError if blocks or heads do not exist."""
        layers = _checked("layers", self.layers, config.n_layers)
        heads = None if self.heads is None else _checked("heads", self.heads, config.n_heads)
        return Focus(layers=layers, heads=heads, rollout=self.rollout)

    def capture(self) -> Capture:
        """Returns what the engine has to record."""
        assert self.layers is not None
        return Capture(
            attention=self.layers,
            heads=self.heads,
            mean_heads=True,
            first_query=0 if self.rollout else -1,
            images_only=not self.rollout,
        )

    def shares(self, captured: Captured, n_prompt: int) -> Tensor:
        """Returns the attention [N, T] of the tokens from which those of the reply are predicted."""
        assert self.layers is not None
        return _rollout(captured, self.layers, n_prompt) if self.rollout else _mean(captured, self.layers)


def _checked(name: str, numbers: Sequence[int] | None, n: int) -> tuple[int, ...]:
    if numbers is None:
        return tuple(range(n))
    if not numbers or len(set(numbers)) < len(numbers) or not all(0 <= number < n for number in numbers):
        raise ConfigError(f"{name}: expected different numbers from 0 to {n - 1}")
    return tuple(sorted(numbers))


def _mean(captured: Captured, layers: Sequence[int]) -> Tensor:
    return torch.stack([captured.probabilities(layer)[0] for layer in layers]).mean(0)


def _rollout(captured: Captured, layers: Sequence[int], n_prompt: int) -> Tensor:
    """Follows the attention through the layers, half of which passes each by."""
    n = captured.probabilities(layers[0]).shape[-1]
    followed = torch.eye(n)
    for layer in layers:
        followed = (captured.probabilities(layer)[0] @ followed + followed) / 2
    tokens = [i for image in captured.images for i in image]
    return followed[n_prompt - 1 :, tokens]
