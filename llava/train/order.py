"""Determines which samples each optimizer step trains on.

A step's samples depend only on the recipe and the step number, not on the number of ranks. A run can therefore resume
at any step and on any number of ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llava.train.recipe import Recipe


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one micro-batch, as indices into the dataset, and its position in the run."""

    step: int
    index: int  # within the step, counted across all ranks
    samples: tuple[int, ...]


class SampleOrder:
    """Divides the samples of each step into micro-batches."""

    def __init__(self, recipe: Recipe, lengths: Sequence[int]):
        """lengths: number of words per sample, negated for samples without an image."""
        self.recipe, self.lengths = recipe, lengths
        self.n_micro_batches = recipe.global_batch_size // recipe.micro_batch_size  # per step, across all ranks
        self.steps_per_epoch = math.ceil(len(lengths) / recipe.global_batch_size)
        self.n_steps = recipe.max_steps or math.ceil(recipe.epochs * self.steps_per_epoch)
        self._cached_epoch: tuple[int, list[int]] = (-1, [])

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Returns the micro-batches of a step. In the last step of an epoch, some of them may be empty."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if self._cached_epoch[0] != epoch:
            self._cached_epoch = (epoch, self._order_of_epoch(epoch))
        size = self.recipe.global_batch_size
        indices = self._cached_epoch[1][step_in_epoch * size : (step_in_epoch + 1) * size]
        parts = self._balanced(indices) if self.recipe.order == "shuffled" else self._consecutive(indices)
        return [MicroBatch(step, index, tuple(part)) for index, part in enumerate(parts)]

    def _order_of_epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.recipe.seed + epoch)
        if self.recipe.order == "by_modality_length":
            return by_modality_length(self.lengths, self.recipe.micro_batch_size, self.n_micro_batches, generator)
        return torch.randperm(len(self.lengths), generator=generator).tolist()

    def _consecutive(self, indices: list[int]) -> list[list[int]]:
        size = self.recipe.micro_batch_size
        return [indices[i * size : (i + 1) * size] for i in range(self.n_micro_batches)]

    def _balanced(self, indices: list[int]) -> list[list[int]]:
        """Distributes samples, longest first, across micro-batches in zigzag order to balance the work of the ranks."""
        longest_first = sorted(indices, key=lambda i: -abs(self.lengths[i]))
        parts: list[list[int]] = [[] for _ in range(self.n_micro_batches)]
        for i, index in enumerate(longest_first):
            turn, part = divmod(i, self.n_micro_batches)
            parts[part if turn % 2 == 0 else self.n_micro_batches - 1 - part].append(index)
        return parts


def by_modality_length(
    lengths: Sequence[int], micro_batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """Groups samples into megabatches of a single modality, as the original llava_trainer.py does (commit c121f04).

    A megabatch fills one optimizer step. The last megabatches of the two modalities are merged, sorted by sample
    index, and placed at the end.
    lengths: number of words per sample, negated for samples without an image.
    """
    modalities = [[i for i, n in enumerate(lengths) if (n > 0) == with_image] for with_image in (True, False)]
    if not all(modalities):
        return by_length([abs(n) for n in lengths], micro_batch_size, world_size, generator)
    size = world_size * micro_batch_size
    orders = []
    for indices in modalities:
        order = by_length([abs(lengths[i]) for i in indices], micro_batch_size, world_size, generator)
        orders.append([indices[i] for i in order])
    megabatches = [[order[i : i + size] for i in range(0, len(order), size)] for order in orders]
    whole = [megabatch for order in megabatches for megabatch in order[:-1]]
    shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator)]
    last = sorted(megabatches[0][-1] + megabatches[1][-1])
    return [i for megabatch in (*shuffled, last) for i in megabatch]


def by_length(lengths: Sequence[int], micro_batch_size: int, world_size: int, generator: torch.Generator) -> list[int]:
    """Shuffles samples, then reorders each megabatch into `world_size` shares of nearly equal total length."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = world_size * micro_batch_size
    result: list[int] = []
    for i in range(0, len(order), size):
        megabatch = sorted(order[i : i + size], key=lambda j: lengths[j], reverse=True)
        result += [j for share in _equal_shares(megabatch, lengths, world_size) for j in share]
    return result


def _equal_shares(longest_first: list[int], lengths: Sequence[int], n: int) -> list[list[int]]:
    """Splits samples into n equal-sized shares. Each sample goes to the non-full share with the least total length."""
    if len(longest_first) % n:
        return [longest_first[i::n] for i in range(n)]
    shares: list[list[int]] = [[] for _ in range(n)]
    totals = [0.0] * n
    for index in longest_first:
        shortest = totals.index(min(totals))
        shares[shortest].append(index)
        full = len(shares[shortest]) == len(longest_first) // n
        totals[shortest] = math.inf if full else totals[shortest] + lengths[index]
    return shares
