"""Reads the folders that `llava eval run` writes. Of the benchmark's own files, only the pictures are needed."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.entries import Entry, JsonFile
from llava.eval.questions import QUESTIONS
from llava.eval.reviews import REVIEWS, metadata
from llava.eval.task import Item, Scores, Task, figures_of
from llava.eval.tasks import TASKS

log = logging.getLogger(__name__)
RUN, SCHEMA = "run.json", "llava-eval-run/1"
SETTINGS, ANSWERS, SCORES = "settings.json", "answers.jsonl", "scores.json"
PROMPTS = "prompts.json"
_MAX = 1e300  # a larger number is no score
_AGAIN = "run the llava eval run command of this folder again, which writes it"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model, and its scores in one task or several."""

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


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question of a run, and its answer."""

    id: str
    prompt: str  # what the user says, without image placeholders
    images: tuple[str, ...] = ()
    answer: Any = None  # the right one, as the task compares it
    groups: tuple[str, ...] = ()
    text: str | None = None  # the model's reply; None if there is none
    reviews: tuple[str, ...] = ()  # what a judge wrote

    @property
    def about(self) -> str:
        """What the same question has in another run, too: names of pictures, right answer, groups; not the wording."""
        return json.dumps([[Path(one).name for one in self.images], self.answer, self.groups], sort_keys=True)


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
        value=_number(entry, "value"),
        n=_count(entry, "n"),
        unanswered=_count(entry, "unanswered"),
        unjudged=_count(entry, "unjudged"),
        figures={key: _figure(entry, key, value) for key, value in _mapping(entry, "figures").items()},
        details={key: _figure(entry, key, value) for key, value in _mapping(entry, "details").items()},
        note=str(entry.value.get("note") or ""),
        items=[_item(entry, id, value) for id, value in _mapping(entry, "items").items()],
    )


def _item(entry: Entry, id: str, value: Any) -> Item:
    inner = Entry(f"{entry.where}: item {id:.60}", value if isinstance(value, dict) else {})
    sums = inner.value.get("sums")
    if not isinstance(sums, list) or not all(map(_is_number, sums)):
        raise DataError(f"{inner.where}: found {value!r:.60}; expected its groups and sums")
    return Item(id=id, groups=_texts(inner, "groups"), sums=tuple(map(float, sums)))


def check_scores(run: Run) -> None:
    """Raises DataError unless a run has scores, of known tasks, and their items give them."""
    if not run.scores:
        raise DataError(f"{run.folder}: has no scores yet; finish it with the same llava eval run command")
    for name, scores in run.scores.items():
        where = run.folder / name / SCORES
        if name not in TASKS:
            raise DataError(f"{where}: there is no task {name!r:.40}; expected one of {', '.join(TASKS)}")
        if not _follows(scores, TASKS[name]):
            raise DataError(f"{where}: its items do not give the value {scores.value}; remove this file, and {_AGAIN}")


def _follows(scores: Scores, task: Task) -> bool:
    try:
        value = task.headline(figures_of(task, scores.items)) if scores.items else None
    except (ValueError, LookupError, ArithmeticError, TypeError):  # sums of another length
        return False
    if value is None or scores.value is None:
        return value is scores.value
    return math.isclose(value, scores.value, rel_tol=1e-9)


# --------------------------------------------------------------------------------------------------------- questions


def read_asked(run: Run, task: str) -> list[Asked]:
    """Returns the questions of a task with their answers, in order. Raises DataError.

    A run without questions.jsonl has only the questions that have an answer, without pictures and right answers.
    """
    folder = run.folder / task
    answers = {one.id("question_id"): one for one in _lines(folder / ANSWERS, "an answer")}
    reviews: dict[str, list[str]] = {}
    for one in _verdicts(folder / REVIEWS):
        reviews.setdefault(one.id("question_id"), []).append(_review(one))
    questions = _lines(folder / QUESTIONS, "a question")
    if answers and not questions:
        log.warning("%s: not found, so pictures and right answers are unknown; %s", folder / QUESTIONS, _AGAIN)
    return [_asked(one, answers, reviews) for one in questions or answers.values()]


def _asked(entry: Entry, answers: Mapping[str, Entry], reviews: Mapping[str, Sequence[str]]) -> Asked:
    id = entry.id("question_id")
    return Asked(
        id=id,
        prompt=entry.text("prompt"),
        images=_texts(entry, "images"),
        answer=entry.value.get("answer"),
        groups=_texts(entry, "groups"),
        text=answers[id].text("text") if id in answers else None,
        reviews=tuple(reviews.get(id, ())),
    )


def _review(entry: Entry) -> str:
    """Returns what a judge wrote, or its scores, in the layout of the original's eval_gpt_review.py."""
    content = entry.value.get("content")
    scores = entry.value.get("tuple", entry.value.get("score"))
    return content if isinstance(content, str) else json.dumps(scores)


def read_judges(run: Run, task: str) -> list[str]:
    """Returns the judges of a run's answers in a task; none if nobody has judged them. Raises DataError."""
    made = (metadata(one) for one in _verdicts(run.folder / task / REVIEWS))
    names = (f"{one['judge']} at temperature {one.get('temperature')}" if "judge" in one else "unknown" for one in made)
    return sorted(set(names))


def read_settings(run: Run, task: str) -> Mapping[str, Any]:
    """Returns the settings of a task, which include a digest of the questions. Raises DataError."""
    file = run.folder / task / SETTINGS
    return _object(file, "the settings of a run").value if file.exists() else {}


def read_prompts(run: Run, task: str) -> Sequence[str]:
    """Returns some prompts as the model saw them. Raises DataError."""
    file = run.folder / task / PROMPTS
    return _texts(_object(file, "example prompts"), "prompts") if file.exists() else ()


# ------------------------------------------------------------------------------------------------------------ fields


def _object(file: Path, expected: str) -> Entry:
    read = JsonFile(file, expected)
    return read.entry(read.value(), str(file))


def _lines(file: Path, expected: str) -> list[Entry]:
    return list(JsonFile(file, expected).entries()) if file.exists() else []


def _verdicts(file: Path) -> list[Entry]:
    """Returns what a judge wrote, except a line that it is just writing."""
    return list(JsonFile.appended(file, "a judge's verdict").entries()) if file.exists() else []


def _mapping(entry: Entry, key: str) -> Mapping[str, Any]:
    value = entry.value.get(key, {})
    if not isinstance(value, dict):
        raise DataError(f"{entry.where}: {key} is {value!r:.60}; expected an object")
    return value


def _texts(entry: Entry, key: str) -> tuple[str, ...]:
    value = entry.value.get(key, [])
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise DataError(f"{entry.where}: {key} is {value!r:.60}; expected a list of texts")
    return tuple(value)


def _number(entry: Entry, key: str) -> float | None:
    return _figure(entry, key, entry.value.get(key))


def _count(entry: Entry, key: str) -> int:
    value = entry.value.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{entry.where}: {key} is {value!r:.60}; expected a number of questions")
    return value


def _figure(entry: Entry, name: str, value: Any) -> float | None:
    if value is not None and not _is_number(value):
        raise DataError(f"{entry.where}: {name:.60} is {value!r:.60}; expected a number or null")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX  # false for NaN
