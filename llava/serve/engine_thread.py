"""Runs the engine in a thread of its own, and brings its outputs to the event loop."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from llava.engine.capture import Capture
from llava.engine.engine import Engine
from llava.engine.reply import Output, joined
from llava.engine.sampling_params import SamplingParams
from llava.errors import LlavaError
from llava.preprocess.inputs import ModelInput
from llava.serve.errors import ApiError

log = logging.getLogger(__name__)

Receive = Callable[[Output | LlavaError], None]
_MAX_FAILURES = 3  # steps in a row


class EngineThread:
    """Computes steps as long as there are requests. The outputs of each are received in the event loop."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop):
        self.engine, self._loop = engine, loop
        self._receivers: dict[int, Receive] = {}  # by request
        self._outputs: list[tuple[Receive, Output | LlavaError]] = []  # that the event loop has not received yet
        self._changed = threading.Condition()  # guards the receivers, the outputs and `_stopping`
        self._stopping = False
        self._failures = 0  # steps that failed in a row
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread after the step in progress. Unfinished requests receive an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests are computed."""
        return self._thread.is_alive() and not self._stopping

    def add(
        self,
        input: ModelInput,
        params: SamplingParams,
        receive: Receive,
        *,
        adapter: str | None = None,
        salt: bytes = b"",
        capture: Capture | None = None,
        prepare_s: float = 0.0,
    ) -> int:
        """Adds a request, from any thread, and returns its number. Raises LlavaError if it does not fit."""
        _ = input.digests  # computed here, outside of the lock
        with self._changed:
            if not self.is_alive:
                raise stopped()
            number = self.engine.add_request(
                input, params, adapter=adapter, salt=salt, capture=capture, prepare_s=prepare_s
            )
            self._receivers[number] = receive
            self._changed.notify_all()
        return number

    def abort(self, number: int) -> None:
        """Ends a request in the next step, if it has not finished. It may still receive earlier outputs."""
        with self._changed:
            if self._receivers.pop(number, None):
                self.engine.abort(number)
                self._changed.notify_all()

    def _run(self) -> None:
        try:
            while self._wait():
                self._deliver(self._step())
        except Exception:  # `_step` has logged it
            log.critical("the engine has stopped, as one step after the other failed")
        finally:
            with self._changed:
                self._stopping = True
                receivers, self._receivers = list(self._receivers.values()), {}
                self._send([(receive, stopped()) for receive in receivers])

    def _wait(self) -> bool:
        """Waits for requests. Returns whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self.engine.has_requests)
            return not self._stopping

    def _step(self) -> list[Output]:
        """Computes a step. After an error outside of any request, the engine computes all of them again."""
        try:
            outputs = self.engine.step()
        except Exception:
            log.exception("a step failed")
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                raise
            return []
        self._failures = 0
        return outputs

    def _deliver(self, outputs: Sequence[Output]) -> None:
        received: list[tuple[Receive, Output | LlavaError]] = []
        with self._changed:
            for output in outputs:
                if receive := self._receivers.get(output.request):
                    received.append((receive, output))
                if output.finish_reason:
                    self._receivers.pop(output.request, None)
            self._send(received)

    def _send(self, outputs: Sequence[tuple[Receive, Output | LlavaError]]) -> None:
        """Passes outputs to the event loop, together with those that it has not received yet."""
        is_first = outputs and not self._outputs
        self._outputs += outputs
        if is_first:
            with suppress(RuntimeError):  # the event loop has been closed
                self._loop.call_soon_threadsafe(self._receive)

    def _receive(self) -> None:
        """Passes the outputs on in the event loop; those of the same request are joined."""
        with self._changed:
            outputs, self._outputs = self._outputs, []
        replies: dict[Receive, list[Output]] = {}
        for receive, output in outputs:
            if isinstance(output, Output):
                replies.setdefault(receive, []).append(output)
        for receive, of_one in replies.items():
            if whole := [one for one in of_one if not one.error]:
                receive(joined(whole))
            if of_one[-1].error:  # by itself, as it is raised where it is read
                receive(of_one[-1])
        for receive, output in outputs:
            if isinstance(output, LlavaError):
                receive(output)


def use_threads(n: int | None) -> int:
    """Sets the number of CPU threads that compute, and returns the previous number.

    Without a number, one core is left for HTTP and pictures.

    Otherwise, all threads would wait whenever another process takes one of their cores.
    """
    before = torch.get_num_threads()
    if n is None and "OMP_NUM_THREADS" not in os.environ:
        n = max(1, before - 1)
    if n is not None:
        torch.set_num_threads(n)
    return before


def stopped() -> ApiError:
    """Returns the error of all requests once the engine has stopped."""
    return ApiError(503, "the engine has stopped; restart the server", code="engine_stopped")
