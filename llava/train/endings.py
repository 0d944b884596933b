"""How a run ends before its time: by a signal, or by what its machine lacks."""

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

_WORKER_ENDED = "a worker process was ended from outside; with too little memory (/dev/shm, too) set fewer workers"


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, by which schedulers end a job, ends it as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _stop(signum: int, frame: FrameType | None) -> None:
    """torch's handler of SIGCHLD would raise on top, as workers of a group that is signalled end at once."""
    signal.signal(signal.SIGCHLD, _stay)
    raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What is done here is done whole; a signal that comes is answered behind it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind in before:
        signal.signal(kind, lambda signum, frame: came.append(signum))
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    for signum in came[:1]:
        signal.raise_signal(signum)


def leave_interrupts(worker: int) -> None:
    """At the start of a worker process: Ctrl-C is its parent's to answer, and a parent that has gone is no error.

    The thread that hands tensors over would print a traceback when its parent ends in the middle of one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _tell_unless_parent_went


def _tell_unless_parent_went(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def drawn(loader: Iterator[T]) -> Iterator[T]:
    """The loader's batches. A worker that dies raises while one is waited for, and nowhere else.

    torch raises in a handler of SIGCHLD: wherever the run is, in what ends it too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield from loader
        return
    raise_if_dead = signal.getsignal(signal.SIGCHLD)
    while True:
        signal.signal(signal.SIGCHLD, raise_if_dead)
        try:
            if callable(raise_if_dead):
                raise_if_dead(signal.SIGCHLD, None)
            batch = next(loader, None)
        except (ConnectionError, EOFError):  # it died while it handed a tensor over
            raise LlavaError(_WORKER_ENDED) from None
        finally:
            signal.signal(signal.SIGCHLD, _stay)
        if batch is None:
            return
        yield batch


def _stay(signum: int, frame: FrameType | None) -> None:
    pass


@contextmanager
def in_one_line() -> Iterator[None]:
    """What a machine does to a run: a GPU's memory is full, a worker was killed."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LlavaError(
            f"the GPU's memory is full ({str(error).split('. ')[0]:.100}); lower micro_batch or max_length, "
            "or set checkpointing=true; llava train --plan says what takes it"
        ) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise LlavaError(_WORKER_ENDED) from None
