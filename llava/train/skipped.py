"""Reports the samples and pictures that a run does not use as they are."""

import logging
import shlex

from llava.errors import DataError
from llava.train.batch import Batch
from llava.train.recipe import Recipe
from llava.train.run import Run, TrainState

log = logging.getLogger(__name__)

_MIN_SEEN = 100  # max_skipped is applied as if at least this many samples had been seen


def report_skipped(run: Run, batches: list[Batch], *, n_used: int, n_skipped: int, n_too_long: int) -> None:
    """Warns about this rank's skipped samples. The counts are those of the step, over all ranks.

    Raises DataError if too many samples are broken across all ranks, or if all samples so far are skipped. Samples that
    are longer than the model's context are not broken.
    """
    for batch in batches:
        for message in batch.skipped:
            log.warning("skipped: %s", message)
    used, skipped = run.state.samples + n_used, run.state.skipped + n_skipped
    broken, seen = skipped - run.state.too_long - n_too_long, used + skipped
    enough = min(_MIN_SEEN, len(run.dataset.samples))
    if n_skipped and broken > run.recipe.max_skipped * max(seen, enough):
        raise DataError(
            f"{broken} of {seen} samples are broken, more than {run.recipe.max_skipped:.0%}; "
            f"to see why, run: {_check_command(run.recipe)}"
        )
    if n_skipped and not used and seen >= enough:
        raise DataError(
            f"all {seen} samples so far are skipped, {run.state.too_long + n_too_long} of them because they are "
            f"longer than the model's context; to see why, run: {_check_command(run.recipe)}"
        )


def _check_command(recipe: Recipe) -> str:
    """Returns the command that checks the first data file of a recipe."""
    images = ("--images", recipe.images) if recipe.images else ()
    model = () if recipe.base else ("--model", recipe.model, "--template", recipe.template)
    limit = ("--max-length", str(recipe.max_length))
    return shlex.join(("llava", "data", "check", recipe.data[0], *images, *model, *limit))


def report_data_loss(state: TrainState, recipe: Recipe) -> None:
    """Warns about the number of samples that the whole run skipped or truncated."""
    if state.skipped:
        log.warning(
            "samples not used: %d of %d (%d longer than the model's context, %d broken)",
            state.skipped,
            state.skipped + state.samples,
            state.too_long,
            state.skipped - state.too_long,
        )
    if state.truncated:
        log.warning("samples truncated to max_length (%d tokens): %d", recipe.max_length, state.truncated)
    if state.lossy_pictures:
        log.warning(
            "pictures that lost values or transparency: %d; to list them, run: %s",
            state.lossy_pictures, _check_command(recipe),
        )  # fmt: skip


def report_losses(run: Run, batches: list[Batch]) -> None:
    """Warns about the first lossy picture of the run. Further ones are only counted."""
    losses = [loss for batch in batches for loss in batch.losses]
    if losses and not run.state.lossy_pictures:
        log.warning("%s", losses[0])
