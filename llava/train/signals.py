"""Handles early exits of a run: on a signal, when a worker process dies, or when GPU memory runs out."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TypeVar

import torch

from llava.errors import LlavaError

T = TypeVar("T")

_SIGCHLD: int | None = getattr(signal, "SIGCHLD", None)  # absent on Windows
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WORKER_DIED = "a data loading process was killed, often because memory (or /dev/shm) ran out; if so, lower num_workers"


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
    """Iterates over a DataLoader. A worker's death raises an error only while the next batch is being fetched.

    By default, torch's SIGCHLD handler can raise anywhere in the main thread, even while the run is shutting down.
    """
    if not _in_main_thread() or _SIGCHLD is None:
        yield from loader
        return
    raise_if_worker_died = signal.getsignal(_SIGCHLD)
    while True:
        signal.signal(_SIGCHLD, raise_if_worker_died)
        try:
            if callable(raise_if_worker_died):
                raise_if_worker_died(_SIGCHLD, None)
            batch = next(loader, None)
        except (ConnectionError, EOFError):  # the worker died while sending a tensor
            raise LlavaError(_WORKER_DIED) from None
        finally:
            signal.signal(_SIGCHLD, _ignore)
        if batch is None:
            return
        yield batch


@contextmanager
def explain_failures() -> Iterator[None]:
    """Converts CUDA out-of-memory errors and errors about dead workers into one-line LlavaErrors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LlavaError(
            f"out of GPU memory ({str(error).split('. ')[0]:.100}); lower micro_batch_size or max_length, "
            "or set gradient_checkpointing=true; add --plan to the command for a breakdown of memory use"
        ) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise LlavaError(_WORKER_DIED) from None


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
