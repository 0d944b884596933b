"""Compares runs with the first of them: differences with confidence intervals, and the questions that changed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llava.errors import ConfigError, DataError, counted
from llava.eval.bootstrap import Options, interval
from llava.eval.runs import RUN, Asked, Run, check_scores, read_asked, read_judges, read_runs, read_settings
from llava.eval.task import Item, Scores, Task, figures_of
from llava.eval.tasks import TASKS

# as in the newest tables of the zoo; the others follow
_ZOO_ORDER = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "seed", "llava-bench-wild")
_FEW = 20  # clusters, of which a bootstrap says little
_ABOUT = ("settings", "versions", "machine")


@dataclass(frozen=True, kw_only=True)
class Change:
    """An item whose score differs between two runs."""

    id: str
    scores: tuple[float | None, float | None]
    better: bool
    prompt: str | None = None  # of the first run; None if it is not recorded
    answer: Any = None  # the right one
    texts: tuple[str | None, str | None] = (None, None)  # the replies


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A run compared with the first one, in the items that both have."""

    value: float | None  # headline minus that of the first run
    interval: tuple[float, float] | None  # 95 %
    n: int  # items in both
    n_clusters: int  # pictures with all their items, and items without a picture
    changes: Sequence[Change] = ()
    reworded: int = 0  # replies with other words and the same score


@dataclass(frozen=True, kw_only=True)
class Row:
    """One task. A run that lacks it has None."""

    task: Task
    scores: Sequence[Scores | None]
    differences: Sequence[Difference | None]  # of each run except the first


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side."""

    runs: Sequence[Run]
    names: Sequence[str]
    rows: Sequence[Row]
    settings: Mapping[str, Sequence[Any]]  # those that differ, by run
    notes: Sequence[str]  # what limits the comparison


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Returns the runs in folders, each of which is one or contains some. Raises ConfigError or DataError."""
    found: list[Run] = []
    for folder in folders:
        if not (some := read_runs(folder)):
            raise DataError(f"{folder}: contains no run; expected a folder that llava eval run wrote, with {RUN} in it")
        found += some
    for run in found:
        check_scores(run)
    resolved = [run.folder.resolve() for run in found]
    if len(set(resolved)) < max(2, len(found)):
        what = "the same run twice" if len(found) > 1 else "one run"
        raise ConfigError(f"found {what} ({found[0].folder}); give the folders of two runs or more")
    return found


def compare(runs: Sequence[Run], options: Options) -> Comparison:
    """Compares runs with the first one. Raises DataError."""
    names, notes = _names(runs), list[str]()
    rows = [_row(task, runs, names, options, notes) for task in _tasks(runs)]
    return Comparison(runs=runs, names=names, rows=rows, settings=_settings(runs), notes=notes)


def _names(runs: Sequence[Run]) -> list[str]:
    """Returns the names of the models, or if some are equal, those of the folders, or else the paths."""
    names = [run.name for run in runs]
    for others in ([run.folder.resolve().name for run in runs], [str(run.folder) for run in runs]):
        names = names if len(set(names)) == len(names) else others
    return names


def _tasks(runs: Sequence[Run]) -> list[Task]:
    order = dict.fromkeys([*_ZOO_ORDER, *TASKS])
    return [TASKS[name] for name in order if any(name in run.scores for run in runs)]


