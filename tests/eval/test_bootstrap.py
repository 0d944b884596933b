"""The bootstrap interval, compared with a plain implementation and with what theory says."""

import math
import random
import time
from collections.abc import Sequence

import numpy as np
import pytest

from llava.eval.bootstrap import Options, interval
from llava.eval.task import Item, Task, figures_of
from llava.eval.tasks import TASKS

POPE, GQA = TASKS["pope"], TASKS["gqa"]  # F1 by split, and a share of right answers


def answers(rights: Sequence[bool], prefix: str = "") -> list[Item]:
    return [Item(id=f"{prefix}{i}", sums=(float(one), 1.0)) for i, one in enumerate(rights)]


def pope_items(n: int, seed: int) -> list[Item]:
    """Random replies to questions of three splits, of unequal sizes."""
    draw, items = random.Random(seed), []
    for i in range(n):
        said, meant = draw.random() < 0.6, i % 2 == 0
        sums = (said and meant, said, meant, said == meant, True)
        group = ("random", "popular", "popular", "adversarial")[i % 4]
        items.append(Item(id=str(i), sums=tuple(map(float, sums)), groups=(group,)))
    return items


def plain_interval(task: Task, first: list[Item], second: list[Item], clusters: list[str], options: Options) -> tuple:
    """Draws lists of items, and scores each by the code that scores a run."""
    members = {name: [i for i, one in enumerate(clusters) if one == name] for name in dict.fromkeys(clusters)}
    names, rng, found = list(members), np.random.default_rng(options.seed), []
    for _ in range(options.samples):
        drawn = [i for k in rng.integers(len(names), size=len(names)) for i in members[names[k]]]
        values = [task.headline(figures_of(task, [items[i] for i in drawn])) for items in (first, second)]
        found.append(values[1] - values[0])
    found.sort()

    def quantile(share: float) -> float:
        at = share * (len(found) - 1)
        low = math.floor(at)
        return found[low] + (at - low) * (found[min(low + 1, len(found) - 1)] - found[low])

    return quantile(0.025), quantile(0.975)


@pytest.mark.parametrize("per_cluster", [1, 4])
def test_the_interval_is_that_of_a_plain_implementation(per_cluster: int) -> None:
    first, second = pope_items(60, 1), pope_items(60, 2)
    clusters = [str(i // per_cluster) for i in range(60)]
    options = Options(samples=300, seed=5)
    expected = plain_interval(POPE, first, second, clusters, options)
    assert interval(POPE, (first, second), clusters, options) == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_paired_shares_is_the_one_of_theory() -> None:
    n, gained, lost = 800, 120, 60  # of the others, half are right in both runs
    first = answers([False] * gained + [True] * lost + [i % 2 == 0 for i in range(n - gained - lost)])
    second = answers([True] * gained + [False] * lost + [i % 2 == 0 for i in range(n - gained - lost)])
    difference = (gained - lost) / n
    deviation = math.sqrt(((gained + lost) / n - difference**2) / n)  # McNemar's
    expected = (100 * (difference - 1.96 * deviation), 100 * (difference + 1.96 * deviation))
    found = interval(GQA, (first, second), [one.id for one in first], Options(samples=8000))
    assert found == pytest.approx(expected, abs=0.2)


def test_copies_of_questions_about_a_picture_add_no_certainty() -> None:
    first, second = pope_items(40, 1), pope_items(40, 2)
    once = interval(POPE, (first, second), [one.id for one in first], Options())
    copied = ([one for one in items for _ in range(5)] for items in (first, second))
    clusters = [one.id for one in first for _ in range(5)]
    assert interval(POPE, tuple(copied), clusters, Options()) == pytest.approx(once)


def test_equal_runs_differ_by_nothing_and_equal_seeds_give_equal_intervals() -> None:
    first, second, ids = pope_items(40, 1), pope_items(40, 2), [str(i) for i in range(40)]
    assert interval(POPE, (first, first), ids, Options()) == (0, 0)
    found = [interval(POPE, (first, second), ids, Options(seed=seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_there_is_no_interval_without_items_or_with_figures_that_are_mostly_undefined() -> None:
    assert interval(POPE, ([], []), [], Options()) is None
    rare = [Item(id=str(i), sums=(float(i == 0), float(i == 0))) for i in range(30)]  # a third of the draws lack item 0
    assert interval(GQA, (rare, rare), [one.id for one in rare], Options()) is None


def test_ten_thousand_items_take_seconds() -> None:
    first, second = pope_items(10_000, 1), pope_items(10_000, 2)
    start = time.perf_counter()
    assert interval(POPE, (first, second), [one.id for one in first], Options(samples=1000))
    assert time.perf_counter() - start < 20
