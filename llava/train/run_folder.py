"""The folder of a run. It belongs to one recipe, and one run at a time may write to it."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llava.errors import ConfigError
from llava.tensors.atomic import new_file
from llava.train.distributed import World
from llava.train.log import explain_write_errors
from llava.train.recipe import Recipe, changed_keys, to_json

log = logging.getLogger(__name__)

_MAY_CHANGE = frozenset(  # keys that do not affect the trained model
    {"num_workers", "logs", "compile", "gradient_checkpointing", "save_every", "keep_last", "max_skipped", "about"}
)


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Raises ConfigError if the folder holds a run of another recipe, or files that are no run at all."""
    file = folder / "recipe.json"
    if file.is_file():
        if keys := changed_keys(file, recipe) - _MAY_CHANGE:
            raise ConfigError(
                f"{folder}: holds a run with another {', '.join(sorted(keys))}; "
                "set output_dir=… to a new folder, or remove this one"
            )
        return
    with explain_write_errors(folder):
        empty = folder.is_dir() and all(entry.name.startswith(".") for entry in folder.iterdir())
        occupied = folder.exists() and not empty
    if occupied:
        raise ConfigError(f"{folder}: exists and is not the folder of a run; set output_dir=… to a new folder")


@contextmanager
def locked_folder(folder: Path, recipe: Recipe, world: World) -> Iterator[None]:
    """Creates the folder, locks it, deletes partial files of a killed run, and saves the recipe. Raises LlavaError."""
    world.barrier()  # no rank may create the folder before all ranks have checked it
    if not world.is_main:
        world.barrier()
        yield
        return
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        for partial in folder.glob(".*.partial*"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        with new_file(folder / "recipe.json", 0) as file:
            file.write_text(to_json(recipe) + "\n", encoding="utf-8")
        world.barrier()
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on the folder. Raises ConfigError if another process holds it.

    The operating system drops the lock when this process dies, and forked workers close their copy of it. A soft lock,
    a mere marker file, would outlive a killed run, so a file system without locks gets a warning instead.
    """
    lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{folder}: another process is training here; wait for it, or set output_dir=… to a new folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        log.warning("%s: cannot be locked (%s); do not start a second run in this folder", folder, reason)
    try:
        yield
    finally:
        lock.release()
