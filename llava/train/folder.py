"""A run's folder: of one recipe, and of one run at a time."""

import errno
import fcntl
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from llava.errors import ConfigError
from llava.tensors.atomic import new_file
from llava.train.log import writing
from llava.train.ranks import Ranks
from llava.train.recipe import Recipe, changed, to_json

log = logging.getLogger(__name__)

_MAY_CHANGE = frozenset({"workers", "logs", "compile", "checkpointing", "save_every", "keep", "max_skipped", "about"})


def check_folder(out: Path, recipe: Recipe) -> None:
    """The folder belongs to this recipe: what decides the result may not change under way."""
    file = out / "recipe.json"
    if file.is_file():
        if keys := changed(file, recipe) - _MAY_CHANGE:
            raise ConfigError(
                f"{out}: holds a run with another {', '.join(sorted(keys))}; "
                "set out=… to a new folder, or remove this one"
            )
        return
    with writing(out):
        foreign = out.exists() and not (out.is_dir() and all(entry.name.startswith(".") for entry in out.iterdir()))
    if foreign:
        raise ConfigError(f"{out}: is there already and holds no run; set out=… to a new folder")


@contextmanager
def claimed(out: Path, recipe: Recipe, ranks: Ranks) -> Iterator[None]:
    """The folder made, without what a killed run left half written, and closed to other runs."""
    ranks.wait()  # all have looked at it as it was
    if not ranks.first:
        ranks.wait()
        yield
        return
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    with lock:
        _lock(lock, out)
        for left in out.glob(".*.partial*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        with new_file(out / "recipe.json", 0) as partial:
            partial.write_text(to_json(recipe) + "\n", encoding="utf-8")
        ranks.wait()
        yield


def _lock(file: TextIO, out: Path) -> None:
    """For as long as the file is open and this process lives; workers do not inherit it. Raises ConfigError."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(
                f"{out}: another process is training here; wait for it, or set out=… to a new folder"
            ) from None
        log.warning("%s: can not be locked (%s); start no second run here", out, error.strerror)
