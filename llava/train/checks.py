"""What a run needs at its end, checked before it starts: the form of its export, disk space, and its trackers."""

from pathlib import Path

from llava.data.samples import Samples
from llava.errors import ConfigError
from llava.formats.format import Checkpoint
from llava.model.llava import Llava
from llava.tensors.atomic import check_space
from llava.train.export import check_export
from llava.train.log import check_trackers
from llava.train.recipe import MODEL, Recipe

CHECKPOINTS = "checkpoints"  # subfolder for resumable checkpoints


def check_pictures(samples: Samples) -> None:
    """Raises ConfigError if samples name pictures, but the recipe has no location for them."""
    if samples.n_named and not samples.has_pictures:
        raise ConfigError(
            f"{samples.n_named} of {len(samples)} samples have a picture, but the recipe does not say where; "
            "set images=… to their folder, .zip or .tar"
        )


def check_run(folder: Path, model: Llava, checkpoint: Checkpoint, recipe: Recipe) -> dict[str, int]:
    """Raises LlavaError if a run in `folder` could train but not save its result.

    model: as returned by `trainable`, on the meta device. `llava train --plan` and the run itself call this function.
    Returns the size in bytes of what the run writes, by purpose.
    """
    check_trackers(recipe.logs)
    disk = {"trained model": check_export(folder / MODEL, model, checkpoint, recipe)}
    trained = [p for p in model.parameters() if p.requires_grad]
    one = 3 * sum(p.numel() * p.element_size() for p in trained)  # the weights and AdamW's two moments
    # the next checkpoint is complete before the oldest one is removed
    n = recipe.keep_last + 1 if recipe.save_every else 1
    disk |= {f"{n} checkpoint{'s' * (n != 1)}": n * one}
    existing = sum(file.stat().st_size for file in (folder / CHECKPOINTS).rglob("*") if file.is_file())
    check_space(folder, sum(disk.values()) - existing, folder)
    return disk
