"""Perplexity of the language model on a text, by sliding windows, as in transformers' guide "Perplexity of
fixed-length models".

The text is one sequence of tokens, with BOS at its start if the tokenizer adds it. Windows of `context` tokens start
at every `stride`-th token, and the last one ends with the text. A window scores the tokens that no earlier window
contains; those before them are their context. Its first token has none and is not scored: of the whole text, this is
BOS or, without BOS, the first token; if the stride equals the context, also the first token of every later window.
Every scored token counts once and the same. (The guide's code counts one token fewer in each later window than its
loss covers.)
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, overload

from llava.assistant import Assistant
from llava.engine.sampling import NOT_FINITE
from llava.engine.sampling_params import SamplingParams
from llava.errors import ConfigError, LlavaError, PromptError
from llava.preprocess.inputs import ModelInput
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.writer import Progress, no_progress

log = logging.getLogger(__name__)
_LARGEST = 709.0  # nats per token, above which the perplexity is no float64


class Window(NamedTuple):
    """The tokens from `start` up to but not including `end`. Those from `scored` on are scored."""

    start: int
    scored: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a model predicts a text."""

    nll: float  # negative log-likelihood of all scored tokens together, in nats
    tokens: int  # that are scored
    bytes: int  # of UTF-8, that the scored tokens stand for
    windows: int
    context: int  # largest length of a window, in tokens
    stride: int  # tokens from the start of a window to that of the next one

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood of a token; infinite beyond the range of float64."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean <= _LARGEST else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The negative log-likelihood in bits, over the bytes: comparable between models with different tokenizers."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures. Infinite ones are None, because JSON has no infinity."""
        figures = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte, **asdict(self)}
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def perplexity(
    assistant: Assistant,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Progress = no_progress,
) -> Perplexity:
    """Measures the perplexity of an assistant's language model, with its active adapter, on a text.

    context: largest length of a window, in tokens; default: the model's context. stride: from 1 to `context`; default:
        half of it. A smaller one gives tokens more context and takes longer. progress: receives the number of scored
        tokens and their total.

    Special tokens in the text, such as </s>, are read as such, as by transformers, with a warning. Raises ConfigError
    if `context` or `stride` is out of range, PromptError if no token can be scored, LlavaError if the model fails.
    """
    tokenizer = assistant.preprocessor.tokenizer
    context, stride = _check_window(assistant, context, stride)
    ids = tokenizer.encode(text)
    _warn_of_special(tokenizer, ids)
    windows = split(len(ids), context, stride)
    total = sum(one.end - one.scored for one in windows)
    if not total:
        raise PromptError("the text has no token after the first one; expected at least one to score")
    sums: list[float] = []
    done = 0
    for window, logprobs in score(assistant, ids, windows):
        sums.append(-math.fsum(logprobs))
        done += window.end - window.scored
        progress(done, total)
    return Perplexity(
        nll=math.fsum(sums),  # rounded once, so that the order in which windows finish does not matter
        tokens=total,
        bytes=_scored_bytes(text, tokenizer, ids, windows),
        windows=len(windows),
        context=context,
        stride=stride,
    )


def split(n_tokens: int, context: int, stride: int) -> list[Window]:
    """Returns the windows of a text that score at least one token."""
    windows = []
    end = 0
    for start in range(0, n_tokens, stride):
        scored, end = max(end, start + 1), min(start + context, n_tokens)
        if scored < end:
            windows.append(Window(start, scored, end))
        if end == n_tokens:
            break
    return windows


def score(
    assistant: Assistant, ids: Sequence[int], windows: Sequence[Window]
) -> Iterator[tuple[Window, Sequence[float]]]:
    """Yields each window with the log-probabilities of its scored tokens, in nats, as soon as it has been computed.

    The engine computes several windows at the same time; only those are in memory. Raises LlavaError.
    """
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=1)
    inputs = _Inputs(assistant, ids, windows)
    for i, reply in assistant.engine.generate_each(inputs, params, adapter=assistant.active):
        if isinstance(reply, LlavaError):
            raise reply
        window = windows[i]
        after_first = reply.prompt_logprobs or []
        logprobs = [value for value in after_first[window.scored - window.start - 1 :] if value is not None]
        if not all(map(math.isfinite, logprobs)):
            raise LlavaError(NOT_FINITE)
        yield window, logprobs


class _Inputs(Sequence[ModelInput]):
    """The inputs of the windows, each made when it is read."""

    def __init__(self, assistant: Assistant, ids: Sequence[int], windows: Sequence[Window]):
        self._prepare, self._ids, self._windows = assistant.preprocessor.prepare_ids, ids, windows

    def __len__(self) -> int:
        return len(self._windows)

    @overload
    def __getitem__(self, i: int) -> ModelInput: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[ModelInput]: ...
    def __getitem__(self, i: int | slice) -> ModelInput | Sequence[ModelInput]:
        if isinstance(i, slice):
            return [self[one] for one in range(len(self))[i]]
        window = self._windows[i]
        return self._prepare(self._ids[window.start : window.end])


def _check_window(assistant: Assistant, context: int | None, stride: int | None) -> tuple[int, int]:
    """Returns the length and the stride of windows, in tokens. Raises ConfigError if they are out of range."""
    longest, capacity = assistant.config.decoder.max_seq, assistant.engine.inputs.capacity
    context = longest if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    for name, value, least, most, what in (
        ("context", context, 2, longest, "the model's context"),
        ("stride", stride, 1, context, "the length of a window"),
    ):
        if not least <= value <= most:
            raise ConfigError(f"{name}= (--{name}) is {value}; expected {least} to {most}, {what}")
    if context > capacity:
        raise ConfigError(
            f"windows have {context} tokens, but the cache holds {capacity}; reduce context= (--context) or raise "
            "cache_memory= (--cache-memory)"
        )
    return context, stride


def _warn_of_special(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    found = [id for id in _of_text(tokenizer, ids) if id in tokenizer.special]
    if found:
        example = tokenizer.piece(found[0]).decode(errors="replace")
        log.warning(
            "the text contains special tokens, such as %s: they are read as such, as in transformers, and %d in all "
            "are part of the score",
            example,
            len(found),
        )


def _of_text(tokenizer: Tokenizer, ids: Sequence[int]) -> Sequence[int]:
    """Returns the ids that stand for the text, without the BOS before it."""
    return ids if tokenizer.bos_id is None else ids[1:]


def _scored_bytes(text: str, tokenizer: Tokenizer, ids: Sequence[int], windows: Sequence[Window]) -> int:
    """Returns the number of UTF-8 bytes that the scored tokens stand for: those of the text, less the others."""
    ends = [0, *(one.end for one in windows)]
    unscored = [i for one, end in zip(windows, ends, strict=False) for i in range(end, one.scored)]
    unscored += range(ends[-1], len(ids))
    size = len(text.encode())
    if tokenizer.bos_id is None:
        first = tokenizer.encode_tokens(text)[0]  # not its piece, which may begin with a space that the text lacks
        size -= first.end - first.start
    return size - sum(len(tokenizer.piece(ids[i])) for i in unscored if i > 0)
