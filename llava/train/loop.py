"""The training loop: the same for a laptop's CPU and for many GPUs, for a projector and for a whole model."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
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

from llava.data.samples import WORKERS_START
from llava.errors import ConfigError, DataError, LlavaError
from llava.formats.format import Checkpoint
from llava.train import optim
from llava.train.batch import Batch, Batches, Order, Place
from llava.train.endings import drawn, in_one_line, interruptible, leave_interrupts
from llava.train.export import export
from llava.train.flops import flops_of, peak_flops
from llava.train.folder import check_folder, claimed
from llava.train.log import open_logs
from llava.train.loss import Trainee
from llava.train.progress import TrainProgress
from llava.train.ranks import Ranks, ranks
from llava.train.recipe import Recipe, to_dict
from llava.train.resume import Saver
from llava.train.start import DTYPES, fill, row_ids, start, trainable

log = logging.getLogger(__name__)

MODEL = "model"  # the folder in a run's folder that the trained model is written to
_NAMED = 32  # samples that a message names
_FIRST_SKIPS = 100  # samples to see before a share of broken ones means anything


@dataclass
class Count:
    """What has been seen so far, over all ranks."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    elapsed_s: float = 0.0
    n_data: int = 0  # samples that the data hold, whatever has been seen of them


@dataclass
class Run:
    """A run that is ready to go."""

    recipe: Recipe
    out: Path
    ranks: Ranks
    trainee: Trainee
    optimizer: AdamW
    batches: Batches
    saver: Saver
    count: Count = field(default_factory=Count)

    @property
    def order(self) -> Order:
        return self.batches.order

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def train(recipe: Recipe, *, device: str = "auto", as_json: bool = False) -> Path:
    """Trains as the recipe says, or goes on where the same command stopped; returns the folder of the trained model.

    Under torchrun every process calls this. Raises LlavaError.
    """
    out = Path(recipe.out)
    with interruptible(), in_one_line(), ranks(device) as found:
        check_folder(out, recipe)
        if (out / MODEL).is_dir():
            log.warning("%s: this run is finished already; its model is in %s", out, out / MODEL)
            return out / MODEL
        with claimed(out, recipe, found):
            checkpoint = start(recipe, out / "tokenizer")
            run = _ready(recipe, checkpoint, out, found)
            _steps(run, as_json)
            export(out / MODEL, run.trainee.model, checkpoint, recipe, first=found.first)
            found.wait()
    return out / MODEL


def _ready(recipe: Recipe, checkpoint: Checkpoint, out: Path, ranks: Ranks) -> Run:
    # data first: what is wrong with them shows before the weights are read
    batches = Batches.of(recipe, checkpoint, rank=ranks.rank, ranks=ranks.n)
    if ranks.first and (n := batches.order.micro) % ranks.n:
        log.warning("a step is %d micro-batches, which %d ranks can not share evenly: some wait", n, ranks.n)
    model = trainable(checkpoint, recipe)
    rows = row_ids(checkpoint, recipe)
    trainee = Trainee(model, rows=rows, tower_learns="vision" in recipe.train)
    trainee.rows = trainee.rows.to(ranks.device)
    if ranks.n > 1:
        _shard(trainee, recipe, ranks)
    fill(model, checkpoint, recipe, ranks.device)
    trainee.train()
    _recompute_and_compile(trainee, recipe)
    saver = Saver(out / "checkpoints", recipe.keep, ranks)
    if ranks.first:
        saver.clean()
    run = Run(recipe, out, ranks, trainee, optim.optimizer(trainee, recipe), batches, saver)
    run.count.n_data = n = len(batches.samples)
    if newest := saver.newest():
        run.count = Count(**saver.load(newest, trainee, run.optimizer))
        if run.count.n_data != n:
            raise ConfigError(
                f"{out}: this run began on {run.count.n_data} samples, its data now hold {n}; "
                "give it the same data, or set out=… to a new folder"
            )
    return run


def _shard(trainee: Trainee, recipe: Recipe, ranks: Ranks) -> None:
    """FSDP2: every block's weights lie spread over the ranks and are gathered when it runs."""
    compute = DTYPES[recipe.compute]
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    mesh = init_device_mesh(ranks.device.type, (ranks.n,))
    model = trainee.model
    blocks = [*model.decoder.blocks, *(model.vision.blocks if model.vision else ())]
    for module in (*blocks, trainee):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def _recompute_and_compile(trainee: Trainee, recipe: Recipe) -> None:
    model = trainee.model
    tower = list(model.vision.blocks) if model.vision else []
    if recipe.checkpointing:
        for block in [*model.decoder.blocks, *(tower if trainee.tower_learns else ())]:
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    if recipe.compile:
        for block in [*model.decoder.blocks, *tower]:
            block.compile()


