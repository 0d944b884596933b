"""Prepares the inputs of many requests in threads, ahead of the engine's steps.

Pillow, simplejpeg and PyTorch do not hold Python's lock while they decode and resize, so threads run in parallel, and
no process has to be started, fed or restarted.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

Request = TypeVar("Request")
Input = TypeVar("Input")
_MAX_THREADS = 4


class Prepared(NamedTuple, Generic[Input]):
    """A prepared input, and the seconds that its preparation took."""

    input: Input
    seconds: float


class Prefetch(Generic[Request, Input]):
    """The prepared inputs of some requests, in their order. A context manager, which stops the threads at its end."""

    def __init__(
        self, prepare: Callable[[Request], Input], requests: Iterable[Request], *, n_threads: int, n_ahead: int
    ):
        """n_threads: 0 prepares each input when it is taken. n_ahead: maximum number of prepared inputs that wait.

        Requests are read as they are prepared, so they may be made on the way.
        """
        self._prepare, self._requests = prepare, iter(requests)
        self._threads = ThreadPoolExecutor(n_threads, "prepare") if n_threads else None
        self._n_ahead = max(n_ahead, n_threads)
        self._futures: deque[Future[Prepared[Input]]] = deque()
        self._submit()

    def __enter__(self) -> "Prefetch[Request, Input]":
        return self

    def __exit__(self, *error: object) -> None:
        if self._threads:
            self._threads.shutdown(cancel_futures=True)

    @property
    def is_ready(self) -> bool:
        """Whether `take` returns without waiting for a thread."""
        return not self._futures or self._futures[0].done()

    def take(self) -> Prepared[Input]:
        """Returns the next input. Raises what preparing it raised."""
        if not self._futures:
            return self._timed(next(self._requests))
        future = self._futures.popleft()
        self._submit()
        return future.result()

    def _submit(self) -> None:
        if self._threads:
            for request in islice(self._requests, self._n_ahead - len(self._futures)):
                self._futures.append(self._threads.submit(self._timed, request))

    def _timed(self, request: Request) -> Prepared[Input]:
        started = time.perf_counter()
        return Prepared(self._prepare(request), time.perf_counter() - started)


def n_preparing_threads(n_requests: int) -> int:
    """Returns how many threads prepare inputs while a GPU computes; 0 if there is nothing to do at the same time."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_threads = min(_MAX_THREADS, n_cores, n_requests)
    return n_threads if n_threads > 1 else 0
