"""A run and its state: model, optimizer, data and checkpoints, restored from the newest checkpoint."""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint as recompute

from llava.errors import ConfigError
from llava.formats.format import Checkpoint
from llava.train import optim
from llava.train.batch import BatchDataset
from llava.train.checks import CHECKPOINTS, check_pictures
from llava.train.distributed import World
from llava.train.loss import LlavaWithLoss
from llava.train.order import SampleOrder
from llava.train.recipe import Recipe
from llava.train.resume import Checkpointer
from llava.train.signals import StopRequest
from llava.train.start import DTYPES, fill, row_ids, trainable

log = logging.getLogger(__name__)


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
    # data files of this rank's samples since the run was started or resumed, in the order of the samples
    skipped_files: dict[str, None] = field(default_factory=dict)
    lossy_files: dict[str, None] = field(default_factory=dict)

    @property
    def order(self) -> SampleOrder:
        return self.dataset.order

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def set_up(recipe: Recipe, checkpoint: Checkpoint, folder: Path, world: World) -> Run:
    """Opens the data, builds the model and the optimizer, and loads the newest checkpoint. Raises LlavaError."""
    # open the data first, so that data errors are reported before the weights are read
    dataset = BatchDataset.open(recipe, checkpoint, rank=world.rank, world_size=world.size)
    check_pictures(dataset.samples)
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
