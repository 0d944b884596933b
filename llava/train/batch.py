"""Micro-batches: which samples a step learns from, and their tensors.

The samples of step n are a function of the recipe and n alone, however many ranks there are: that is what makes a run
go on where it stopped.

B rows   S places   N samples   V views
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.checkpoint.open import Checkpoint
from llava.config import IGNORE, IMAGE, TileGrid
from llava.data.samples import Samples
from llava.errors import DataError, ImageError, PromptError
from llava.model.attention import Segments
from llava.preprocess.image import Picture
from llava.preprocess.inputs import ModelInput, Preprocessor
from llava.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch: packed (B = 1) or a row a sample, filled up on the right."""

    ids: Tensor  # int64 [B, S], IMAGE at the places of pictures
    pos: Tensor  # int64 [B, S], places of each sample counted from 0
    segments: Segments | None  # of a packed row
    at: Tensor  # int64 [learnt], flat places whose next token is learnt
    to: Tensor  # int64 [learnt], those tokens
    pictures: Tensor  # int64, flat places of pictures, in order
    pixels: Tensor | None  # float32 [V, 3, size, size]
    views: list[int]
    grids: list[TileGrid | None]
    n_samples: int
    n_tokens: int  # places, filling not counted
    longest: int  # places of its longest sample
    skipped: list[str] = field(default_factory=list)  # why a sample was left out, each with its name

    def on(self, device: torch.device) -> "Batch":
        """The same batch there."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        segments = self.segments and self.segments._replace(
            cu_seqlens=self.segments.cu_seqlens.to(device, non_blocking=True)
        )
        return replace(self, **moved, segments=segments)

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU copies from by itself."""
        held: dict[str, Any] = {n: value.pin_memory() for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **held)


def collate(inputs: Sequence[ModelInput], *, packing: bool, pad_to: int, slots: int, limit: int) -> Batch:
    """Samples -> a batch. `slots`: samples of a full micro-batch; `limit`: places that a sample may have."""
    ids = [input.ids for input in inputs] or [torch.zeros(1, dtype=torch.int64)]  # a rank must have something to do
    labels = [_shifted(input.labels) for input in inputs] or [torch.tensor([IGNORE])]
    lengths = [len(row) for row in ids]
    if packing:
        segments, filled = _packed(lengths, pad_to, slots, limit)
        rows = [torch.cat([*parts, torch.full((filled,), rest)])[None] for parts, rest in ((ids, 0), (labels, IGNORE))]
        pos = torch.cat([torch.arange(n) for n in (*lengths, filled)])[None]
    else:
        segments = None
        rows = [
            pad_sequence(parts, batch_first=True, padding_value=rest) for parts, rest in ((ids, 0), (labels, IGNORE))
        ]
        pos = torch.arange(max(lengths)).repeat(len(ids), 1)
    flat = rows[1].flatten()
    at = (flat != IGNORE).nonzero()[:, 0]
    pixels = [input.pixels for input in inputs if input.pixels is not None]
    return Batch(
        ids=rows[0],
        pos=pos,
        segments=segments,
        at=at,
        to=flat[at],
        pictures=(rows[0].flatten() == IMAGE).nonzero()[:, 0],
        pixels=torch.cat(pixels) if pixels else None,
        views=[n for input in inputs for n in input.views],
        grids=[grid for input in inputs for grid in input.grids],
        n_samples=len(inputs),
        n_tokens=sum(lengths) if inputs else 0,
        longest=max(lengths),
    )


def _shifted(labels: Tensor) -> Tensor:
    """What is learnt at each place: the next place's token."""
    return torch.cat([labels[1:], labels.new_tensor([IGNORE])])


def _packed(lengths: Sequence[int], pad_to: int, slots: int, limit: int) -> tuple[Segments, int]:
    """Bounds of the samples and of the filling behind them, always `slots` + 1 of them; places to fill.

    What a compiled block sees, the kernel's `longest` too, is the same for all rows of a length.
    """
    filled = -sum(lengths) % pad_to
    spread = [*lengths, *[0] * (slots - len(lengths)), filled]
    cu_seqlens = torch.tensor([0, *spread], dtype=torch.int64).cumsum(0).to(torch.int32)
    return Segments(cu_seqlens, tuple(spread), max(limit, filled)), filled


class Place(NamedTuple):
    """A micro-batch of a run."""

    step: int
    number: int  # within the step, over all ranks
    samples: tuple[int, ...]


