"""The state of a server, and how it loads its model."""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from llava.assistant import Assistant
from llava.errors import LlavaError
from llava.serve.engine_thread import stopped
from llava.serve.errors import ApiError
from llava.serve.metrics import Metrics
from llava.serve.service import Service
from llava.serve.settings import Settings
from llava.serve.ui.gate import Streams
from llava.warmup import warm_up

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(kw_only=True)
class State:
    """What the routes share. The service is there once the model is loaded."""

    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    service: Service | None = None
    draining: bool = False  # finish what runs, and take nothing new
    error: LlavaError | None = None  # why the model could not be loaded
    page_streams: Streams = field(default_factory=dict)  # answers that end when a page is closed

    @property
    def is_loading(self) -> bool:
        """Whether the model is still being loaded."""
        return self.service is None and self.error is None and not self.draining

    @property
    def ready(self) -> Service:
        """The service, if requests are accepted. Raises ApiError."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        if self.service is None:
            raise ApiError(503, "the model is still being loaded; try again later", code="loading")
        if not self.service.is_alive:
            raise stopped()
        return self.service


async def load_model(
    state: State,
    load: Callable[[], Assistant],
    on_ready: Callable[[], None] | None,
    on_failure: Callable[[LlavaError], None] | None,
) -> None:
    try:
        service = Service(await _in_daemon_thread(partial(_warmed, load)), state.settings, state.metrics)
        await service.start()
    except Exception as error:
        if not isinstance(error, LlavaError):
            log.exception("the model cannot be loaded")
            error = LlavaError(f"the model cannot be loaded: {type(error).__name__}: {error}")
        state.error = error
        if on_failure:
            on_failure(error)
        return
    state.service = service
    if on_ready:
        on_ready()


def _warmed(load: Callable[[], Assistant]) -> Assistant:
    """Loads a model. On a GPU, captures the graphs for all batch sizes, so that no request has to wait for that."""
    assistant = load()
    if assistant.device.type == "cuda":
        try:
            warm_up(assistant)
        except LlavaError as error:
            log.warning("the model cannot be warmed up, so the first requests take longer (%s)", error)
    return assistant


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """Like `asyncio.to_thread`, but Python does not wait for the thread when it exits."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            outcome = partial(_set, future.set_exception, future, error)
        else:
            outcome = partial(_set, future.set_result, future, result)
        with suppress(RuntimeError):  # the event loop has been closed
            loop.call_soon_threadsafe(outcome)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await future


def _set(setter: Callable[[Any], None], future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        setter(value)
