"""An exclusive lock on a folder that only one process at a time may write to."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from llava.errors import LlavaError

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, file: Path, busy: LlavaError) -> Iterator[None]:
    """Holds a lock on `file` while the caller writes to `folder`. Raises `busy` if another process holds the lock.

    The operating system releases the lock when this process dies, even if forked workers are still running, because
    each worker closes its copy of the lock file. If the file system does not support locks, this function only logs a
    warning, because a soft lock (a marker file) would outlive a killed process.
    """
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise busy from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        log.warning("%s: cannot be locked (%s); do not run another command that writes to this folder", folder, reason)
    try:
        yield
    finally:
        with suppress(OSError):  # delete the file before another process can lock it
            file.unlink(missing_ok=True)
        lock.release()
