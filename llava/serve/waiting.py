"""Awaits work in the event loop, and cancels what is no longer needed."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from llava.serve.errors import ApiError

T = TypeVar("T")


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns all results, in order. Raises the first error, and cancels the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _cancelled(tasks)


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result. Raises ApiError if it takes longer, and cancels the work.

    Unlike `asyncio.wait_for` before Python 3.12, it never loses a cancellation.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=max(0.0, seconds))
        if task.done():
            return task.result()
        raise took_too_long()
    finally:
        await _cancelled([task])


async def _cancelled(tasks: Iterable["asyncio.Future[Any]"]) -> None:
    tasks = list(tasks)
    for one in tasks:
        one.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def took_too_long() -> ApiError:
    """Returns the error of a request that has exceeded its time limit."""
    return ApiError(408, "the request took too long; ask for fewer tokens or smaller pictures")
