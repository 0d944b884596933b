"""Reads the folders that `llava eval run` writes: one model, and its scores in one task or several."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.entries import Entry, JsonFile

RUN, SCHEMA = "run.json", "llava-eval-run/1"
SCORES, SETTINGS = "scores.json", "settings.json"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The figures of a task."""

    task: str
    metric: str
    value: float | None  # the headline
    n: int  # questions with an answer
    unanswered: int
    figures: Mapping[str, float | None]  # of each group of questions


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model, and its scores."""

    folder: Path
    model: Mapping[str, Any]  # name, path, base, and zoo: ids of the entries that its files can be
    settings: Mapping[str, Any]
    versions: Mapping[str, Any]
    machine: Mapping[str, Any]
    scores: Mapping[str, Scores]  # by task; empty before the first task is finished

    @property
    def name(self) -> str:
        """The name of the model."""
        return str(self.model["name"])


def read_runs(folder: Path) -> list[Run]:
    """Returns the runs in a folder, by name, or the one that the folder is. Raises DataError if one is damaged."""
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder; expected an evaluation run, or a folder that contains some")
    folders = [folder] if (folder / RUN).exists() else sorted(file.parent for file in folder.glob(f"*/{RUN}"))
    return [read_run(one) for one in folders]


def read_run(folder: Path) -> Run:
    """Returns a run. Raises DataError if it is none, or is damaged."""
    entry = _object(folder / RUN, "the record of an evaluation run")
    if (schema := entry.value.get("schema")) != SCHEMA:
        raise DataError(f"{entry.where}: schema is {schema!r:.60}; expected {SCHEMA!r}")
    parts = {key: _mapping(entry, key) for key in ("model", "settings", "versions", "machine")}
    name, zoo = parts["model"].get("name"), parts["model"].get("zoo") or []
    if not isinstance(name, str):
        raise DataError(f"{entry.where}: the name of the model is {name!r:.60}; expected a text")
    if not isinstance(zoo, list) or not all(isinstance(id, str) for id in zoo):
        raise DataError(f"{entry.where}: zoo is {zoo!r:.60}; expected a list of ids")
    found = {file.parent.name: read_scores(file) for file in sorted(folder.glob(f"*/{SCORES}"))}
    return Run(folder=folder, scores=found, **parts)


def read_scores(file: Path) -> Scores:
    """Returns the content of a scores.json. Raises DataError."""
    entry = _object(file, "the scores of an evaluation run in a task")
    task, metric = entry.value.get("task"), entry.value.get("metric")
    if task != file.parent.name:
        raise DataError(f"{file}: task is {task!r:.60}; expected {file.parent.name!r}, the name of its folder")
    return Scores(
        task=task,
        metric=metric if isinstance(metric, str) else "",
        value=_number(entry, "value", entry.value.get("value")),
        n=_count(entry, "n"),
        unanswered=_count(entry, "unanswered"),
        figures={key: _number(entry, key, value) for key, value in _mapping(entry, "figures").items()},
    )


def read_settings(run: Run, task: str) -> Mapping[str, Any]:
    """Returns the settings of a task, such as --split; empty if they are not recorded. Raises DataError."""
    file = run.folder / task / SETTINGS
    return _object(file, "the settings of a task").value if file.exists() else {}


# ------------------------------------------------------------------------------------------------------------ fields


def _object(file: Path, expected: str) -> Entry:
    read = JsonFile(file, expected)
    return read.entry(read.value(), str(file))


def _mapping(entry: Entry, key: str) -> Mapping[str, Any]:
    value = entry.value.get(key, {})
    if not isinstance(value, dict):
        raise DataError(f"{entry.where}: {key} is {value!r:.60}; expected an object")
    return value


def _number(entry: Entry, name: str, value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and abs(value) < math.inf):  # false for NaN
        raise DataError(f"{entry.where}: {name:.60} is {value!r:.60}; expected a number or null")
    return None if value is None else float(value)


def _count(entry: Entry, key: str) -> int:
    value = entry.value.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{entry.where}: {key} is {value!r:.60}; expected a number of questions")
    return value