def _settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Returns the settings, versions and machines that differ, except the model."""
    found = [{key: value for part in _ABOUT for key, value in getattr(run, part).items()} for run in runs]
    for run, values in zip(runs, found, strict=True):
        for task in run.scores:
            own = read_settings(run, task).items()
            values |= {
                f"{task}: {key}": value
                for key, value in own
                if key not in run.settings and key not in ("questions", "weights")
            }
    names = dict.fromkeys(name for values in found for name in values if name != "--model")
    rows = {name: [values.get(name) for values in found] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


# ------------------------------------------------------------------------------------------------------- differences


def _row(task: Task, runs: Sequence[Run], names: Sequence[str], options: Options, notes: list[str]) -> Row:
    scores = [run.scores.get(task.name) for run in runs]
    sides = [_Side.of(run, task) if task.name in run.scores else None for run in runs]
    differences: list[Difference | None] = []
    for name, side in zip(names[1:], sides[1:], strict=True):
        if sides[0] is None or side is None:
            differences.append(None)
            continue
        common = _common(sides[0], side)
        difference = _difference(task, common, options)
        doubts = [*common.notes, *_unlike(sides[0], side), *_doubts(difference)]
        notes += [f"{task.name}, {name} and {names[0]}: {note}" for note in doubts]
        differences.append(difference)
    return Row(task=task, scores=scores, differences=differences)


@dataclass(frozen=True)
class _Side:
    """What a run has of a task."""

    metric: str
    items: Mapping[str, Item]
    asked: Mapping[str, Sequence[Asked]]  # the questions of each item, if they are recorded
    digest: Any  # of the questions
    judges: Sequence[str]
    note: str  # on the figures

    @classmethod
    def of(cls, run: Run, task: Task) -> "_Side":
        scores, asked = run.scores[task.name], dict[str, list[Asked]]()
        for one in read_asked(run, task.name):
            asked.setdefault(task.item_of(one.id), []).append(one)
        digest = read_settings(run, task.name).get("questions")
        return cls(
            scores.metric,
            {item.id: item for item in scores.items},
            asked,
            digest,
            read_judges(run, task.name),
            scores.note,
        )


class _Pair(NamedTuple):
    """An item in both runs."""

    items: tuple[Item, Item]
    asked: tuple[Sequence[Asked], Sequence[Asked]]

    @property
    def cluster(self) -> str:
        """What the item is about: its pictures, or only itself."""
        images = {image for one in self.asked[0] for image in one.images}
        return "\n".join(sorted(images)) or f"item {self.items[0].id}"

    @property
    def same(self) -> bool:
        """Whether both items are about the same questions, in whatever words."""
        first, second = ([(one.id, one.about) for one in asked] for asked in self.asked)
        return first == second

    @property
    def texts(self) -> tuple[str | None, str | None]:
        """Both replies, or what both have replied to all questions of the item."""
        first, second = (_joined([one.text for one in asked if one.text is not None]) for asked in self.asked)
        return first, second

    @property
    def prompts(self) -> tuple[str | None, str | None]:
        """What both were asked."""
        first, second = (_joined([one.prompt for one in asked]) for asked in self.asked)
        return first, second


@dataclass(frozen=True)
class _Common:
    pairs: Sequence[_Pair] = ()
    notes: Sequence[str] = field(default=())


def _common(first: _Side, second: _Side) -> _Common:
    """Returns the items that both runs have, and what is left out."""
    if first.metric != second.metric:
        return _Common(notes=[f"not compared, as the metrics are {second.metric} and {first.metric}"])
    pairs = [
        _Pair((item, second.items[id]), (first.asked.get(id, ()), second.asked.get(id, ())))
        for id, item in first.items.items()
        if id in second.items
    ]
    if first.digest is not None and first.digest == second.digest:
        return _Common(pairs, list(_missing(first, second, pairs, "answered")))
    if not all(all(pair.asked) for pair in pairs):
        return _Common(notes=["not compared, as the questions differ, and those of some items are not recorded"])
    same = [pair for pair in pairs if pair.same]
    prompts = sum(len(set(pair.prompts)) > 1 for pair in same)
    notes = list(_missing(first, second, pairs, "asked and answered"))
    if left := len(pairs) - len(same):
        notes.append(f"{counted(left, 'item')} left out, with the same id and other pictures or right answers")
    if prompts:
        notes.append(f"the prompts of {counted(prompts, 'common item')} differ")
    return _Common(same, notes)


def _missing(first: _Side, second: _Side, pairs: Sequence[_Pair], what: str) -> Iterator[str]:
    if len(pairs) < max(len(first.items), len(second.items)):
        counts = f"of {len(second.items):,} and {len(first.items):,} items, {len(pairs):,} are {what} in both"
        yield f"{counts}; the difference is of these"


def _unlike(first: _Side, second: _Side) -> Iterator[str]:
    """Yields what differs in how the scores were made."""
    if first.note != second.note:
        yield f"the notes on the figures differ ({second.note or 'none'}; {first.note or 'none'})"
    if first.judges and second.judges and first.judges != second.judges:
        then, now = (", ".join(side.judges) for side in (second, first))
        yield f"the judges differ, and judges differ in their scores ({then}; {now})"


def _doubts(difference: Difference) -> Iterator[str]:
    if 0 < difference.n_clusters < _FEW:
        yield f"the questions form {counted(difference.n_clusters, 'cluster')}, too few for an exact interval"


def _difference(task: Task, common: _Common, options: Options) -> Difference:
    clusters = [pair.cluster for pair in common.pairs]
    first, second = ([pair.items[i] for pair in common.pairs] for i in (0, 1))
    changes = [change for pair in common.pairs if (change := _change(task, pair))]
    changed = {one.id for one in changes}
    return Difference(
        value=_minus(_headline(task, second), _headline(task, first)),
        interval=interval(task, (first, second), clusters, options),
        n=len(common.pairs),
        n_clusters=len(set(clusters)),
        changes=changes,
        reworded=sum(len(set(pair.texts)) > 1 for pair in common.pairs if pair.items[0].id not in changed),
    )


def _headline(task: Task, items: Sequence[Item]) -> float | None:
    return task.headline(figures_of(task, items)) if items else None


def _minus(second: float | None, first: float | None) -> float | None:
    return None if first is None or second is None else second - first


def _change(task: Task, pair: _Pair) -> Change | None:
    before, after = (task.item_score(item.sums) for item in pair.items)
    if before == after:
        return None
    more = (after if after is not None else -1) > (before if before is not None else -1)
    return Change(
        id=pair.items[0].id,
        scores=(before, after),
        better=more != task.lower_is_better,
        prompt=pair.prompts[0],
        answer=_joined([one.answer for one in pair.asked[0]]),
        texts=pair.texts,
    )


def _joined(values: Sequence[Any]) -> Any:
    """Returns the one value, or all of an item with several questions; None if there is none."""
    return values[0] if len(values) == 1 else " / ".join(map(str, values)) or None
