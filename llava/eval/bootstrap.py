"""Paired bootstrap of the difference between two runs, from the sums of their items.

Percentile intervals, as in chapter 13 of Efron and Tibshirani, An Introduction to the Bootstrap (1993). Clusters of
items are drawn with replacement, as many as there are, the same ones in both runs, and the headline of each run is
computed from its drawn items. Items about the same picture are one cluster, as their answers depend on each other.
Draws are not stratified by group, so groups vary in size, as they would if the benchmark were collected again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llava.eval.task import ALL, Item, Task

_LEVEL = 0.95
_MIN_DEFINED = 0.95  # of the samples, in which both headlines are defined
_CHUNK = 2**22  # entries of a matrix of draws

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """How many times, and from which seed, clusters are drawn."""

    samples: int = 1000
    seed: int = 0


def interval(
    task: Task, pair: tuple[Sequence[Item], Sequence[Item]], clusters: Sequence[str], options: Options
) -> tuple[float, float] | None:
    """Returns the 95 % percentile interval of the second headline minus the first.

    None if it is not defined: without items, or if a headline is undefined in more than 5 % of the samples.

    pair: the items of both runs, in the same order. clusters: what each item is about.
    """
    if not clusters:
        return None
    first, second = (_headlines(task, items, clusters, options) for items in pair)
    differences = second - first
    defined = differences[~np.isnan(differences)]
    if len(defined) < _MIN_DEFINED * len(differences):
        return None
    low, high = np.quantile(defined, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def _headlines(task: Task, items: Sequence[Item], clusters: Sequence[str], options: Options) -> Floats:
    """Returns the headline of each sample, or NaN where it is not defined."""
    groups, sums = _columns(items)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    per_cluster = np.zeros((len(numbers), sums.shape[1]))
    np.add.at(per_cluster, [numbers[name] for name in clusters], sums)
    drawn = (draws @ per_cluster for draws in _draws(len(numbers), options))
    return np.array([_headline(task, groups, row) for rows in drawn for row in rows])


def _columns(items: Sequence[Item]) -> tuple[list[str], Floats]:
    """Returns the groups, and a matrix [items, groups * (1 + sums)]: whether an item is in a group, and its sums."""
    groups = list(dict.fromkeys([ALL, *(group for item in items for group in item.groups)]))
    member = np.array([[group == ALL or group in item.groups for group in groups] for item in items], dtype=float)
    own = np.array([[1.0, *item.sums] for item in items])
    return groups, (member[:, :, None] * own[:, None, :]).reshape(len(items), -1)


def _draws(n: int, options: Options) -> Iterator[Floats]:
    """Yields matrices [some samples, n]: how often each of n clusters is drawn. Equal seeds give equal draws."""
    random, rows = np.random.default_rng(options.seed), max(1, _CHUNK // n)
    for start in range(0, options.samples, rows):
        size = min(rows, options.samples - start)
        yield np.stack([np.bincount(random.integers(n, size=n), minlength=n) for _ in range(size)]).astype(float)


def _headline(task: Task, groups: Sequence[str], row: Floats) -> float:
    by_group = row.reshape(len(groups), -1).tolist()
    figures: Mapping[str, float | None] = {
        group: task.figure(sums) if n else None for group, (n, *sums) in zip(groups, by_group, strict=True)
    }
    value = task.headline(figures)
    return np.nan if value is None else value
