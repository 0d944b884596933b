"""Atomic writes: files and folders are written under a temporary name and renamed once they are complete.

A temporary file or folder is called `.NAME.partial-NODE-BOOT-RANDOM` and is locked (flock) by the process that writes
it. If that process is killed, the operating system releases the lock, and the next write of the same target on this
host removes the leftover. Leftovers of other hosts are not touched, because their locks may be invisible here.
"""

import glob
import hashlib
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llava.errors import CheckpointError, ConfigError, LlavaError

try:
    import fcntl
except ImportError:  # Windows; leftovers are not removed there
    fcntl = None  # type: ignore[assignment]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a host


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields an empty temporary file next to `target`, which replaces `target` on success and is deleted on failure.

    Raises OSError if the file cannot be created or renamed.
    """
    with _temporary(target, Path.touch) as partial:
        yield partial
        partial.replace(target)


@contextmanager
def new_file(target: Path, n_bytes: int) -> Iterator[Path]:
    """Like `replacing`, but raises CheckpointError if less than `n_bytes` is free or `target` cannot be written."""
    target = target.expanduser().absolute()
    if target.is_dir():
        raise CheckpointError(f"{target}: is a folder; specify the path of a file")
    try:
        with replacing(target) as partial, _named(target, instead_of=partial):
            check_space(target.parent, n_bytes, target)
            yield partial
    except OSError as error:
        raise _not_written(target, error) from None


@contextmanager
def new_folder(target: Path, n_bytes: int) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `target` on success and deleted on failure.

    Raises CheckpointError if `free_folder` rejects `target`, less than `n_bytes` is free, or a write fails. LlavaErrors
    raised in the block name `target` instead of the temporary folder.
    """
    target = free_folder(target)
    new_parents = [folder for folder in target.parents if not folder.exists()]  # innermost first
    try:
        with _temporary(target, lambda folder: folder.mkdir(parents=True)) as partial:
            with _named(target, instead_of=partial):
                check_space(partial, n_bytes, target)
                yield partial
            if target.exists():
                target.rmdir()
            partial.rename(target)
    except OSError as error:
        raise _not_written(target, error) from None
    finally:
        for folder in new_parents if not target.exists() else ():
            with suppress(OSError):
                folder.rmdir()


def free_folder(target: Path) -> Path:
    """Returns the absolute path of `target`, resolved if `target` is a symbolic link.

    Raises CheckpointError if `target` is a mount point, or exists and is not an empty folder.
    """
    target = target.expanduser().absolute()
    target = target.resolve() if target.is_symlink() else target
    if target.is_file():
        raise CheckpointError(f"{target}: is a file; specify the path of a folder")
    if target.is_mount():  # a mount point cannot be replaced by the finished folder
        raise CheckpointError(f"{target}: is a mount point; specify a folder inside it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: already exists and is not empty; remove it or specify another folder")
    return target


def check_new(target: Path) -> None:
    """Raises ConfigError if the file `target` exists, or its folder does not or cannot be written to."""
    target = target.expanduser()
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target}: already exists; remove it, or choose another file")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{target}: the folder {target.parent} is read-only; choose another folder")


def check_space(folder: Path, n_bytes: int, target: Path) -> None:
    """Raises CheckpointError if the disk that contains `folder` has less than `n_bytes` of free space for `target`.

    If `folder` does not exist yet, checks the disk of its closest existing parent.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < n_bytes:
        raise CheckpointError(
            f"{target}: needs {size_text(n_bytes)}, but the disk has only {size_text(free)} free; free up space, or "
            "choose a folder on another disk"
        )


def size_text(n_bytes: int) -> str:
    """Formats a size in the largest decimal unit that gives at least 1, such as 13.48 GB or 740 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes} byte{'s' * (n_bytes != 1)}"


def rename_in(error: LlavaError, partial: Path, target: Path) -> None:
    """Replaces the path of a temporary file or folder in an error's message with the path that the user chose."""
    error.args = tuple(str(text).replace(str(partial), str(target)) for text in error.args)


@contextmanager
def _named(target: Path, *, instead_of: Path) -> Iterator[None]:
    try:
        yield
    except LlavaError as error:
        rename_in(error, instead_of, target)
        raise


def _not_written(target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{target}: cannot be written ({error.strerror or error}); nothing was left behind")


# --------------------------------------------------------------------------------------- temporary files and folders


@contextmanager
def _temporary(target: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Creates and locks a temporary file or folder next to `target`. Removes it at the end, if it still exists."""
    _remove_leftovers(target)
    partial = target.with_name(f".{target.name}.partial-{'-'.join(_host())}-{secrets.token_hex(4)}")
    lock = None
    try:
        lock = _create_locked(partial, create)
        yield partial
    finally:
        _remove(partial)
        if lock is not None:
            os.close(lock)


def _host() -> tuple[str, str]:
    """Returns short digests of this host's name and of its current boot."""
    boot = _BOOT_ID.read_text(encoding="ascii") if _BOOT_ID.is_file() else ""
    node, boot = (hashlib.sha256(text.encode()).hexdigest()[:6] for text in (platform.node(), boot))
    return node, boot


def _create_locked(partial: Path, create: Callable[[Path], None]) -> int | None:
    """Returns a file descriptor that holds the lock, or None if this system or file system has no locks."""
    while True:
        create(partial)
        lock = _lock(partial, wait=True)
        if lock is None or partial.exists():  # false if another process took it for a leftover before it was locked
            return lock
        os.close(lock)


def _remove_leftovers(target: Path) -> None:
    """Removes what killed processes on this host left of `target`. Everything that is locked or unclear is kept."""
    prefix = f".{target.name}.partial-"
    host = _host()
    with suppress(OSError):
        for partial in target.parent.glob(f"{glob.escape(prefix)}*"):
            marks = partial.name.removeprefix(prefix).split("-")
            # a rebooted host keeps its name; a container may have another name on the same kernel
            same_host = len(marks) == 3 and (marks[0] == host[0] or marks[1] == host[1])
            if same_host and (lock := _lock(partial, wait=False)) is not None:
                _remove(partial)
                os.close(lock)


def _lock(path: Path, *, wait: bool) -> int | None:
    """Locks a file or folder. Returns None if there are no locks here or, without `wait`, if another process has it."""
    if fcntl is None:
        return None
    lock = None
    try:
        lock = os.open(path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return lock
    except OSError:
        if lock is not None:
            os.close(lock)
        return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
