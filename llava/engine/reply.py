"""The result of a request: a finished reply or a stream of text."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llava.engine.engine import Engine
from llava.engine.sampling import SamplingParams
from llava.engine.sequence import Sequence
from llava.preprocess.inputs import ModelInput


@dataclass(frozen=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int  # includes image tokens
    image_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds spent on a request, or on the whole batch that contains it."""

    prepare_s: float  # opening and resizing images, encoding text
    first_token_s: float  # from the end of preparation to the first token: vision tower and prefill
    decode_s: float  # from the first to the last token

    tokens_per_s: float | None  # decoding speed; None for replies of at most one token


@dataclass(frozen=True)
class Reply:
    """A generated reply with its token counts and timings."""

    text: str
    token_ids: list[int]  # without the end token or the tokens of a stop string
    finish_reason: Literal["stop", "length"]
    usage: Usage
    timings: Timings
    logprobs: list[float] | None = None  # one per token, if requested
    top_logprobs: list[dict[int, float]] | None = None

    @classmethod
    def of(cls, sequence: Sequence, prepare_s: float, params: SamplingParams) -> "Reply":
        """Builds a reply from a sequence, which may be unfinished. prepare_s: seconds spent preparing the request."""
        decode_s = sequence.ended - sequence.first_token
        steps = sequence.n_generated - 1
        n_text = len(sequence.input.token_ids) - len(sequence.input.views)
        ids = list(sequence.detokenizer.ids)
        return cls(
            text=sequence.detokenizer.text,
            token_ids=ids,
            finish_reason=sequence.finish_reason or "stop",
            usage=Usage(sequence.n_prompt, sequence.n_prompt - n_text, len(ids)),
            timings=Timings(
                prepare_s,
                sequence.first_token - sequence.started,
                decode_s,
                steps / decode_s if steps > 0 < decode_s else None,
            ),
            logprobs=sequence.logprobs if params.logprobs else None,
            top_logprobs=sequence.top_logprobs if params.logprobs else None,
        )


class Stream(Iterator[str]):
    """Yields the text of a reply piece by piece as it is generated."""

    def __init__(self, engine: Engine, input: ModelInput, prepare_s: float, params: SamplingParams):
        self._prepare_s, self._params = prepare_s, params
        self._sequence = engine.start(input, params)
        self._pieces = (piece for _, piece in engine.run([self._sequence], params) if piece)

    def __next__(self) -> str:
        return next(self._pieces)

    def reply(self) -> Reply:
        """Returns the reply so far. If the reply is unfinished, its finish_reason is "stop"."""
        return Reply.of(self._sequence, self._prepare_s, self._params)