class Order:
    """Which samples each step learns from."""

    def __init__(self, recipe: Recipe, lengths: Sequence[int]):
        """lengths: words of each sample, negative without a picture."""
        self.recipe, self.lengths = recipe, lengths
        self.micro = recipe.batch // recipe.micro_batch  # micro-batches of a step, over all ranks
        self.steps_per_epoch = math.ceil(len(lengths) / recipe.batch)
        self.n_steps = recipe.max_steps or math.ceil(recipe.epochs * self.steps_per_epoch)
        self._epoch: tuple[int, list[int]] = (-1, [])

    def step(self, step: int) -> list[Place]:
        """The micro-batches of a step; at the end of an epoch some may be empty."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        size = self.recipe.batch
        indices = self._epoch[1][place * size : (place + 1) * size]
        parts = self._balanced(indices) if self.recipe.order == "shuffled" else self._in_turn(indices)
        return [Place(step, number, tuple(part)) for number, part in enumerate(parts)]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.recipe.seed + epoch)
        if self.recipe.order == "by_modality_length":
            return by_modality_length(self.lengths, self.recipe.micro_batch, self.micro, generator)
        return torch.randperm(len(self.lengths), generator=generator).tolist()

    def _in_turn(self, indices: list[int]) -> list[list[int]]:
        size = self.recipe.micro_batch
        return [indices[i * size : (i + 1) * size] for i in range(self.micro)]

    def _balanced(self, indices: list[int]) -> list[list[int]]:
        """Dealt out by length, longest first, to and fro: micro-batches of like work, and ranks that seldom wait."""
        ordered = sorted(indices, key=lambda i: -abs(self.lengths[i]))
        parts: list[list[int]] = [[] for _ in range(self.micro)]
        for i, index in enumerate(ordered):
            turn, place = divmod(i, self.micro)
            parts[place if turn % 2 == 0 else self.micro - 1 - place].append(index)
        return parts


def by_modality_length(lengths: Sequence[int], micro_batch: int, world: int, generator: torch.Generator) -> list[int]:
    """The original's order (llava_trainer.py at c121f04): megabatches of like kind and length, dealt to `world` ranks.

    lengths: words, negative without a picture. The part of both kinds that fills no megabatch comes last.
    """
    kinds = [[i for i, n in enumerate(lengths) if (n > 0) == with_picture] for with_picture in (True, False)]
    if not all(kinds):
        return by_length([abs(n) for n in lengths], micro_batch, world, generator)
    size = world * micro_batch
    orders = []
    for indices in kinds:
        order = by_length([abs(lengths[i]) for i in indices], micro_batch, world, generator)
        orders.append([indices[i] for i in order])
    parts = [[order[i : i + size] for i in range(0, len(order), size)] for order in orders]
    whole = [part for order in parts for part in order[:-1]]
    mixed = [whole[i] for i in torch.randperm(len(whole), generator=generator)]
    return [i for part in (*mixed, sorted(parts[0][-1] + parts[1][-1])) for i in part]


def by_length(lengths: Sequence[int], micro_batch: int, world: int, generator: torch.Generator) -> list[int]:
    """Shuffled, then within each megabatch the longest first, dealt to `world` ranks of nearly equal sums."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = world * micro_batch
    result: list[int] = []
    for i in range(0, len(order), size):
        part = sorted(order[i : i + size], key=lambda j: lengths[j], reverse=True)
        result += [j for share in _even(part, lengths, world) for j in share]
    return result


def _even(indices: list[int], lengths: Sequence[int], n: int) -> list[list[int]]:
    """n shares of the same count, the next longest always to the lightest that has room."""
    if len(indices) % n:
        return [indices[i::n] for i in range(n)]
    shares: list[list[int]] = [[] for _ in range(n)]
    sums = [0.0] * n
    for index in indices:
        lightest = sums.index(min(sums))
        shares[lightest].append(index)
        full = len(shares[lightest]) == len(indices) // n
        sums[lightest] = math.inf if full else sums[lightest] + lengths[index]
    return shares


class Batches(Dataset[Batch]):
    """Makes the micro-batches of a rank, in worker processes; the n-th is the n-th that this rank runs."""

    def __init__(
        self, samples: Samples, preprocessor: Preprocessor, recipe: Recipe, order: Order, *, rank: int, ranks: int
    ):
        self.samples, self.preprocessor, self.recipe, self.order = samples, preprocessor, recipe, order
        self.rank, self.ranks = rank, ranks
        self.per_step = -(-order.micro // ranks)

    @classmethod
    def of(cls, recipe: Recipe, checkpoint: Checkpoint, *, rank: int = 0, ranks: int = 1) -> "Batches":
        """Those of a recipe's data for a model. Raises DataError."""
        samples = Samples([Path(file) for file in recipe.data], Path(recipe.images) if recipe.images else None)
        preprocessor = Preprocessor(checkpoint.config, checkpoint.tokenizer, template=recipe.template)
        return cls(samples, preprocessor, recipe, Order(recipe, samples.lengths), rank=rank, ranks=ranks)

    def __len__(self) -> int:
        return self.order.n_steps * self.per_step

    def places(self, first_step: int) -> Iterator[int]:
        """Numbers of the micro-batches from a step on."""
        return iter(range(first_step * self.per_step, len(self)))

    def __getitem__(self, number: int) -> Batch:
        step, turn = divmod(number, self.per_step)
        places = self.order.step(step)
        share = turn * self.ranks + self.rank
        return self.make(places[share].samples if share < len(places) else ())

    def make(self, indices: Sequence[int]) -> Batch:
        """A micro-batch of these samples; broken ones are left out and named."""
        inputs, skipped = [], []
        for index in indices:
            try:
                inputs.append(self.prepare(index))
            except (DataError, ImageError, PromptError) as error:
                skipped.append(f"sample {index}: {error}")
        recipe = self.recipe
        batch = collate(
            inputs,
            packing=recipe.packing,
            pad_to=recipe.pad_to,
            slots=recipe.micro_batch,
            limit=recipe.max_length,
        )
        return replace(batch, skipped=skipped)

    def prepare(self, index: int) -> ModelInput:
        """A sample's ids, labels and pixels. Raises DataError, ImageError, PromptError."""
        sample = self.samples[index]
        pictures: list[Picture] = [self.samples.picture(name) for name in sample.images]
        recipe = self.recipe
        input = self.preprocessor.prepare_training(
            sample.turns, pictures, place=recipe.image_place, max_length=recipe.max_length
        )
        if int((input.ids == IMAGE).sum()) != self.preprocessor.n_image_tokens(input):
            raise PromptError(f"a picture of {sample.id} does not fit into {recipe.max_length} tokens")
        return input
