"""Reports the samples that a run skips or truncates, and the pictures that lose values when they are read."""

import logging
import shlex
from collections.abc import Iterable

from llava.errors import DataError
from llava.train.batch import Batch
from llava.train.run import Run

log = logging.getLogger(__name__)

_MAX_COMMANDS = 3  # maximum number of files for which a message has a command
_MIN_SEEN = 100  # max_skipped is applied as if at least this many samples had been seen


def report_skipped(run: Run, batches: list[Batch], *, n_used: int, n_skipped: int, n_too_long: int) -> None:
    """Warns about this rank's skipped samples. The counts are those of the step, over all ranks.

    Raises DataError if too many samples are broken across all ranks, or if all samples so far are skipped. Samples that
    are longer than the model's context are not broken.
    """
    for batch in batches:
        for message in batch.skipped:
            log.warning("skipped: %s", message)
        run.skipped_files |= dict.fromkeys(batch.skipped_files)
    used, skipped = run.state.samples + n_used, run.state.skipped + n_skipped
    broken, seen = skipped - run.state.too_long - n_too_long, used + skipped
    enough = min(_MIN_SEEN, len(run.dataset.samples))
    if n_skipped and broken > run.recipe.max_skipped * max(seen, enough):
        raise DataError(
            f"{broken} of {seen} samples are broken, more than {run.recipe.max_skipped:.0%}; "
            f"to see why, run: {_check_commands(run, run.skipped_files)}"
        )
    if n_skipped and not used and seen >= enough:
        raise _none_used(run, seen, run.state.too_long + n_too_long)


def _none_used(run: Run, seen: int, too_long: int) -> DataError:
    return DataError(
        f"all {seen} samples so far are skipped, {too_long} of them because they are longer than the model's context; "
        f"to see why, run: {_check_commands(run, run.skipped_files)}"
    )


def _check_commands(run: Run, files: Iterable[str]) -> str:
    """Returns the commands that check some data files with the settings of the run, or all files if there are none.

    A resumed run does not know the files of samples that it skipped before.
    """
    recipe, config = run.recipe, run.dataset.preprocessor.config
    options = {
        "--images": recipe.images,
        "--model": recipe.model,
        "--base": recipe.base,
        "--template": recipe.template,
        "--max-length": str(recipe.max_length),
        "--image-tokens": str(config.vision.n_features) if config.vision and recipe.aspect != "anyres" else None,
        "--transparency": recipe.transparency if recipe.transparency != "drop" else None,
    }
    given = [word for option, value in options.items() if value for word in (option, value)]
    named = list(files) or list(recipe.data)
    commands = [shlex.join(("llava", "data", "check", file, *given)) for file in named[:_MAX_COMMANDS]]
    rest = f"  # and {len(named) - _MAX_COMMANDS} more files" if len(named) > _MAX_COMMANDS else ""
    return "; ".join(commands) + rest


def report_data_loss(run: Run) -> None:
    """Warns about the number of samples that the whole run skipped or truncated. Raises DataError if none was used."""
    state, recipe = run.state, run.recipe
    if not state.samples:
        raise _none_used(run, state.skipped, state.too_long)
    if not run.world.is_main:
        return
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
            state.lossy_pictures, _check_commands(run, run.lossy_files),
        )  # fmt: skip


def report_losses(run: Run, batches: list[Batch]) -> None:
    """Warns about the first lossy picture of the run. Further ones are only counted."""
    run.lossy_files |= dict.fromkeys(file for batch in batches for file in batch.lossy_files)
    losses = [loss for batch in batches for loss in batch.losses]
    if losses and not run.state.lossy_pictures:
        log.warning("%s", losses[0])
