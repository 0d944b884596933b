"""Atomic writes: files and folders are written under a temporary name and renamed once they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llava.errors import CheckpointError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields a temporary file path next to `target`. The file is renamed to `target` on success and deleted on failure.

    Raises OSError if the file cannot be renamed.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(target)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def new_file(target: Path, n_bytes: int) -> Iterator[Path]:
    """Like `replacing`, but raises CheckpointError if less than `n_bytes` is free or `target` cannot be written."""
    target = target.expanduser().absolute()
    if target.is_dir():
        raise CheckpointError(f"{target}: is a folder; specify the path of a file")
    try:
        with replacing(target) as partial:
            check_space(target.parent, n_bytes, target)
            yield partial
    except OSError as error:
        raise _not_written(target, error) from None


@contextmanager
def new_folder(target: Path, n_bytes: int) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `target` on success and deleted on failure.

    Raises CheckpointError if `free_folder` rejects `target`, less than `n_bytes` is free, or a write fails.
    """
    target = free_folder(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    new_parents = [folder for folder in partial.parents if not folder.exists()]  # innermost first
    try:
        partial.mkdir(parents=True)
        check_space(partial, n_bytes, target)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise _not_written(target, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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


def check_space(folder: Path, n_bytes: int, target: Path) -> None:
    """Raises CheckpointError if the disk that contains `folder` has less than `n_bytes` of free space for `target`."""
    if (free := shutil.disk_usage(folder).free) < n_bytes:
        raise CheckpointError(
            f"{target}: needs {n_bytes / 1e9:.2f} GB, but the disk has only {free / 1e9:.2f} GB free; free up space"
        )


def _not_written(target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{target}: cannot be written ({error.strerror or error}); nothing was left behind")
