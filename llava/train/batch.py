"""Micro-batches: the inputs and targets of one forward and backward pass.

B batch   S sequence length   N samples   V image views   T target tokens
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.config import IGNORE, IMAGE, PictureOptions, TileGrid
from llava.data.layouts import Sample
from llava.data.samples import Samples
from llava.errors import ContextError, DataError, ImageError, PromptError
from llava.formats.format import Checkpoint
from llava.model.attention import Segments
from llava.preprocess.image import Picture
from llava.preprocess.inputs import ModelInput, Preprocessor
from llava.train.order import SampleOrder
from llava.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, either packed into one row (B = 1) or with one right-padded row per sample."""

    ids: Tensor  # int64 [B, S], IMAGE at the positions of image features
    positions: Tensor  # int64 [B, S], counted from 0 in each sample
    seq_len: Tensor  # int64 [B, S], length of the sample that each token belongs to
    segments: Segments | None  # sample boundaries of a packed row
    target_positions: Tensor  # int64 [T], positions that predict a target, as indices into the flattened [B * S]
    targets: Tensor  # int64 [T], token ids
    image_positions: Tensor  # int64, positions of image features, in order, as indices into the flattened [B * S]
    pixels: Tensor | None  # float32 [V, 3, size, size]
    views: list[int]  # number of views of each image
    grids: list[TileGrid | None]  # tile arrangement of each image, or None to concatenate the views
    n_samples: int
    n_tokens: int  # including image tokens, excluding padding
    skipped: list[str] = field(default_factory=list)  # one message per skipped sample: file, index, id and reason
    skipped_files: list[str] = field(default_factory=list)  # data file of each skipped sample
    n_too_long: int = 0  # samples in `skipped` that are longer than the model's context
    n_truncated: int = 0  # samples cut to `max_length`
    losses: list[str] = field(default_factory=list)  # what reading the images lost, with the sample's file and index
    lossy_files: list[str] = field(default_factory=list)  # data file of each loss

    def to(self, device: torch.device) -> "Batch":
        """Returns a copy of the batch on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        segments = self.segments and self.segments._replace(
            cu_seqlens=self.segments.cu_seqlens.to(device, non_blocking=True)
        )
        return replace(self, **moved, segments=segments)

    def pin_memory(self) -> "Batch":
        """Returns a copy of the batch in page-locked memory, for asynchronous copies to the GPU."""
        pinned: dict[str, Any] = {n: value.pin_memory() for n, value in vars(self).items() if isinstance(value, Tensor)}
        segments = self.segments and self.segments._replace(cu_seqlens=self.segments.cu_seqlens.pin_memory())
        return replace(self, **pinned, segments=segments)


def collate(
    inputs: Sequence[ModelInput], *, packing: bool, pad_to: int, micro_batch_size: int, max_length: int
) -> Batch:
    """Collates samples into a batch. If there are no samples, the batch is a single token without targets."""
    ids = [input.ids for input in inputs] or [torch.zeros(1, dtype=torch.int64)]
    labels = [_shift(input.labels) for input in inputs] or [torch.tensor([IGNORE])]
    lengths = [len(row) for row in ids]
    if packing:
        segments, padding = _segments(lengths, pad_to, micro_batch_size, max_length)
        all_ids, all_labels = (
            torch.cat([*rows, torch.full((padding,), fill)])[None] for rows, fill in ((ids, 0), (labels, IGNORE))
        )
        positions = torch.cat([torch.arange(n) for n in (*lengths, padding)])[None]
        seq_len = torch.cat([torch.full((n,), n) for n in (*lengths, padding)])[None]
    else:
        segments = None
        all_ids, all_labels = (
            pad_sequence(rows, batch_first=True, padding_value=fill) for rows, fill in ((ids, 0), (labels, IGNORE))
        )
        positions = torch.arange(max(lengths)).repeat(len(lengths), 1)
        seq_len = torch.tensor(lengths)[:, None].repeat(1, max(lengths))
    flat_labels = all_labels.flatten()
    target_positions = (flat_labels != IGNORE).nonzero()[:, 0]
    pixels = [input.pixels for input in inputs if input.pixels is not None]
    return Batch(
        ids=all_ids,
        positions=positions,
        seq_len=seq_len,
        segments=segments,
        target_positions=target_positions,
        targets=flat_labels[target_positions],
        image_positions=(all_ids.flatten() == IMAGE).nonzero()[:, 0],
        pixels=torch.cat(pixels) if pixels else None,
        views=[n for input in inputs for n in input.views],
        grids=[grid for input in inputs for grid in input.grids],
        n_samples=len(inputs),
        n_tokens=sum(lengths) if inputs else 0,
    )


def _shift(labels: Tensor) -> Tensor:
    """Shifts labels left by one: the target of each position is the label of the next position."""
    return torch.cat([labels[1:], labels.new_tensor([IGNORE])])


def _segments(lengths: Sequence[int], pad_to: int, micro_batch_size: int, max_length: int) -> tuple[Segments, int]:
    """Returns the sample boundaries and the padding length of a packed row. The last segment is the padding.

    There are always `micro_batch_size` + 1 segments, some of which may be empty, and `max_seqlen` is an upper bound.
    A compiled block and its kernel therefore see the same sizes for all rows of the same length.
    """
    padding = -sum(lengths) % pad_to
    segment_lengths = [*lengths, *[0] * (micro_batch_size - len(lengths)), padding]
    cu_seqlens = torch.tensor([0, *segment_lengths], dtype=torch.int64).cumsum(0).to(torch.int32)
    return Segments(cu_seqlens, tuple(segment_lengths), max(max_length, padding)), padding


class BatchDataset(Dataset[Batch]):
    """The micro-batches that one rank trains on, in training order. Worker processes build them."""

    def __init__(
        self,
        samples: Samples,
        preprocessor: Preprocessor,
        recipe: Recipe,
        order: SampleOrder,
        *,
        rank: int,
        world_size: int,
    ):
        self.samples, self.preprocessor, self.recipe, self.order = samples, preprocessor, recipe, order
        self.rank, self.world_size = rank, world_size
        self.per_step = -(-order.n_micro_batches // world_size)  # micro-batches per step, including empty ones

    @classmethod
    def open(cls, recipe: Recipe, checkpoint: Checkpoint, *, rank: int = 0, world_size: int = 1) -> "BatchDataset":
        """Opens a recipe's data files for training the model in `checkpoint`. Raises DataError."""
        samples = Samples([Path(file) for file in recipe.data], Path(recipe.images) if recipe.images else None)
        pictures = PictureOptions(transparency=recipe.transparency)
        preprocessor = Preprocessor(
            checkpoint.config, checkpoint.tokenizer, template=recipe.template, pictures=pictures
        )
        order = SampleOrder(recipe, samples.lengths)
        return cls(samples, preprocessor, recipe, order, rank=rank, world_size=world_size)

    def __len__(self) -> int:
        return self.order.n_steps * self.per_step

    def indices_from(self, first_step: int) -> Iterator[int]:
        """Iterates over the indices of all micro-batches from `first_step` on."""
        return iter(range(first_step * self.per_step, len(self)))

    def __getitem__(self, index: int) -> Batch:
        step, turn = divmod(index, self.per_step)
        micro_batches = self.order.micro_batches(step)
        own = turn * self.world_size + self.rank
        return self.build(micro_batches[own].samples if own < len(micro_batches) else ())

    def build(self, indices: Sequence[int]) -> Batch:
        """Builds a micro-batch from the samples at `indices`. Unusable samples are left out and listed in `skipped`."""
        inputs: list[ModelInput] = []
        skipped: list[str] = []
        skipped_files: list[str] = []
        losses: list[str] = []
        lossy_files: list[str] = []
        n_too_long = 0
        for index in indices:
            file = str(self.samples.file(index))
            try:
                sample = self.samples[index]
            except DataError as error:
                skipped.append(str(error))
                skipped_files.append(file)
                continue
            where = f"{self.samples.where(index)} (id {sample.id:.60})"
            try:
                inputs.append(self._prepare(sample))
                losses += [f"{where}: {loss}" for loss in inputs[-1].losses]
                lossy_files += [file] * len(inputs[-1].losses)
            except (DataError, ImageError, PromptError) as error:
                skipped.append(f"{where}: {error}")
                skipped_files.append(file)
                n_too_long += isinstance(error, ContextError)
        recipe = self.recipe
        batch = collate(
            inputs,
            packing=recipe.packing,
            pad_to=recipe.pad_to,
            micro_batch_size=recipe.micro_batch_size,
            max_length=recipe.max_length,
        )
        n_truncated = sum(self._is_truncated(input) for input in inputs)
        return replace(
            batch,
            skipped=skipped,
            skipped_files=skipped_files,
            losses=losses,
            lossy_files=lossy_files,
            n_too_long=n_too_long,
            n_truncated=n_truncated,
        )

    def _is_truncated(self, input: ModelInput) -> bool:
        n_whole = len(input.token_ids) - len(input.views) + self.preprocessor.n_image_tokens(input)
        return n_whole > len(input.ids)

    def prepare(self, index: int) -> ModelInput:
        """Prepares the ids, labels and pixels of one sample. Raises DataError, ImageError or PromptError."""
        return self._prepare(self.samples[index])

    def _prepare(self, sample: Sample) -> ModelInput:
        pictures: list[Picture] = [self.samples.picture(name) for name in sample.images]
        recipe = self.recipe
        input = self.preprocessor.prepare_training(
            sample.turns,
            pictures,
            system=sample.system,
            place=recipe.image_place,
            max_length=recipe.max_length,
        )
        if int((input.ids == IMAGE).sum()) != self.preprocessor.n_image_tokens(input):
            raise PromptError(
                f"an image of {sample.id} exceeds the limit of {recipe.max_length} tokens; increase max_length"
            )
        return input
