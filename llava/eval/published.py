"""Scores of runs beside those published for the same checkpoint: `llava zoo --runs`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava.errors import DataError, counted
from llava.eval.runs import SETTINGS, Run, read_runs, read_settings
from llava.eval.task import Scores
from llava.zoo.catalogue import Entry, Table, entries, origin, tables

ALONE = "Other runs"  # of checkpoints that are no entry of the zoo, or can be several
_COGNITION = "MME cognition"  # the zoo has it only beside MME's perception, as 1519/332
_PLAIN = {  # column of the zoo -> task, and the group of its questions; "" for the headline
    "VQAv2": ("vqav2", ""),
    "GQA": ("gqa", ""),
    "VizWiz": ("vizwiz", ""),
    "SQA": ("scienceqa", "image"),  # as in the tables of LLaVA-1.5 and 1.6
    "TextVQA": ("textvqa", ""),
    "POPE": ("pope", ""),
    "MME": ("mme", ""),
    _COGNITION: ("mme", "cognition"),
    "SEED-IMG": ("seed", "image"),
    "LLaVA-Bench-Wild": ("llava-bench-wild", ""),
    "overall": ("llava-bench-wild", ""),
    "conv": ("llava-bench-wild", "conv"),
    "detail": ("llava-bench-wild", "detail"),
    "complex": ("llava-bench-wild", "complex"),
    "MM-Vet": ("mm-vet", ""),
}
_SAME = {"overall": "LLaVA-Bench-Wild", "LLaVA-Bench-Wild": "overall"}  # two names of one score


@dataclass(frozen=True)
class Compared:
    """A measured score, and the published one."""

    task: str
    measured: float
    published: float | None

    @property
    def difference(self) -> float | None:
        """Measured minus published, or None if nothing is published."""
        return None if self.published is None else self.measured - self.published

    def __str__(self) -> str:
        return f"{self.measured:.1f}" + ("" if self.difference is None else f" ({self.difference:+.1f})")


@dataclass(frozen=True)
class MeasuredTask:
    """What is to be known about a score."""

    task: str
    value: float | None
    n: int  # questions with an answer
    unanswered: int
    split: str | None
    in_zoo: bool  # whether the zoo has a column for it


@dataclass(frozen=True)
class Measured:
    """A run, and the entry of the zoo that its checkpoint is."""

    folder: Path
    name: str
    entry: Entry | None  # None if it is none or can be several
    candidates: Sequence[str]  # ids of the entries that it can be
    scores: Mapping[str, Compared] = field(default_factory=dict)  # by column
    tasks: Sequence[MeasuredTask] = ()

    @property
    def problem(self) -> str:
        """Why nothing published stands beside the scores; "" if something does."""
        if len(self.candidates) > 1:
            return f"its files do not distinguish these {len(self.candidates)} entries of the zoo:"
        if not self.candidates:
            return "its files are those of no entry of the zoo"
        return "" if self.entry else f"its entry {self.candidates[0]} is not in this version of the zoo"

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON-compatible values."""
        return {
            "run": str(self.folder),
            "model": self.name,
            "entry": self.entry["id"] if self.entry else None,
            "candidates": list(self.candidates),
            "problem": self.problem or None,
            "scores": {column: asdict(one) | {"difference": one.difference} for column, one in self.scores.items()},
            "tasks": [asdict(one) for one in self.tasks],
        }


def read_measured(folder: Path) -> list[Measured]:
    """Returns the runs in a folder, compared with the zoo. Raises DataError if there are none or one is damaged."""
    if not (runs := read_runs(folder)):
        raise DataError(f"{folder}: contains no evaluation run; expected run.json, in it or in a folder in it")
    return [_measured(run) for run in runs]


def published(entry: Entry) -> dict[str, float]:
    """Returns the published scores of an entry by column. A re-export has those of its original."""
    found: dict[str, float] = {}
    for column, score in (origin(entry).get("scores") or {}).items():
        parts = [float(part) for part in str(score).split("/")]  # perception/cognition
        found |= dict(zip((column, _COGNITION), parts, strict=False))
    return found