def _steps(run: Run, as_json: bool) -> None:
    recipe, count, order = run.recipe, run.count, run.order
    first = run.ranks.first
    logs = open_logs(run.out, recipe.logs, to_dict(recipe), count.step) if first else []
    flops = flops_of(run.trainee.model, recipe)
    peak = peak_flops(run.ranks.device) * run.ranks.n
    loader = drawn(_loader(run))
    began = time.perf_counter() - count.elapsed_s
    try:
        with run.saver, TrainProgress(order.n_steps, count.step, as_json=as_json, first=first) as shown:
            while count.step < order.n_steps:
                started = time.perf_counter()
                row = _step(run, [next(loader) for _ in range(run.batches.per_step)])
                seconds = time.perf_counter() - started
                count.elapsed_s = time.perf_counter() - began
                row |= {"tokens_per_s": row.pop("new_tokens") / seconds, "elapsed_s": count.elapsed_s}
                if peak:
                    row["mfu"] = row["tokens_per_s"] * flops / peak
                for one in logs:
                    one.write(row)
                shown.update(row)
                _save(run)
    finally:
        for one in logs:
            one.close()


def _loader(run: Run) -> Iterator[Batch]:
    workers = run.recipe.workers
    return iter(
        DataLoader(
            run.batches,
            batch_size=None,
            sampler=run.batches.places(run.count.step),
            num_workers=workers,
            multiprocessing_context=WORKERS_START if workers else None,
            worker_init_fn=leave_interrupts,
            prefetch_factor=4 if workers else None,
            pin_memory=run.ranks.device.type == "cuda",
        )
    )


def _step(run: Run, batches: list[Batch]) -> dict[str, float]:
    """One optimiser step on this rank's micro-batches. The loss is the mean over all tokens that all ranks learn."""
    recipe, count, ranks = run.recipe, run.count, run.ranks
    parts = [(len(batch.at), batch.n_samples, batch.n_tokens, len(batch.skipped)) for batch in batches]
    learnt, samples, tokens, skipped = map(int, ranks.sum([sum(column) for column in zip(*parts, strict=True)]))
    _tell_skipped(run, batches, samples, skipped)
    losses = []
    for turn, batch in enumerate(batches):
        torch.manual_seed(_seed(recipe.seed, count.step, turn * ranks.n + ranks.rank))
        if isinstance(run.trainee, FSDPModule):
            run.trainee.set_requires_gradient_sync(turn == len(batches) - 1)
        losses.append(_backward(run, batch))
    total = _sum_of_losses(run, torch.stack(losses).tolist())
    optim.scale_gradients(run.parameters, ranks.n / max(learnt, 1))  # FSDP has taken the mean over ranks
    norm = optim.clip(run.parameters, recipe.clip).item()
    if not math.isfinite(norm):
        raise _no_number(run, "norm of the gradient", norm, run.order.step(count.step))
    share = optim.factor(count.step, run.order.n_steps, recipe)
    optim.set_rates(run.optimizer, share)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    count.step, count.samples = count.step + 1, count.samples + samples
    count.tokens, count.skipped = count.tokens + tokens, count.skipped + skipped
    return {
        "step": count.step,
        "epoch": count.step / run.order.steps_per_epoch,
        "loss": total / max(learnt, 1),
        "rate": recipe.rate * share,
        "grad_norm": norm,
        "learnt": learnt,
        "tokens": count.tokens,
        "samples": count.samples,
        "skipped": count.skipped,
        "memory_bytes": torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else 0,
        "new_tokens": tokens,
    }


def _backward(run: Run, batch: Batch) -> Tensor:
    device = run.ranks.device
    mixed = run.recipe.compute == "bfloat16" and not isinstance(run.trainee, FSDPModule)
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        loss: Tensor = run.trainee(batch.on(device))
    loss.backward()
    return loss.detach()


def _sum_of_losses(run: Run, losses: list[float]) -> float:
    """Of all ranks' micro-batches. Raises LlavaError that names the samples of one whose loss is no number."""
    ranks = run.ranks
    every = [0.0] * (len(losses) * ranks.n)
    every[ranks.rank :: ranks.n] = losses
    every = ranks.sum(every)
    for place in run.order.step(run.count.step):
        if not math.isfinite(loss := every[place.number]):
            raise _no_number(run, "loss", loss, [place])
    return sum(every)


def _no_number(run: Run, what: str, value: float, places: Iterable[Place]) -> LlavaError:
    samples = sorted(index for place in places for index in place.samples)
    named = ", ".join(map(str, samples[:_NAMED])) + (f" and {len(samples) - _NAMED} more" if samples[_NAMED:] else "")
    return LlavaError(
        f"step {run.count.step + 1}: the {what} is {value} on samples {named} (counted from 0); "
        "look at them, or lower the rate"
    )


def _seed(seed: int, step: int, number: int) -> int:
    """Of the random numbers of one micro-batch: the same wherever it runs."""
    return (seed * 1_000_003 + step) * 1_009 + number


def _tell_skipped(run: Run, batches: list[Batch], samples: int, skipped: int) -> None:
    """Names what is left out. Raises DataError once that is too much."""
    for batch in batches:
        for why in batch.skipped:
            log.warning("left out: %s", why)
    seen = run.count.samples + run.count.skipped + samples + skipped
    lost = run.count.skipped + skipped
    if skipped and lost > run.recipe.max_skipped * max(seen, min(_FIRST_SKIPS, len(run.batches.samples))):
        raise DataError(
            f"{lost} of {seen} samples are broken, more than {run.recipe.max_skipped:.0%}; "
            "see what is wrong with: llava data check FILE"
        )


def _save(run: Run) -> None:
    run.saver.poll()
    every, step = run.recipe.save_every, run.count.step
    if step == run.order.n_steps or (every and step % every == 0):
        run.saver.save(step, run.trainee, run.optimizer, vars(run.count))
