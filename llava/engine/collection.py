"""Keeps the garbage collector from stopping the engine."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OF_PYTHON = 10_000  # Python 3.12 sets some hundred objects aside when it starts


@contextmanager
def set_aside() -> Iterator[None]:
    """Inside, the garbage collector does not visit the objects that exist now.

    A full collection visits several hundred thousand objects of PyTorch and other libraries, which takes 0.1 to 0.2 s,
    and a GPU has nothing to compute meanwhile. Objects of requests are still collected.
    """
    if gc.get_freeze_count() > _OF_PYTHON:  # whoever has done it before ends it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
