"""Runs a job over a range of indices in worker processes. What the job holds is sent to each of them only once."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from llava.data.samples import WORKERS_START, starting_workers
from llava.data.workers import available_cpus, capped_workers
from llava.errors import DataError

CHUNK = 64  # indices per worker task
Progress = Callable[[int, int], None]  # indices done, total
T = TypeVar("T")


def run_in_chunks(
    job: Callable[[range], T], n: int, workers: int | None, progress: Progress = lambda done, total: None
) -> Iterator[T]:
    """Yields the results of a job for the indices from 0 to `n`, a chunk at a time, in order.

    workers: number of processes (0: run in this process; None: one per CPU). Raises DataError if one of them is killed.
    """
    chunks = [range(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)]
    asked = available_cpus() if workers is None else capped_workers(workers, "--workers")
    n_processes = min(len(chunks) if len(chunks) > 1 else 0, asked)
    for chunk, found in zip(chunks, _map(job, chunks, n_processes), strict=True):
        yield found
        progress(chunk.stop, n)


def _map(job: Callable[[range], T], chunks: list[range], workers: int) -> Iterator[T]:
    if workers == 0:
        yield from map(job, chunks)
        return
    context = multiprocessing.get_context(WORKERS_START)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,))
    try:
        with starting_workers():
            found = pool.map(_run, chunks)
        yield from found
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, possibly because memory ran out; if so, reduce --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_job: Callable[[range], Any] | None = None  # set once per worker process, so that it is not sent with every task


def _start_worker(job: Callable[[range], Any]) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # Pillow warns about some pictures that it reads correctly


def _exit_with_parent() -> None:
    """Exits when the parent process dies; otherwise the worker would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    assert parent
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run(indices: range) -> Any:
    assert _job
    return _job(indices)
