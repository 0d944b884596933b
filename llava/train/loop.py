"""The training loop, for anything from a projector on a laptop's CPU to a full model on many GPUs."""

import logging
import math
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader

from llava.data.samples import WORKERS_START, starting_workers
from llava.data.workers import capped_workers
from llava.errors import ConfigError, DataError, LlavaError
from llava.formats.format import Checkpoint
from llava.train import optim
from llava.train.batch import Batch, BatchDataset
from llava.train.checks import CHECKPOINTS, check_run
from llava.train.distributed import World, join_world
from llava.train.export import export
from llava.train.flops import flops_per_token, peak_flops
from llava.train.log import open_logs
from llava.train.loss import LlavaWithLoss
from llava.train.order import MicroBatch, SampleOrder
from llava.train.progress import TrainProgress
from llava.train.recipe import MODEL, Recipe, changed_keys, to_dict
from llava.train.resume import Checkpointer, step_of
from llava.train.run_folder import RECIPE_FILE, check_folder, locked_folder
from llava.train.signals import (
    AgreedStop,
    StopRequest,
    collect_stop,
    defer_signals,
    explain_failures,
    init_worker,
    interrupt_on_sigterm,
    iterate_loader,
)
from llava.train.start import DTYPES, fill, row_ids, start, trainable

log = logging.getLogger(__name__)

_MAX_NAMED = 32  # maximum number of samples listed in an error message
_MIN_SEEN = 100  # max_skipped is applied as if at least this many samples had been seen


@dataclass
class TrainState:
    """Totals over all ranks. Saved in every checkpoint."""

    step: int = 0  # completed steps
    samples: int = 0
    tokens: int = 0
    skipped: int = 0  # broken samples, and samples that are too long
    too_long: int = 0  # skipped samples that are longer than the model's context
    truncated: int = 0  # samples cut to `max_length`
    lossy_pictures: int = 0  # pictures whose values or transparency were lost
    elapsed_s: float = 0.0
    n_data: int = 0  # number of samples in the data files


@dataclass
class Run:
    """Everything that a training step needs."""

    recipe: Recipe
    folder: Path
    world: World
    model: LlavaWithLoss
    optimizer: AdamW
    dataset: BatchDataset
    checkpointer: Checkpointer
    state: TrainState = field(default_factory=TrainState)
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def order(self) -> SampleOrder:
        return self.dataset.order

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@dataclass(frozen=True)
class StepCounts:
    """Counts for one step, summed over all ranks."""

    target_tokens: int
    samples: int
    tokens: int
    skipped: int
    too_long: int
    truncated: int
    lossy_pictures: int
    stops: int  # ranks that received a signal to stop


@dataclass(frozen=True)
class Gradients:
    """The outcome of a step's forward and backward passes. The gradients themselves are in the parameters."""

    counts: StepCounts
    loss: float  # mean over all target tokens on all ranks
    norm: float  # before clipping


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
            run = _set_up(recipe, checkpoint, folder, world)
            _train_steps(run, as_json)
            if world.is_main:
                _report_data_loss(run.state, recipe)
            export(folder / MODEL, run.model.model, checkpoint, recipe, first=world.is_main)
            world.barrier()
    return folder / MODEL


def _report_finished(folder: Path, recipe: Recipe) -> None:
    log.warning("%s: this run is already finished; its model is in %s", folder, folder / MODEL)
    if "export" in changed_keys(folder / RECIPE_FILE, recipe):
        log.warning("to export it with export=%s, move that folder away and run the same command again", recipe.export)


def _set_up(recipe: Recipe, checkpoint: Checkpoint, folder: Path, world: World) -> Run:
    # open the data first, so that data errors are reported before the weights are read
    dataset = BatchDataset.open(recipe, checkpoint, rank=world.rank, world_size=world.size)
    if world.is_main and (n := dataset.order.n_micro_batches) % world.size:
        log.warning(
            "%d micro-batches per step do not divide evenly among %d ranks; some ranks will wait", n, world.size
        )
    model = _build_model(recipe, checkpoint, world)
    checkpointer = Checkpointer(folder / CHECKPOINTS, recipe.keep_last, world)
    if world.is_main:
        checkpointer.remove_partial()
    run = Run(recipe, folder, world, model, optim.build_optimizer(model, recipe), dataset, checkpointer)
    run.state.n_data = n = len(dataset.samples)
    if latest := checkpointer.latest():
        run.state = TrainState(**checkpointer.load(latest, model, run.optimizer))
        if run.state.n_data != n:
            raise ConfigError(
                f"{folder}: this run started with {run.state.n_data} samples, but its data files now contain {n}; "
                "restore the data files, or set output_dir=… to a new folder"
            )
    return run


