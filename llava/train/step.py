"""One training step: gradients of all micro-batches, then an update of the parameters."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from llava.errors import LlavaError
from llava.train import optim
from llava.train.batch import Batch
from llava.train.order import MicroBatch
from llava.train.run import Run
from llava.train.signals import AgreedStop
from llava.train.skipped import report_losses, report_skipped

_MAX_NAMED = 32  # maximum number of samples listed in an error message


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


def accumulate(run: Run, batches: list[Batch]) -> Gradients:
    """Runs the forward and backward passes of one step over this rank's micro-batches, and clips the gradients.

    Raises LlavaError if the loss or the gradient norm is not finite, and AgreedStop if a rank received a signal.
    """
    recipe, state, world = run.recipe, run.state, run.world
    counts = _count(run, batches)
    if counts.stops:
        raise AgreedStop
    report_skipped(run, batches, n_used=counts.samples, n_skipped=counts.skipped, n_too_long=counts.too_long)
    report_losses(run, batches)
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


def update(run: Run, gradients: Gradients) -> dict[str, float]:
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