def _measured(run: Run) -> Measured:
    known = {entry["id"]: entry for entry in entries()}
    candidates = list(run.model.get("zoo") or ())
    entry = known.get(candidates[0]) if len(candidates) == 1 else None
    splits = {task: _split(run, task) for task in run.scores}
    values = {column: found for column, found in _columns(run.scores, splits).items() if found[1] is not None}
    aims = published(entry) if entry else {}
    scores = {
        column: Compared(task, value, aims.get(column))
        for column, (task, value) in values.items()
        if value is not None and _wanted(column, aims)
    }
    in_zoo = {task for task, _ in values.values()}
    tasks = [
        MeasuredTask(name, one.value, one.n, one.unanswered, splits[name], name in in_zoo)
        for name, one in run.scores.items()
    ]
    return Measured(run.folder, run.name, entry, candidates, scores, tasks)


def _split(run: Run, task: str) -> str | None:
    split = read_settings(run, task).get("--split")
    if split is not None and not isinstance(split, str):
        raise DataError(f"{run.folder / task / SETTINGS}: --split is {split!r:.40}; expected a name or null")
    return split


def _wanted(column: str, aims: Mapping[str, float]) -> bool:
    """Whether a column is shown: of two names of a score the published one, by default that of LLaVA-1.5."""
    return column not in _SAME or column in aims or (column == "LLaVA-Bench-Wild" and _SAME[column] not in aims)


def _columns(scores: Mapping[str, Scores], splits: Mapping[str, str | None]) -> dict[str, tuple[str, float | None]]:
    """Returns the task and the value of each column that is measured."""
    found = {
        column: (task, scores[task].figures.get(group) if group else scores[task].value)
        for column, (task, group) in _PLAIN.items()
        if task in scores
    }
    if "mmbench" in scores:
        is_chinese = "_cn_" in (splits["mmbench"] or "")
        found["MM-Bench-CN" if is_chinese else "MM-Bench"] = ("mmbench", scores["mmbench"].value)
    if "seed" in scores and "video" in scores["seed"].figures:  # pictures and videos
        found["SEED"] = ("seed", scores["seed"].value)
    return found


# ------------------------------------------------------------------------------------------------------------ tables


def score_tables(chosen: Iterable[Entry], runs: Sequence[Measured]) -> Iterator[Table]:
    """Yields the zoo's tables with the scores of each entry, and below it those of its runs; then the other runs.

    Entries without a published score and without a run are left out.
    """
    by_id = {entry["id"]: entry for entry in chosen}
    for table in tables(by_id.values()):
        rows = []
        for id in (line[0] for line in table.lines):
            own = [run for run in runs if run.entry and run.entry["id"] == id]
            if own or published(by_id[id]):
                rows += [(id, {column: f"{score:.1f}" for column, score in published(by_id[id]).items()})]
                rows += [_row(run) for run in own]
        if rows:
            yield _table(table.title, rows)
    if alone := [_row(run) for run in runs if run.entry is None]:
        yield _table(ALONE, alone)


def _row(run: Measured) -> tuple[str, dict[str, str]]:
    return f"  {run.folder.name}", {column: str(one) for column, one in run.scores.items()}


def _table(title: str, rows: Sequence[tuple[str, Mapping[str, str]]]) -> Table:
    columns = list(dict.fromkeys(column for _, cells in rows for column in cells))
    return Table(title, columns, [[name, *(cells.get(column, "") for column in columns)] for name, cells in rows])


def notes(run: Measured) -> Iterator[str]:
    """Yields what is to be known about the scores of a run, a line each."""
    yield f"{run.folder}: {run.name}" + (f"; {run.problem}" if run.problem else "")
    if run.problem:
        yield from (f"  {id}" for id in run.candidates if len(run.candidates) > 1)
    for one in run.tasks:
        value = "" if one.in_zoo else f"{'no score' if one.value is None else f'{one.value:.4g}'}, "
        split = f" of {one.split}" if one.split else ""
        unanswered = f", {one.unanswered:,} unanswered" if one.unanswered else ""
        yield f"  {one.task}: {value}{counted(one.n, 'question')}{split}{unanswered}"
    if not run.tasks:
        yield "  no scores yet"
