"""Asks for an answer, and follows how it grows."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

from llava.serve.ui.client import ApiClient, Visitor
from llava.serve.ui.conversation import Answer, Figures, Token

_T = TypeVar("_T")
_ALTERNATIVES = 5  # tokens that are listed for each token of an answer
_SHOW_S = 0.05  # seconds between two views of an answer


async def generate(
    client: ApiClient, visitor: Visitor, messages: list[dict[str, Any]], answer: Answer
) -> AsyncIterator[None]:
    """Lets an empty answer grow, and yields whenever it is worth a look. Raises ApiFailure."""
    body = answer.options.body() | {
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": _ALTERNATIVES,
    }
    started = time.perf_counter()
    first = last = shown = 0.0  # seconds since the start
    async for chunk in _until(answer.stop, client.chat(visitor, body)):
        now = time.perf_counter() - started
        for choice in chunk["choices"]:
            answer.text += choice["delta"].get("content") or ""
            listed = (choice["logprobs"] or {}).get("content") or []
            answer.tokens += map(_token, listed)
            if listed:
                first, last = first or now, now
        if usage := chunk.get("usage"):
            answer.figures = _figures(usage, first, last)
        if now - shown > _SHOW_S:
            shown = now
            yield
    answer.is_finished = True
    yield


async def _until(stop: asyncio.Event, chunks: AsyncGenerator[_T, None]) -> AsyncIterator[_T]:
    """Yields chunks until `stop` is set, also while none comes. Closes `chunks`."""
    stopping = asyncio.ensure_future(stop.wait())
    async with aclosing(chunks):
        try:
            while True:
                following = asyncio.ensure_future(anext(chunks, None))
                await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if stopping.done():
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)
                    return
                if (chunk := following.result()) is None:
                    return
                yield chunk
        finally:
            stopping.cancel()


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
