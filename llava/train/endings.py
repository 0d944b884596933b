"""How a run ends before its time: by a signal, or by what its machine lacks."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from llava.errors import LlavaError


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
    signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    raise KeyboardInterrupt


def leave_interrupts(worker: int) -> None:
    """At the start of a worker process: Ctrl-C is its parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
        raise LlavaError(
            "a worker process was ended from outside; with too little memory (/dev/shm, too) set fewer workers"
        ) from None
