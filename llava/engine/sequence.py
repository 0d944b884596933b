"""A request whose reply is being generated."""

import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llava.engine.detokenize import Detokenizer
from llava.preprocess.inputs import ModelInput


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A prompt and the tokens generated for it so far."""

    input: ModelInput
    detokenizer: Detokenizer
    stop_ids: frozenset[int]
    max_new_tokens: int
    generator: torch.Generator | None  # None: greedy sampling
    n_prompt: int
    seen: Tensor  # ids in the prompt and the reply, for the repetition penalty
    n_generated: int = 0
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: list[float] = field(default_factory=list)  # one per generated token
    top_logprobs: list[dict[int, float]] = field(default_factory=list)  # per token: {likely id: log-probability}

    # `time.perf_counter` timestamps in seconds; 0: not reached yet
    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    ended: float = 0.0

    @property
    def position(self) -> int:
        """Position of the newest token, which is the input to the next step."""
        return self.n_prompt + self.n_generated - 1

    def append(self, id: int) -> str:
        """Adds a generated token and returns the newly finalized text. Sets `finish_reason` after the last token."""
        now = time.perf_counter()
        self.first_token = self.first_token or now
        self.n_generated += 1
        piece = ""
        if id in self.stop_ids:
            self.finish_reason = "stop"
        else:
            piece = self.detokenizer.append(id)
            if self.detokenizer.stopped:
                self.finish_reason = "stop"
            elif self.n_generated >= self.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            self.ended = now
            piece += self.detokenizer.finish()
            n = len(self.detokenizer.ids)
            del self.logprobs[n:], self.top_logprobs[n:]
        return piece
