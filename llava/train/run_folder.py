"""The folder of a run. It belongs to one recipe, and only one run at a time may write to it."""

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

_MAY_CHANGE = frozenset(  # keys that do not affect the trained model
    {"num_workers", "logs", "compile", "gradient_checkpointing", "save_every", "keep_last", "max_skipped", "about"}
)


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Raises ConfigError if the folder contains a run of a different recipe, or files that do not belong to a run."""
    file = folder / "recipe.json"
    if file.is_file():
        if keys := changed_keys(file, recipe) - _MAY_CHANGE:
            raise ConfigError(
                f"{folder}: contains a run with a different {', '.join(sorted(keys))}; "
                "set output_dir=… to a new folder, or remove this one"
            )
        return
    with explain_write_errors(folder):
        empty = folder.is_dir() and all(entry.name.startswith(".") for entry in folder.iterdir())
        occupied = folder.exists() and not empty
    if occupied:
        raise ConfigError(f"{folder}: exists but is not the folder of a run; set output_dir=… to a new folder")


@contextmanager
def locked_folder(folder: Path, recipe: Recipe, world: World) -> Iterator[None]:
    """Creates and locks the folder, deletes partial files of a killed run, and saves the recipe. Raises LlavaError."""
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
        with new_file(folder / "recipe.json", 0) as file:
            file.write_text(to_json(recipe) + "\n", encoding="utf-8")
        world.barrier()
        yield
