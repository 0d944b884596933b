"""Asks for an answer, and follows how it grows."""

import math
import time
from collections.abc import AsyncIterator
from typing import Any

from llava.serve.ui.client import ApiClient, Visitor
from llava.serve.ui.conversation import Answer, Figures, Options, Token

_ALTERNATIVES = 5  # tokens that are listed for each token of an answer
_SHOW_S = 0.05  # seconds between two views of an answer


async def generate(
    client: ApiClient, visitor: Visitor, messages: list[dict[str, Any]], options: Options
) -> AsyncIterator[Answer]:
    """Yields the answer while it grows, and at its end with its figures. Raises ApiFailure."""
    body = options.body() | {
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": _ALTERNATIVES,
    }
    answer, started = Answer(options=options), time.perf_counter()
    first = last = shown = 0.0  # seconds since the start
    async for chunk in client.chat(visitor, body):
        now = time.perf_counter() - started
        for choice in chunk["choices"]:
            answer.text += choice["delta"].get("content") or ""
            listed = (choice["logprobs"] or {}).get("content") or []
            answer.tokens += map(_token, listed)
            if listed:
                first, last = first or now, now
        if usage := chunk.get("usage"):
            answer.figures, answer.is_finished = _figures(usage, first, last), True
            yield answer
        elif now - shown > _SHOW_S:
            shown = now
            yield answer


def _token(listed: dict[str, Any]) -> Token:
    return Token(
        piece=bytes(listed["bytes"]),
        probability=math.exp(listed["logprob"]),
        alternatives=tuple((one["token"], math.exp(one["logprob"])) for one in listed["top_logprobs"]),
    )


def _figures(usage: dict[str, Any], first: float, last: float) -> Figures:
    return Figures(
        first_token_s=first,
        total_s=last,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        tokens=usage["completion_tokens"],
    )
