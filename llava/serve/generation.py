"""The choices of one request: engine requests that run together, and their outputs as they come."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava.engine.capture import Capture
from llava.engine.reply import Output
from llava.engine.sampling_params import SamplingParams
from llava.errors import LlavaError
from llava.preprocess.inputs import ModelInput
from llava.serve.engine_thread import EngineThread
from llava.serve.metrics import Metrics
from llava.serve.traces import describe
from llava.serve.waiting import took_too_long


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the engine computes for one choice."""

    input: ModelInput
    params: SamplingParams
    capture: Capture | None = None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Whose request it is, and when it arrived."""

    adapter: str | None
    salt: bytes
    arrived: float  # `time.perf_counter` timestamp
    prepare_s: float  # seconds from then until its input was prepared
    span: Any = None  # of OpenTelemetry; None: the request is not traced


class Generation:
    """The choices of one request, in the event loop."""

    def __init__(
        self,
        engine: EngineThread,
        choices: Sequence[Choice],
        origin: Origin,
        metrics: Metrics,
        *,
        deadline: float,
        on_end: Callable[[], None],
    ):
        """deadline: `time.perf_counter` timestamp at which it is ended. on_end: called once after `start`."""
        self._engine, self._origin, self._metrics, self._deadline = engine, origin, metrics, deadline
        self.choices = choices
        self._on_end: Callable[[], None] | None = on_end
        self._queue: asyncio.Queue[tuple[int, Output | LlavaError]] = asyncio.Queue()
        self._numbers: dict[int, int] = {}  # engine requests of unfinished choices, by index
        self._last: dict[int, float] = {}  # when a choice had its last output
        self._timer: asyncio.TimerHandle | None = None  # of the deadline

    async def start(self) -> None:
        """Adds all choices to the engine, or none of them. Raises LlavaError if one does not fit."""
        adding = asyncio.ensure_future(asyncio.to_thread(self._add))
        try:
            await asyncio.shield(adding)
        except asyncio.CancelledError:  # the client has gone; what has been added has to be ended
            adding.add_done_callback(lambda _: self._end_choices())
            raise
        except LlavaError:
            self._end_choices()
            raise
        left = self._deadline - time.perf_counter()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, left), self._expire)

    def _expire(self) -> None:
        self.abort()  # now: the response may wait for a client that does not read it
        self._queue.put_nowait((0, took_too_long()))

    def _add(self) -> None:
        for index, one in enumerate(self.choices):
            self._numbers[index] = self._engine.add(
                one.input,
                one.params,
                lambda output, index=index: self._queue.put_nowait((index, output)),  # type: ignore[misc]
                adapter=self._origin.adapter,
                salt=self._origin.salt,
                capture=one.capture,
                prepare_s=self._origin.prepare_s,
            )

    def _end_choices(self) -> None:
        while self._numbers:
            self._engine.abort(self._numbers.popitem()[1])

    def abort(self) -> None:
        """Ends all choices that have not finished. Can be called more than once."""
        self._end_choices()
        if self._timer:
            self._timer.cancel()
        if self._on_end:
            self._on_end()
            self._on_end = None

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Yields (index of the choice, output) until all have finished. Raises the error of one, and ends the others.

        Raises ApiError at the deadline.
        """
        unfinished = len(self.choices)
        try:
            while unfinished:
                index, output = await self._queue.get()  # `wait_for` loses cancellations before Python 3.12
                if isinstance(output, LlavaError):
                    raise output
                if output.finish_reason:
                    unfinished -= 1
                    self._numbers.pop(index, None)
                self._observe(index, output)
                if output.error:
                    raise output.error
                yield index, output
        finally:
            self.abort()

    def _observe(self, index: int, output: Output) -> None:
        now = time.perf_counter()
        if output.token_ids or output.finish_reason:
            self._metrics.output(now, self._origin.arrived, self._last.get(index), len(output.token_ids))
            self._last[index] = now
        if output.reply:
            self._metrics.finished(output.reply, now - self._origin.arrived)
            if self._origin.span:
                describe(self._origin.span, output.reply)
