"""Samples the next token. The order of operations matches transformers: penalty, temperature, top-k, top-p, min-p.

B batch   V vocabulary size
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Generation options of one request. Temperature 0 always selects the most likely token."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None  # keep the smallest set of most likely tokens whose total probability reaches this
    top_k: int | None = None  # keep this many of the most likely tokens
    min_p: float | None = None  # keep tokens whose probability is at least this fraction of the highest one
    repetition_penalty: float = 1.0  # above 1: makes tokens in the prompt or the reply less likely
    seed: int | None = None  # None: results differ from run to run
    stop: tuple[str, ...] = ()  # strings that end the reply and are excluded from it
    logprobs: int = 0  # n > 0: return the log-probabilities of each generated token and of the n most likely tokens

    @classmethod
    def from_options(cls, *, stop: str | Sequence[str] | None = None, **options: Any) -> "SamplingParams":
        """Builds parameters from options. `stop`: one string or several. Raises ConfigError if an option is invalid."""
        try:
            return cls(stop=(stop,) if isinstance(stop, str) else tuple(stop or ()), **options)
        except TypeError as error:
            raise ConfigError(f"sampling options: {str(error).split('__init__() ')[-1]}") from None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed", "logprobs"):
            if not isinstance(getattr(self, name), int | None):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if not isinstance(getattr(self, name), int | float | None):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected a number")
        if not all(isinstance(stop, str) for stop in self.stop):
            raise ConfigError(f"stop is {self.stop!r}; expected one or more strings")
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("logprobs", self.logprobs >= 0, "0 or more"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            ("stop", all(self.stop), "non-empty strings"),
        ):
            if not valid:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {expected}")


_GREEDY_BELOW = 1e-5  # below this temperature, sampling is effectively greedy, and dividing the logits could overflow


def sample(
    logits: Tensor, params: SamplingParams, seen: Sequence[Tensor], generators: Sequence[torch.Generator | None]
) -> Tensor:
    """Samples one id per row: logits [B, V] float32 -> ids [B].

    seen: ids in each row's prompt and reply so far; generators: one per row, or None for greedy sampling.
    """
    if params.repetition_penalty != 1:
        logits = torch.stack([_penalised(row, ids, params) for row, ids in zip(logits, seen, strict=True)])
    if params.temperature < _GREEDY_BELOW:
        return logits.argmax(-1)
    probs = _filtered(logits / params.temperature, params).softmax(-1)
    return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators, strict=True)])


def _penalised(logits: Tensor, ids: Tensor, params: SamplingParams) -> Tensor:
    """Returns logits [V] with the repetition penalty applied once to each distinct id in ids [n]."""
    ids = ids[(ids >= 0) & (ids < len(logits))].unique().to(logits.device)
    hit = logits[ids]
    penalty = params.repetition_penalty
    return logits.index_copy(0, ids, torch.where(hit > 0, hit / penalty, hit * penalty))


def _filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Returns logits [B, V] with excluded tokens set to -inf. At least one token remains in each row."""
    if params.top_k is not None and params.top_k < logits.shape[-1]:
        lowest = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if params.top_p is not None and params.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        excluded = probs.cumsum(-1) - probs >= params.top_p  # the more likely tokens already add up to top_p
        excluded[:, 0] = False
        logits = logits.masked_fill(excluded.scatter(1, order, excluded), -torch.inf)
    if params.min_p:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return logits
