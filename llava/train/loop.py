"""The training loop, for anything from a projector on a laptop's CPU to a full model on many GPUs."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch.utils.data import DataLoader

from llava.data.samples import WORKERS_START, starting_workers
from llava.data.workers import capped_workers, default_workers
from llava.train.batch import Batch
from llava.train.checks import check_run
from llava.train.distributed import join_world
from llava.train.export import export
from llava.train.flops import flops_per_token, peak_flops
from llava.train.log import open_logs
from llava.train.progress import TrainProgress
from llava.train.recipe import MODEL, Recipe, changed_keys, to_dict
from llava.train.resume import step_of
from llava.train.run import Run, set_up
from llava.train.run_folder import RECIPE_FILE, check_folder, locked_folder
from llava.train.signals import (
    AgreedStop,
    collect_stop,
    defer_signals,
    explain_failures,
    init_worker,
    interrupt_on_sigterm,
    iterate_loader,
)
from llava.train.skipped import report_data_loss
from llava.train.start import start, trainable
from llava.train.step import accumulate, update

log = logging.getLogger(__name__)

_DEFAULT_WORKERS = 4  # per rank, if there are enough CPUs


def train(recipe: Recipe, *, device: str = "auto", as_json: bool = False) -> Path:
    """Trains a model from a recipe and returns the folder of the trained model.

    If `recipe.output_dir` contains an unfinished run, resumes it. Under torchrun, every process must call this. SIGINT
    and SIGTERM save a checkpoint of the last complete step and raise KeyboardInterrupt. Raises LlavaError.
    """
    folder = Path(recipe.output_dir)
    with interrupt_on_sigterm(), explain_failures(), join_world(device) as world:
        check_folder(folder, recipe)
        if (folder / MODEL).is_dir():
            _report_finished(folder, recipe)
            return folder / MODEL
        with locked_folder(folder, recipe, world):
            checkpoint = start(recipe, folder / "tokenizer")
            check_run(folder, trainable(checkpoint, recipe), checkpoint, recipe)
            run = set_up(recipe, checkpoint, folder, world)
            _train_steps(run, as_json)
            report_data_loss(run)
            export(folder / MODEL, run.model.model, checkpoint, recipe, first=world.is_main)
            world.barrier()
    return folder / MODEL


def _report_finished(folder: Path, recipe: Recipe) -> None:
    log.warning("%s: this run is already finished; its model is in %s", folder, folder / MODEL)
    if "export" in changed_keys(folder / RECIPE_FILE, recipe):
        log.warning("to export it with export=%s, move that folder away and run the same command again", recipe.export)


def _train_steps(run: Run, as_json: bool) -> None:
    """Runs the remaining steps, logging each one and saving checkpoints."""
    recipe, state, n_steps = run.recipe, run.state, run.order.n_steps
    is_main = run.world.is_main
    logs = open_logs(run.folder, recipe.logs, to_dict(recipe), state.step) if is_main else []
    flops = flops_per_token(run.model.model, recipe)
    peak = peak_flops(run.world.device) * run.world.size
    loader = iterate_loader(_loader(run))
    run_start = time.perf_counter() - state.elapsed_s
    try:
        progress = TrainProgress(n_steps, state.step, as_json=as_json, is_main=is_main)
        with run.checkpointer, progress, _saving_on_interrupt(run):
            while state.step < n_steps:
                step_start = time.perf_counter()
                gradients = accumulate(run, [next(loader) for _ in range(run.dataset.per_step)])
                with defer_signals():  # a checkpoint saved after an interrupt holds whole steps, all of them logged
                    row = update(run, gradients)
                    now = time.perf_counter()
                    state.elapsed_s = now - run_start
                    tokens_per_s = gradients.counts.tokens / (now - step_start)
                    row |= {"tokens_per_s": tokens_per_s, "elapsed_s": state.elapsed_s}
                    if peak:
                        row["mfu"] = tokens_per_s * flops / peak
                    for one in logs:
                        one.write(row)
                    progress.update(row)
                _save_if_due(run)
    finally:
        for one in logs:
            one.close()


def _loader(run: Run) -> Iterator[Batch]:
    asked, local_size = run.recipe.num_workers, run.world.local_size
    if asked is None:
        num_workers = default_workers(_DEFAULT_WORKERS, local_size)
    else:
        num_workers = capped_workers(asked, "num_workers", local_size)
    loader = DataLoader(
        run.dataset,
        batch_size=None,
        sampler=run.dataset.indices_from(run.state.step),
        num_workers=num_workers,
        multiprocessing_context=WORKERS_START if num_workers else None,
        worker_init_fn=init_worker,
        prefetch_factor=4 if num_workers else None,
        pin_memory=run.world.device.type == "cuda",
    )
    with starting_workers():
        return iter(loader)


@contextmanager
def _saving_on_interrupt(run: Run) -> Iterator[None]:
    """Saves a checkpoint of the last complete step when a signal ends the block.

    A single process abandons the current step at once. Several ranks end it at the start of the next step, where they
    exchange their counts; a second signal ends them without a checkpoint, because they may be at different steps.
    """
    one = run.world.size == 1
    with nullcontext(run.stop) if one else collect_stop() as run.stop:
        try:
            yield
        except KeyboardInterrupt as interrupt:
            if one or isinstance(interrupt, AgreedStop):
                _save_last_step(run)  # still collecting: a rank may receive its signal only now
            raise


def _save_last_step(run: Run) -> None:
    run.checkpointer.finish()
    latest = run.checkpointer.latest()
    if run.state.step > (step_of(latest) if latest else 0):
        run.checkpointer.save(run.state.step, run.model, run.optimizer, vars(run.state))
        run.checkpointer.finish()
    run.world.barrier()  # a rank that exits would break the connections of those that still write
    if run.world.is_main and run.state.step:
        log.warning("step %d of %d is saved in %s", run.state.step, run.order.n_steps, run.checkpointer.folder)


def _save_if_due(run: Run) -> None:
    run.checkpointer.poll()
    every, step = run.recipe.save_every, run.state.step
    if step == run.order.n_steps or (every and step % every == 0):
        run.checkpointer.save(step, run.model, run.optimizer, vars(run.state))
