"""Work that is no longer needed is cancelled."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from llava.serve.errors import ApiError
from llava.serve.waiting import all_of, within


class Work:
    """Work that takes some time, and remembers how it ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def do(self, seconds: float, error: Exception | None = None) -> float:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("done")
        if error:
            raise error
        return seconds


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))


def test_all_results_come_in_order() -> None:
    work = Work()
    assert run(all_of([work.do(0.05), work.do(0.0), work.do(0.02)])) == [0.05, 0.0, 0.02]


def test_an_error_cancels_the_rest() -> None:
    work = Work()
    with pytest.raises(ValueError, match="first"):
        run(all_of([work.do(30), work.do(0.01, ValueError("first")), work.do(30)]))
    assert work.ended == ["done", "cancelled", "cancelled"]


def test_work_that_takes_too_long_is_cancelled() -> None:
    work = Work()
    with pytest.raises(ApiError, match="took too long") as caught:
        run(within(0.05, work.do(30)))
    assert caught.value.status == 408
    assert work.ended == ["cancelled"]


@pytest.mark.parametrize("seconds", [1.0, 20.0])
def test_the_result_and_the_error_of_work_in_time_are_its_own(seconds: float) -> None:
    assert run(within(seconds, Work().do(0.01))) == 0.01
    with pytest.raises(ValueError, match="own"):
        run(within(seconds, Work().do(0.01, ValueError("own"))))


@pytest.mark.parametrize("n_turns", range(5))
def test_a_cancellation_is_not_lost_when_the_work_ends_at_the_same_time(n_turns: int) -> None:
    async def test() -> None:
        gate = asyncio.Event()
        waiting = asyncio.ensure_future(within(10, _opened(gate)))
        await asyncio.sleep(0.01)
        gate.set()
        for _ in range(n_turns):
            await asyncio.sleep(0)
        if waiting.done():
            return
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(test())


async def _opened(gate: asyncio.Event) -> None:
    await gate.wait()
