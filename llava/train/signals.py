"""Handles early exits of a run: on a signal, when a worker process dies, or when GPU memory runs out."""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import TypeVar

import torch

from llava.errors import LlavaError

T = TypeVar("T")

_SIGCHLD: int | None = getattr(signal, "SIGCHLD", None)  # absent on Windows
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WORKER_DIED = "a data loading process was killed, often because memory (or /dev/shm) ran out; if so, lower num_workers"
_TORCH_WORKER_DIED = "DataLoader worker"  # start of the message of torch's RuntimeError
_JOIN_TIMEOUT_S = 5.0
_abandoned: list[object] = []  # see `_abandon`


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM, which schedulers send to stop a job, raise KeyboardInterrupt, as Ctrl-C does."""
    if not _in_main_thread():
        yield
        return
    with _handlers_restored(*_STOP_SIGNALS, *_child_signals()):
        for number in _STOP_SIGNALS:
            signal.signal(number, _interrupt)
        yield


def _interrupt(number: int, frame: FrameType | None) -> None:
    # workers also receive the signal and exit; torch's SIGCHLD handler must not raise an additional error
    for child_signal in _child_signals():
        signal.signal(child_signal, _ignore)
    raise KeyboardInterrupt


@contextmanager
def defer_signals() -> Iterator[None]:
    """Defers SIGINT and SIGTERM until the block ends, then raises the first signal received."""
    if not _in_main_thread():
        yield
        return
    received: list[int] = []
    with _handlers_restored(*_STOP_SIGNALS):
        for number in _STOP_SIGNALS:
            signal.signal(number, lambda number, frame: received.append(number))
        yield
    for signal_number in received[:1]:
        signal.raise_signal(signal_number)


class StopRequest:
    """Set by a signal in a run of several ranks, which must agree on the step after which they stop."""

    def __init__(self) -> None:
        self.received = False


class AgreedStop(KeyboardInterrupt):
    """Raised by all ranks at the same step, so that they can save a checkpoint together."""


@contextmanager
def collect_stop() -> Iterator[StopRequest]:
    """Records the first SIGINT or SIGTERM instead of raising KeyboardInterrupt. A second signal raises it."""
    stop = StopRequest()

    def record(number: int, frame: FrameType | None) -> None:
        if stop.received:
            _interrupt(number, frame)
        stop.received = True

    if not _in_main_thread():
        yield stop
        return
    with _handlers_restored(*_STOP_SIGNALS):
        for number in _STOP_SIGNALS:
            signal.signal(number, record)
        yield stop


def init_worker(worker_id: int) -> None:
    """`worker_init_fn` for the DataLoader. Makes a worker ignore Ctrl-C and hides errors caused by the parent's exit.

    By default, the thread that sends tensors to the parent prints a traceback if the parent exits during a transfer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _report_unless_parent_exited


def _report_unless_parent_exited(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def iterate_loader(loader: Iterator[T]) -> Iterator[T]:
    """Iterates over a DataLoader's iterator and reports the death of a worker in one line.

    The error is raised only while the next batch is being fetched. By default, torch's SIGCHLD handler can raise
    anywhere in the main thread, even while the run is shutting down.
    """
    try:
        yield from loader if not _in_main_thread() or _SIGCHLD is None else _with_errors_only_in_next(loader, _SIGCHLD)
    except (_WorkerDied, ConnectionError, EOFError):  # the latter two: while sending a tensor
        raise LlavaError(_WORKER_DIED) from None
    except RuntimeError as error:
        if not str(error).startswith(_TORCH_WORKER_DIED):
            raise
        raise LlavaError(_WORKER_DIED) from None
    finally:
        workers = getattr(loader, "_workers", ())
        if any(worker.exitcode for worker in workers):
            _abandon(loader, workers)


class _WorkerDied(BaseException):
    """No `Exception`, because the DataLoader would catch that and wait for locks that the dead worker may hold."""


def _with_errors_only_in_next(loader: Iterator[T], child_signal: int) -> Iterator[T]:
    torch_handler = signal.getsignal(child_signal)

    def raise_if_worker_died(number: int, frame: FrameType | None) -> None:
        try:
            if callable(torch_handler):
                torch_handler(number, frame)
        except RuntimeError as error:
            if not str(error).startswith(_TORCH_WORKER_DIED):
                raise
            raise _WorkerDied from None

    while True:
        signal.signal(child_signal, raise_if_worker_died)
        try:
            raise_if_worker_died(child_signal, None)
            batch = next(loader, None)
        finally:
            signal.signal(child_signal, _ignore)
        if batch is None:
            return
        yield batch


def _abandon(loader: object, workers: Sequence[BaseProcess]) -> None:
    """Stops the remaining workers and keeps the iterator until Python exits, because its destructor could hang.

    The destructor sets an event that is shared with the workers. A worker that a signal killed while it held the
    event's lock never releases it.
    """
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(timeout=_JOIN_TIMEOUT_S)
    _abandoned.append(loader)


@contextmanager
def explain_failures() -> Iterator[None]:
    """Converts CUDA out-of-memory errors into one-line LlavaErrors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LlavaError(
            f"out of GPU memory ({str(error).split('. ')[0]:.100}); lower micro_batch_size or max_length, "
            "or set gradient_checkpointing=true; add --plan to the command for a breakdown of memory use"
        ) from None


def _in_main_thread() -> bool:
    """Returns whether the caller runs in the main thread, the only thread that can set signal handlers in Python."""
    return threading.current_thread() is threading.main_thread()


def _child_signals() -> tuple[int, ...]:
    return () if _SIGCHLD is None else (_SIGCHLD,)


@contextmanager
def _handlers_restored(*numbers: int) -> Iterator[None]:
    previous = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
