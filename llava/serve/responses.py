"""The bodies of responses: chats and completions, whole and in chunks of a stream."""

import codecs
import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from llava.engine.detokenize import INCOMPLETE
from llava.engine.reply import Output, Reply
from llava.preprocess.tokenizer import Tokenizer
from llava.serve.generation import Choice

Body = dict[str, Any]
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


@dataclass(kw_only=True)
class CompletionBodies:
    """The choices of completions."""

    tokenizer: Tokenizer
    n_top: int | None  # most likely tokens to list; None: no log-probabilities
    echo: bool
    _sent: dict[int, int] = field(default_factory=dict)  # characters of each choice's text that have been sent

    def whole(self, index: int, choice: Choice, reply: Reply) -> Body:
        """Returns a finished choice."""
        text = (self._echoed(choice) if self.echo else "") + reply.text
        logprobs = self._logprobs(choice, reply) if self.n_top is not None else None
        return self._choice(index, text, logprobs, reply.finish_reason)

    def first(self, index: int, choice: Choice) -> Body | None:
        """Returns a chunk with the prompt, if it is asked for."""
        if not self.echo:
            return None
        prompt = self._echoed(choice)
        self._sent[index] = len(prompt)
        return self._choice(index, prompt, None, None)

    def chunk(self, index: int, output: Output) -> Body:
        """Returns a chunk with new text, or the last one."""
        start = self._sent.get(index, 0)
        self._sent[index] = start + len(output.text)
        logprobs = None
        if self.n_top is not None:
            texts = _texts([self._piece(id) for id in output.token_ids])
            logprobs = self._listed(texts, output.token_ids, output.logprobs, output.top_logprobs, start)
        return self._choice(index, output.text, logprobs, output.finish_reason)

    def _choice(self, index: int, text: str, logprobs: Body | None, finish_reason: str | None) -> Body:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _echoed(self, choice: Choice) -> str:
        """Returns the text of the prompt, except for a character at its end that the reply completes and contains."""
        return "".join(_texts(self._pieces(choice.input.ids.tolist()))).rstrip(INCOMPLETE)

    def _pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Returns what each token adds to a text, without the space that Llama's tokenizers put before it."""
        pieces = [self._piece(id) for id in ids]
        first = next((i for i, piece in enumerate(pieces) if piece), None)
        if first is not None and _n_spaces(b"".join(pieces)) > _n_spaces(self.tokenizer.decode(ids).encode()):
            pieces[first] = pieces[first][1:]
        return pieces

    def _logprobs(self, choice: Choice, reply: Reply) -> Body:
        """Lists the tokens of the prompt, if it is repeated, and those of the reply. The first has no probability."""
        prompt: list[int] = choice.input.ids.tolist()
        texts, n = _texts(self._pieces([*prompt, *reply.token_ids])), len(prompt)
        start = sum(map(len, texts[:n])) if self.echo else 0
        found = self._listed(texts[n:], reply.token_ids, reply.logprobs or [], reply.top_logprobs or [], start)
        if not self.echo:
            return found
        logprobs, top = [None, *(reply.prompt_logprobs or [])], [None, *(reply.prompt_top_logprobs or [])]
        before = self._listed(texts[:n], prompt, logprobs, top, 0)
        return {name: before[name] + found[name] for name in found}

    def _listed(
        self,
        texts: Sequence[str],
        ids: Sequence[int],
        logprobs: Sequence[float | None],
        top: Sequence[dict[int, float] | None],
        start: int,
    ) -> Body:
        """texts: of each token. start: characters before the first of them."""
        return {
            "tokens": list(texts),
            "token_logprobs": list(logprobs),
            "top_logprobs": [
                None if likely is None else self._top(id, value, likely)
                for id, value, likely in zip(ids, logprobs, top, strict=True)
            ],
            "text_offset": list(accumulate(map(len, texts), initial=start))[:-1],
        }

    def _piece(self, id: int) -> bytes:
        """Returns what a token adds to the text: special tokens add nothing."""
        return b"" if id in self.tokenizer.special else self.tokenizer.piece(id)

    def _top(self, id: int, logprob: float | None, likely: dict[int, float]) -> dict[str, float]:
        """Returns the most likely tokens and the chosen one. Of several with the same text, the likeliest counts."""
        found: dict[str, float] = {}
        chosen = [] if logprob is None else [(id, logprob)]
        for one, value in [*_best(likely, max(1, self.n_top or 0)), *chosen]:
            text = self.tokenizer.piece(one).decode(errors="replace")
            found[text] = max(value, found.get(text, value))
        return found


def _best(likely: dict[int, float], n: int) -> list[tuple[int, float]]:
    return sorted(likely.items(), key=lambda pair: -pair[1])[:n]


def _texts(pieces: Sequence[bytes]) -> list[str]:
    """Returns the text of each token. Together they are the whole text: a character belongs to the last of its tokens.

    Each byte that is not part of a character becomes U+FFFD, as in SentencePiece.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    last = len(pieces) - 1
    return [_INVALID.sub(INCOMPLETE, decoder.decode(piece, final=i == last)) for i, piece in enumerate(pieces)]


def _n_spaces(text: bytes) -> int:
    """Returns the number of spaces before a text."""
    return len(text) - len(text.lstrip(b" "))


async def events(bodies: AsyncIterator[Body]) -> AsyncIterator[bytes]:
    """Turns bodies into server-sent events, with the end mark that OpenAI's clients expect."""
    async for body in bodies:
        yield b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"
