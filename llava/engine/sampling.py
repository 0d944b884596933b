"""How the next token is chosen. Order of the filters as in transformers: penalty, temperature, top-k, top-p, min-p.

B rows   V vocabulary rows
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of one request. Temperature 0 takes the likeliest token."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None  # keep the likeliest tokens that together reach this probability
    top_k: int | None = None  # keep so many
    min_p: float | None = None  # keep those at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer become less likely
    seed: int | None = None  # None: different each time
    stop: tuple[str, ...] = ()  # strings that end the answer, not part of it
    logprobs: int = 0  # 1 or more: log-probabilities of the chosen tokens and of so many likeliest ones

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed", "logprobs"):
            if not isinstance(getattr(self, name), int | None):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if not isinstance(getattr(self, name), int | float | None):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected a number")
        if not all(isinstance(stop, str) for stop in self.stop):
            raise ConfigError(f"stop is {self.stop!r}; expected strings")
        for name, good, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("logprobs", self.logprobs >= 0, "0 or more"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            ("stop", all(self.stop), "strings that are not empty"),
        ):
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {wanted}")


_COLDEST = 1e-5  # below this temperature logits overflow, and the likeliest token is the answer all the same


def sample(
    logits: Tensor, options: Sampling, seen: Sequence[Tensor], generators: Sequence[torch.Generator | None]
) -> Tensor:
    """logits [B, V] float32; for each row the ids `seen` so far and its own generator -> ids [B]."""
    if options.repetition_penalty != 1:
        logits = torch.stack([_penalised(row, ids, options) for row, ids in zip(logits, seen, strict=True)])
    if options.temperature < _COLDEST:
        return logits.argmax(-1)
    probs = _filtered(logits / options.temperature, options).softmax(-1)
    return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators, strict=True)])


def _penalised(logits: Tensor, ids: Tensor, options: Sampling) -> Tensor:
    """logits [V], ids [n] that occurred, each counted once."""
    ids = ids[(ids >= 0) & (ids < len(logits))].unique().to(logits.device)
    hit = logits[ids]
    penalty = options.repetition_penalty
    return logits.index_copy(0, ids, torch.where(hit > 0, hit / penalty, hit * penalty))


def _filtered(logits: Tensor, options: Sampling) -> Tensor:
    """logits [B, V]; what must not be chosen becomes -inf. At least one token a row stays."""
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        least = logits.topk(options.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if options.top_p is not None and options.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= options.top_p  # the tokens in front of it already reach top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    if options.min_p:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < options.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return logits
