"""The results of requests: outputs of a step, finished replies, and streams of text."""

import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rest
from dataclasses import dataclass, field, replace

from llava.engine.capture import Captured
from llava.engine.sequence import EndToken, FinishReason, Sequence
from llava.errors import LlavaError


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a step added to the reply of one request. Concatenated, the outputs of a request form its reply."""

    request: int
    text: str  # new text that can no longer change; may be ""
    token_ids: list[int]  # new ids whose text can no longer change, without those of an end token or stop string
    finish_reason: FinishReason | None  # None: the reply goes on
    error: LlavaError | None = None  # if the finish reason is "error"
    logprobs: list[float] = field(default_factory=list)  # of the new ids, if requested
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    reply: "Reply | None" = None  # the whole reply, in its last output
    captured: Captured | None = None  # what the request asked for, in its last output


def joined(outputs: Rest[Output]) -> Output:
    """Returns successive outputs of a request as one."""
    if len(outputs) == 1:
        return outputs[0]
    return replace(
        outputs[-1],
        text="".join(one.text for one in outputs),
        token_ids=[id for one in outputs for id in one.token_ids],
        logprobs=[value for one in outputs for value in one.logprobs],
        top_logprobs=[top for one in outputs for top in one.top_logprobs],
    )


@dataclass(frozen=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int  # includes image tokens
    image_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # tokens of the prompt that were in the prefix cache


@dataclass(frozen=True)
class Timings:
    """Seconds spent on a request, including the time spent on other requests in the same steps."""

    prepare_s: float  # opening and resizing images, encoding text
    first_token_s: float  # from the end of preparation to the first token: waiting, vision tower and prefill
    decode_s: float  # from the first to the last token
    tokens_per_s: float | None  # decoding speed; None for replies of at most one token
    queue_s: float = 0.0  # from the end of preparation to the first step, included in `first_token_s`


@dataclass(frozen=True)
class Reply:
    """A generated reply with its token counts and timings."""

    text: str
    token_ids: list[int]  # without the end token or the tokens of a stop string
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: list[float] | None = None  # one per token, if requested
    top_logprobs: list[dict[int, float]] | None = None
    # of each token of the prompt but the first, if requested; None for image tokens
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    end_token: EndToken | None = (
        None  # that ended the reply and is not in `token_ids`, if log-probabilities are requested
    )

    @classmethod
    def of(cls, sequence: Sequence) -> "Reply":
        """Builds a reply from a sequence, which may be unfinished; the finish reason is then "stop"."""
        decode_s = sequence.ended - sequence.first_token
        steps = sequence.n_known - sequence.n_prompt - 1
        ids = list(sequence.detokenizer.ids)
        n_image_tokens = sum(image.end - image.start for image in sequence.images)
        params = sequence.params
        return cls(
            text=sequence.detokenizer.text,
            token_ids=ids,
            finish_reason=sequence.finish_reason or "stop",
            usage=Usage(sequence.n_prompt, n_image_tokens, len(ids), sequence.n_cached),
            timings=Timings(
                sequence.prepare_s,
                sequence.first_token - sequence.started,
                decode_s,
                steps / decode_s if steps > 0 < decode_s else None,
                max(0.0, sequence.admitted - sequence.started),
            ),
            logprobs=sequence.logprobs if params.logprobs else None,
            top_logprobs=sequence.top_logprobs if params.logprobs else None,
            prompt_logprobs=sequence.prompt_logprobs if params.prompt_logprobs else None,
            prompt_top_logprobs=sequence.prompt_top_logprobs if params.prompt_logprobs else None,
            end_token=sequence.end_token,
        )


class Stream(Iterator[str]):
    """Yields the text of a reply piece by piece as it is generated. A stream that is dropped is aborted."""

    def __init__(self, sequence: Sequence, outputs: Iterator[Output], abort: Callable[[int], None]):
        self._sequence = sequence
        self._pieces = (output.text for output in outputs if output.text)
        self._abort = weakref.finalize(self, abort, sequence.request)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Aborts the request if it has not finished."""
        self._abort()

    def reply(self) -> Reply:
        """Returns the reply so far. If the reply is unfinished, its finish_reason is "stop"."""
        return Reply.of(self._sequence)

    def captured(self) -> Captured:
        """Returns the intermediate results that the request asked for."""
        return self._sequence.captured
