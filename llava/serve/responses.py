"""The bodies of responses: chats and completions, whole and in chunks of a stream."""

import codecs
import json
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from llava.engine.detokenize import INCOMPLETE
from llava.engine.reply import Output, Reply
from llava.engine.sequence import EndToken
from llava.preprocess.tokenizer import Tokenizer
from llava.serve.errors import ApiError
from llava.serve.generation import Choice
from llava.serve.limits import Limits

Body = dict[str, Any]
_SLICE = 16  # entries of a list; each may have a map of thousands of numbers
_INVALID = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as `surrogateescape` decodes them


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """What all bodies of one response have in common."""

    id: str
    model: str
    created: int
    object: str

    def body(self, choices: Sequence[Body], **more: Any) -> Body:
        """Returns a body with these choices."""
        head = {"id": self.id, "object": self.object, "created": self.created, "model": self.model}
        return head | {"choices": list(choices)} | more

    def encoded(self, choices: Iterable[Body], **more: Any) -> bytes:
        """Returns the JSON of a body. Choices are taken one at a time, so that their bodies need not exist together."""
        listed = "[" + ",".join(map(_json, choices)) + "]"
        parts = {name: _json(value) for name, value in self.body([], **more).items()} | {"choices": listed}
        return ("{" + ",".join(f"{_json(name)}:{part}" for name, part in parts.items()) + "}").encode()


def encoded(body: Body) -> bytes:
    """Returns the JSON of a body. See `_json`."""
    return _json(body).encode()


def _json(value: Any) -> str:
    """Returns JSON, of which long lists are encoded in slices: one call for all would keep Python's lock to its end.

    Meant for a thread beside the event loop, which gets the lock between two slices.
    """
    if isinstance(value, dict):
        return "{" + ",".join(f"{_dumps(name)}:{_json(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        slices = (value[i : i + _SLICE] for i in range(0, len(value), _SLICE))
        return "[" + ",".join(_dumps(one)[1:-1] for one in slices) + "]"
    return _dumps(value)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def check_size(choices: Sequence[Choice], context: int, limits: Limits) -> None:
    """Raises ApiError if an answer could hold too many tokens and log-probabilities.

    choices: of one request, which differ only in their prompts and seeds. context: in tokens.
    """
    params, most = choices[0].params, limits.answer_values
    lengths = [len(one.input.ids) for one in choices]
    n_new = sum(min(params.max_new_tokens, max(0, context - n)) for n in lengths)
    n_listed = sum(lengths) if params.prompt_logprobs else 0  # tokens of prompts
    values = n_listed * (1 + params.prompt_logprobs) + n_new * (1 + params.logprobs)
    if values <= most:
        return
    found = f"the answer can have {values} tokens and log-probabilities; expected at most {most}"
    n_tokens = (most - n_listed * (1 + params.prompt_logprobs)) // (1 + params.logprobs) // len(choices)
    n_top = most // (n_listed + n_new) - 1
    if n_tokens > 0:
        advice = f"set max_tokens (or max_completion_tokens of a chat) to at most {n_tokens}"
        raise ApiError(400, f"{found}: {advice}", param="max_tokens")
    if n_top > 0:
        raise ApiError(400, f"{found}: set logprobs to at most {n_top}", param="logprobs")
    raise ApiError(400, f"{found}: send fewer prompts, or ask for fewer choices", param="prompt")


def usage(replies: Sequence[Reply], n: int) -> Body:
    """Returns token counts. replies: of all choices. n: how many in a row have the same prompt, which counts once."""
    prompts = replies[::n]
    prompt_tokens = sum(one.usage.prompt_tokens for one in prompts)
    completion_tokens = sum(one.usage.completion_tokens for one in replies)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(one.usage.cached_tokens for one in prompts),
            "image_tokens": sum(one.usage.image_tokens for one in prompts),
        },
    }