def _build_model(recipe: Recipe, checkpoint: Checkpoint, world: World) -> LlavaWithLoss:
    """Builds the model, shards it across ranks, loads its weights and sets it to training mode."""
    inner = trainable(checkpoint, recipe)
    rows = row_ids(checkpoint, recipe)
    model = LlavaWithLoss(inner, trained_rows=rows, train_vision="vision" in recipe.train)
    model.trained_rows = model.trained_rows.to(world.device)
    if world.size > 1:
        _shard(model, recipe, world)
    fill(inner, checkpoint, recipe, world.device)
    model.train()
    _checkpoint_and_compile(model, recipe)
    return model


def _shard(model: LlavaWithLoss, recipe: Recipe, world: World) -> None:
    """Shards the model across ranks with FSDP2. A block's weights are gathered only while the block runs."""
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[recipe.compute_dtype], reduce_dtype=torch.float32)
    mesh = init_device_mesh(world.device.type, (world.size,))
    vision = model.model.vision
    for module in (*model.model.decoder.blocks, *(vision.blocks if vision else ()), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def _checkpoint_and_compile(model: LlavaWithLoss, recipe: Recipe) -> None:
    decoder_blocks = list(model.model.decoder.blocks)
    vision_blocks = list(model.model.vision.blocks) if model.model.vision else []
    if recipe.gradient_checkpointing:
        for block in [*decoder_blocks, *(vision_blocks if model.train_vision else ())]:
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    if recipe.compile:
        for block in [*decoder_blocks, *vision_blocks]:
            block.compile()


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
                gradients = _accumulate(run, [next(loader) for _ in range(run.dataset.per_step)])
                with defer_signals():  # a checkpoint saved after an interrupt holds whole steps, all of them logged
                    row = _update(run, gradients)
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
    num_workers = capped_workers(run.recipe.num_workers, "num_workers", run.world.local_size)
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


def _accumulate(run: Run, batches: list[Batch]) -> Gradients:
    """Runs the forward and backward passes of one step over this rank's micro-batches, and clips the gradients.

    Raises LlavaError if the loss or the gradient norm is not finite, and AgreedStop if a rank received a signal.
    """
    recipe, state, world = run.recipe, run.state, run.world
    counts = _count(run, batches)
    if counts.stops:
        raise AgreedStop
    _report_skipped(run, batches, counts)
    _report_losses(run, batches)
    losses = []
    for turn, batch in enumerate(batches):
        torch.manual_seed(_seed(recipe.seed, state.step, turn * world.size + world.rank))
        if isinstance(run.model, FSDPModule):
            run.model.set_requires_gradient_sync(turn == len(batches) - 1)
        losses.append(_backward(run, batch))
    total_loss = _sum_losses(run, torch.stack(losses).tolist())
    n_targets = max(counts.target_tokens, 1)
    optim.scale_gradients(run.parameters, world.size / n_targets)  # world.size cancels FSDP's averaging over ranks
    grad_norm = optim.clip_gradients(run.parameters, recipe.max_grad_norm).item()
    if not math.isfinite(grad_norm):
        raise _not_finite(run, "gradient norm", grad_norm, run.order.micro_batches(state.step))
    return Gradients(counts, total_loss / n_targets, grad_norm)


def _update(run: Run, gradients: Gradients) -> dict[str, float]:
    """Runs the optimizer on the accumulated gradients. Returns the row to log."""
    state, counts = run.state, gradients.counts
    factor = optim.lr_factor(state.step, run.order.n_steps, run.recipe)
    optim.set_lr(run.optimizer, factor)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    state.step, state.samples = state.step + 1, state.samples + counts.samples
    state.tokens, state.skipped = state.tokens + counts.tokens, state.skipped + counts.skipped
    state.too_long, state.truncated = state.too_long + counts.too_long, state.truncated + counts.truncated
    state.lossy_pictures += counts.lossy_pictures
    return {
        "step": state.step,
        "epoch": state.step / run.order.steps_per_epoch,
        "loss": gradients.loss,
        "lr": run.recipe.lr * factor,
        "grad_norm": gradients.norm,
        "target_tokens": counts.target_tokens,
        "tokens": state.tokens,
        "samples": state.samples,
        "skipped": state.skipped,
        "too_long": state.too_long,
        "truncated": state.truncated,
        "lossy_pictures": state.lossy_pictures,
        "memory_bytes": torch.cuda.max_memory_allocated() if run.world.device.type == "cuda" else 0,
    }


def _count(run: Run, batches: list[Batch]) -> StepCounts:
    rows = [
        (
            len(one.targets),
            one.n_samples,
            one.n_tokens,
            len(one.skipped),
            one.n_too_long,
            one.n_truncated,
            len(one.losses),
        )
        for one in batches
    ]
    counts = [sum(column) for column in zip(*rows, strict=True)]
    return StepCounts(*map(int, run.world.sum([*counts, run.stop.received])))


def _backward(run: Run, batch: Batch) -> Tensor:
    """Accumulates the gradients of a micro-batch and returns its summed loss."""
    device = run.world.device
    autocast = run.recipe.compute_dtype == "bfloat16" and not isinstance(run.model, FSDPModule)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss: Tensor = run.model(batch.to(device))
    loss.backward()
    return loss.detach()


def _sum_losses(run: Run, losses: list[float]) -> float:
    """Sums the micro-batch losses of all ranks. Raises a LlavaError that lists the samples if a loss is not finite."""
    world = run.world
    all_losses = [0.0] * (len(losses) * world.size)
    all_losses[world.rank :: world.size] = losses
    all_losses = world.sum(all_losses)
    for micro_batch in run.order.micro_batches(run.state.step):
        if not math.isfinite(loss := all_losses[micro_batch.index]):
            raise _not_finite(run, "loss", loss, [micro_batch])
    return sum(all_losses)


def _not_finite(run: Run, quantity: str, value: float, micro_batches: Iterable[MicroBatch]) -> LlavaError:
    samples = sorted(index for micro_batch in micro_batches for index in micro_batch.samples)
    rest = f" and {len(samples) - _MAX_NAMED} more" if len(samples) > _MAX_NAMED else ""
    return LlavaError(
        f"step {run.state.step + 1}: the {quantity} is {value} on samples "
        f"{', '.join(map(str, samples[:_MAX_NAMED]))}{rest} (counted from 0); check these samples, or lower lr"
    )


def _seed(seed: int, step: int, micro_batch: int) -> int:
    """Returns the random seed of a micro-batch. It does not depend on the rank that runs the micro-batch."""
    return (seed * 1_000_003 + step) * 1_009 + micro_batch


def _report_skipped(run: Run, batches: list[Batch], counts: StepCounts) -> None:
    """Warns about this rank's skipped samples.

    Raises DataError if too many samples are broken across all ranks, or if all samples so far are skipped. Samples that
    are longer than the model's context are not broken.
    """
    for batch in batches:
        for message in batch.skipped:
            log.warning("skipped: %s", message)
    used, skipped = run.state.samples + counts.samples, run.state.skipped + counts.skipped
    broken, seen = skipped - run.state.too_long - counts.too_long, used + skipped
    enough = min(_MIN_SEEN, len(run.dataset.samples))
    if counts.skipped and broken > run.recipe.max_skipped * max(seen, enough):
        raise DataError(
            f"{broken} of {seen} samples are broken, more than {run.recipe.max_skipped:.0%}; "
            f"to see why, run: {_check_command(run.recipe)}"
        )
    if counts.skipped and not used and seen >= enough:
        raise DataError(
            f"all {seen} samples so far are skipped, {run.state.too_long + counts.too_long} of them because they are "
            f"longer than the model's context; to see why, run: {_check_command(run.recipe)}"
        )


def _check_command(recipe: Recipe) -> str:
    """Returns the command that checks the first data file of a recipe."""
    images = ("--images", recipe.images) if recipe.images else ()
    model = () if recipe.base else ("--model", recipe.model, "--template", recipe.template)
    limit = ("--max-length", str(recipe.max_length))
    return shlex.join(("llava", "data", "check", recipe.data[0], *images, *model, *limit))


def _report_data_loss(state: TrainState, recipe: Recipe) -> None:
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


def _report_losses(run: Run, batches: list[Batch]) -> None:
    """Warns about the first lossy picture of the run. Further ones are only counted."""
    losses = [loss for batch in batches for loss in batch.losses]
    if losses and not run.state.lossy_pictures:
        log.warning("%s", losses[0])


def _save_if_due(run: Run) -> None:
    run.checkpointer.poll()
    every, step = run.recipe.save_every, run.state.step
    if step == run.order.n_steps or (every and step % every == 0):
        run.checkpointer.save(step, run.model, run.optimizer, vars(run.state))
