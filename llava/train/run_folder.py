"""Checks and locks a run folder. Each folder belongs to one recipe, and only one run at a time may write to it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava.errors import ConfigError
from llava.tensors.atomic import new_file
from llava.tensors.lock import locked
from llava.train.distributed import World
from llava.train.log import explain_write_errors
from llava.train.recipe import Recipe, changed_keys, to_json

RECIPE_FILE = "recipe.json"
_MAY_CHANGE = frozenset(  # recipe keys that do not affect the trained model
    {
        "about",
        "compile",
        "export",
        "gradient_checkpointing",
        "keep_last",
        "logs",
        "max_skipped",
        "num_workers",
        "save_every",
    }
)


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Raises ConfigError if the folder contains a run with a different recipe, or contains files but no run."""
    file = folder / RECIPE_FILE
    if file.is_file():
        keys = changed_keys(file, recipe) - _MAY_CHANGE
        if keys and _has_started(folder):
            raise ConfigError(
                f"{folder}: contains a run whose recipe differs in {', '.join(sorted(keys))}; "
                "set output_dir=… to a new folder, or remove this folder"
            )
        return
    with explain_write_errors(folder):
        empty = folder.is_dir() and not _visible(folder)
        occupied = folder.exists() and not empty
    if occupied:
        raise ConfigError(f"{folder}: exists but is not a run folder; set output_dir=… to a new folder")


def _has_started(folder: Path) -> bool:
    """Returns whether the run got past loading its model. Until then, the folder may be reused for another recipe."""
    return any(entry.name not in (RECIPE_FILE, "tokenizer") for entry in _visible(folder))


def _visible(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


@contextmanager
def locked_folder(folder: Path, recipe: Recipe, world: World) -> Iterator[None]:
    """Creates and locks the folder, deletes a killed run's partial files, and saves the recipe. Raises LlavaError."""
    world.barrier()  # no rank may create the folder before all ranks have checked it
    if not world.is_main:
        world.barrier()
        yield
        return
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    busy = ConfigError(f"{folder}: another process is training here; wait for it, or set output_dir=… to a new folder")
    with locked(folder, folder / ".lock", busy):
        for partial in folder.glob(".*.partial*"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        if not _has_started(folder):  # the tokenizer from an earlier attempt may belong to a different model
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        with new_file(folder / RECIPE_FILE, 0) as file:
            file.write_text(to_json(recipe) + "\n", encoding="utf-8")
        world.barrier()
        yield