@dataclass(frozen=True, kw_only=True)
class ChatBodies:
    """The choices of chat responses."""

    tokenizer: Tokenizer
    logprobs: bool
    n_top: int  # most likely tokens to list

    def whole(self, index: int, reply: Reply) -> Body:
        """Returns a finished choice."""
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        top = reply.top_logprobs or []
        logprobs = self._logprobs(reply.token_ids, reply.logprobs or [], top)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reply.finish_reason}

    def first(self, index: int) -> Body:
        """Returns the first chunk of a choice."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, output: Output) -> Body:
        """Returns a chunk with new text."""
        logprobs = self._logprobs(output.token_ids, output.logprobs, output.top_logprobs)
        return self._chunk(index, {"content": output.text}, logprobs, None)

    def last(self, index: int, output: Output) -> Body:
        """Returns the last chunk of a choice."""
        return self._chunk(index, {}, None, output.finish_reason)

    def _chunk(self, index: int, delta: Body, logprobs: Body | None, finish_reason: str | None) -> Body:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, ids: Sequence[int], logprobs: Sequence[float], top: Sequence[dict[int, float]]) -> Body | None:
        if not self.logprobs:
            return None
        content = [
            self._token(id, value) | {"top_logprobs": [self._token(*one) for one in _best(likely, self.n_top)]}
            for id, value, likely in zip(ids, logprobs, top, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> Body:
        piece = self.tokenizer.piece(id)
        return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}


class _Tokens:
    """Turns the ids of one choice into the text of each token, however the ids are grouped.

    Together, the texts are the whole text: a character belongs to the last of its tokens. Each byte that is not part of
    a character becomes U+FFFD, as in SentencePiece. Special tokens add nothing.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._before: list[int] | None = []  # ids before the first one with text; None: it has come

    def texts(self, ids: Sequence[int], *, final: bool) -> list[str]:
        """Returns the text of each of the next ids. final: no ids follow, so an incomplete character ends with them."""
        pieces, last = [self._piece(id) for id in ids], len(ids) - 1
        return [
            _INVALID.sub(INCOMPLETE, self._decoder.decode(piece, final=final and i == last))
            for i, piece in enumerate(pieces)
        ]

    def _piece(self, id: int) -> bytes:
        """Returns what the next token adds: the first one without the space that Llama's tokenizers put before it."""
        piece = b"" if id in self._tokenizer.special else self._tokenizer.piece(id)
        if self._before is None:
            return piece
        self._before.append(id)
        if not piece:
            return piece
        decoded, self._before = self._tokenizer.decode(self._before).encode(), None
        return piece[1:] if _n_spaces(piece) > _n_spaces(decoded) else piece


class _Listing:
    """Lists the tokens of one choice with their log-probabilities, as completions have them."""

    def __init__(self, tokenizer: Tokenizer, n_top: int):
        """n_top: most likely tokens to list."""
        self._tokenizer, self._n_top = tokenizer, max(1, n_top)
        self._tokens = _Tokens(tokenizer)
        self._offset = 0

    def skip(self, ids: Sequence[int], n_chars: int) -> None:
        """Passes over the prompt. n_chars: how much of its text is not in the choice's text."""
        self._offset = sum(map(len, self._tokens.texts(ids, final=False))) - n_chars

    def added(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float | None],
        top: Sequence[dict[int, float] | None],
        *,
        final: bool,
    ) -> Body:
        """Lists the next tokens. final: no more follow."""
        texts = self._tokens.texts(ids, final=final)
        *offsets, self._offset = accumulate(map(len, texts), initial=self._offset)
        return {
            "tokens": texts,
            "token_logprobs": list(logprobs),
            "top_logprobs": [
                None if likely is None else self._top(id, value, likely)
                for id, value, likely in zip(ids, logprobs, top, strict=True)
            ],
            "text_offset": offsets,
        }

    def ended(self, end: EndToken | None) -> Body:
        """Lists the token that ended the reply, if one did. Its text is empty, because the choice's text lacks it."""
        if end is None:
            return self.added([], [], [], final=True)
        return {
            "tokens": [""],
            "token_logprobs": [end.logprob],
            "top_logprobs": [self._top(*end)],
            "text_offset": [self._offset],
        }

    def _top(self, id: int, logprob: float | None, likely: dict[int, float]) -> dict[str, float]:
        """Returns the most likely tokens and the chosen one. Of several with the same text, the likeliest counts."""
        found: dict[str, float] = {}
        chosen = [] if logprob is None else [(id, logprob)]
        for one, value in [*_best(likely, self._n_top), *chosen]:
            text = self._tokenizer.piece(one).decode(errors="replace")
            found[text] = max(value, found.get(text, value))
        return found


