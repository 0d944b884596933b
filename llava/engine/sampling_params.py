"""The generation options of a request."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llava.errors import ConfigError

_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Generation options of one request. Temperature 0 always selects the most likely token."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None  # keep the most likely tokens until their total probability reaches this
    top_k: int | None = None  # keep this many of the most likely tokens
    min_p: float | None = None  # keep tokens whose probability is at least this fraction of the highest one
    repetition_penalty: float = 1.0  # above 1: makes tokens in the prompt or the reply less likely
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the reply
    frequency_penalty: float = 0.0  # the same, times the number of occurrences
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # added to logits; -inf bans a token
    logits_mask: Callable[[Sequence[int]], Tensor] | None = None  # ids of the reply so far -> allowed [V], bool
    seed: int | None = None  # None: results differ from run to run
    stop: tuple[str, ...] = ()  # strings that end the reply and are excluded from it
    # n > 0: return the log-probabilities of each generated token and of the n most likely tokens; True means 1
    logprobs: int = 0
    prompt_logprobs: int = 0  # the same for the tokens of the prompt
    strip: bool = True  # remove white space around the reply; False: it is exactly what follows the prompt
    num_beams: int = 1  # above 1: beam search, which returns the most likely of the replies it has found

    @classmethod
    def from_options(cls, *, stop: str | Sequence[str] | None = None, **options: Any) -> "SamplingParams":
        """Builds parameters from options. `stop`: one string or several. Raises ConfigError if an option is invalid."""
        try:
            return cls(stop=(stop,) if isinstance(stop, str) else stop or (), **options)  # type: ignore[arg-type]
        except TypeError as error:
            raise ConfigError(f"sampling options: {str(error).split('__init__() ')[-1]}") from None

    def __post_init__(self) -> None:
        self._check_types()
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature <= _MAX, "a finite number, 0 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= _MAX, "a finite number above 0"),
            ("presence_penalty", abs(self.presence_penalty) <= _MAX, "a finite number"),
            ("frequency_penalty", abs(self.frequency_penalty) <= _MAX, "a finite number"),
            ("logits_mask", self.logits_mask is None or callable(self.logits_mask), "a function of the reply's ids"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            ("stop", all(self.stop), "non-empty strings"),
            ("strip", isinstance(self.strip, bool), "True or False"),
            ("logprobs", self.logprobs >= 0, "0 or more"),
            ("prompt_logprobs", self.prompt_logprobs >= 0, "0 or more"),
            ("num_beams", self.num_beams >= 1, "1 or more"),
            ("temperature", self.num_beams == 1 or self.temperature == 0, "0, as num_beams= (--num-beams) is above 1"),
            ("logprobs", self.num_beams == 1 or self.logprobs == 0, "0, as num_beams is above 1"),
        ):
            if not valid:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    @cached_property
    def changes_logits(self) -> bool:
        """Whether a penalty, a bias or a mask changes the logits before the token is selected."""
        return bool(self.reads_reply or self.logit_bias)

    @cached_property
    def reads_reply(self) -> bool:
        """Whether the selection of a token depends on the ids of the reply before it, other than through the model."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(penalties or self.logits_mask)

    def _check_types(self) -> None:
        """Raises ConfigError if a value has the wrong type. Normalizes log-probability counts, `stop`, `logit_bias`."""
        optional = ("top_p", "top_k", "min_p", "seed")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:
                object.__setattr__(self, name, 1)
        for name in ("max_new_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "num_beams"):
            value = getattr(self, name)
            if not (_is_number(value, int) or (value is None and name in optional)):
                raise ConfigError(f"{name} is {value!r}; expected a whole number")
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in ("temperature", "top_p", "min_p", *penalties):
            value = getattr(self, name)
            if not (_is_number(value, int | float) or (value is None and name in optional)):
                raise ConfigError(f"{name} is {value!r}; expected a number")
        stop, bias = self.stop, self.logit_bias
        if isinstance(stop, str) or not isinstance(stop, Iterable) or not all(isinstance(s, str) for s in stop):
            raise ConfigError(f"stop is {stop!r}; expected a tuple of strings")
        if not isinstance(bias, Mapping):
            raise ConfigError(f"logit_bias is {bias!r}; expected a mapping of token ids to numbers")
        for id, value in bias.items():
            if not _is_number(id, int) or id < 0:
                raise ConfigError(f"logit_bias has the key {id!r}; expected token ids, whole numbers from 0")
            if not _is_number(value, int | float) or not (-_MAX <= value <= _MAX or value == -math.inf):
                raise ConfigError(f"logit_bias of token {id} is {value!r}; expected a finite number or -inf")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "logit_bias", dict(bias))


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