@dataclass(kw_only=True)
class CompletionBodies:
    """The choices of completions."""

    tokenizer: Tokenizer
    n_top: int | None  # most likely tokens to list; None: no log-probabilities
    echo: bool
    _streamed: dict[int, _Listing] = field(default_factory=dict)  # of choices whose chunks list tokens

    def whole(self, index: int, choice: Choice, reply: Reply) -> Body:
        """Returns a finished choice."""
        text = (self._echoed(choice) if self.echo else "") + reply.text
        return self._choice(index, text, self._logprobs(choice, reply), reply.finish_reason)

    def first(self, index: int, choice: Choice) -> Body | None:
        """Returns a chunk with the prompt, if it is asked for."""
        return self._choice(index, self._echoed(choice), None, None) if self.echo else None

    def chunk(self, index: int, choice: Choice, output: Output) -> Body:
        """Returns a chunk with new text, or the last one. The lists of all chunks are together those of `whole`."""
        logprobs = None
        if self.n_top is not None:
            if index not in self._streamed:
                self._streamed[index] = self._after_prompt(choice, self.n_top)
            final = output.finish_reason is not None
            listing = self._streamed[index]
            logprobs = listing.added(output.token_ids, output.logprobs, output.top_logprobs, final=final)
            if output.reply:
                logprobs = _joined(logprobs, listing.ended(output.reply.end_token))
        return self._choice(index, output.text, logprobs, output.finish_reason)

    def _choice(self, index: int, text: str, logprobs: Body | None, finish_reason: str | None) -> Body:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _echoed(self, choice: Choice) -> str:
        """Returns the text of the prompt, except for a character at its end that the reply completes and contains."""
        texts = _Tokens(self.tokenizer).texts(choice.input.ids.tolist(), final=True)
        return "".join(texts).rstrip(INCOMPLETE)

    def _after_prompt(self, choice: Choice, n_top: int) -> _Listing:
        """Returns a listing of the tokens after the prompt."""
        listing = _Listing(self.tokenizer, n_top)
        listing.skip(choice.input.ids.tolist(), 0 if self.echo else len(self._echoed(choice)))
        return listing

    def _logprobs(self, choice: Choice, reply: Reply) -> Body | None:
        """Lists the tokens of the prompt, if it is repeated, those of the reply, and the one that ended it.

        The first token of the prompt has no probability.
        """
        if self.n_top is None:
            return None
        own = reply.token_ids, reply.logprobs or [], reply.top_logprobs or []
        if not self.echo:
            listing = self._after_prompt(choice, self.n_top)
            return _joined(listing.added(*own, final=True), listing.ended(reply.end_token))
        listing = _Listing(self.tokenizer, self.n_top)
        logprobs, top = [None, *(reply.prompt_logprobs or [])], [None, *(reply.prompt_top_logprobs or [])]
        before = listing.added(choice.input.ids.tolist(), logprobs, top, final=not reply.token_ids)
        return _joined(before, listing.added(*own, final=True), listing.ended(reply.end_token))


def _joined(*parts: Body) -> Body:
    """Returns successive listings as one."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def _best(likely: dict[int, float], n: int) -> list[tuple[int, float]]:
    return sorted(likely.items(), key=lambda pair: -pair[1])[:n]


def _n_spaces(text: bytes) -> int:
    """Returns the number of spaces before a text."""
    return len(text) - len(text.lstrip(b" "))


async def events(bodies: AsyncIterator[Body]) -> AsyncIterator[bytes]:
    """Turns bodies into server-sent events, with the end mark that OpenAI's clients expect."""
    async for body in bodies:
        yield b"data: " + _dumps(body).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"
