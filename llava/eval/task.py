"""What a benchmark is: questions, the prompts that they become, and the figures that follow from the answers.

A figure is a function of sums over questions, such as right answers and all answers. The sums of each question are kept
in scores.json, so the figure of any selection or resampling of questions follows without the benchmark's files.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llava.errors import ConfigError, DataError, counted
from llava.eval.entries import Entry, JsonFile
from llava.eval.metrics import share

if TYPE_CHECKING:
    from llava.assistant import Assistant

ALL = "all"
Verdict = Literal["right", "partly right", "wrong", "scored", "not scored"]
_RIGHT = 100.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a benchmark."""

    id: str
    text: str  # as in the benchmark's file
    images: tuple[Path | bytes, ...] = ()  # files, or the content of a file
    answer: Any = None  # what the task compares a reply with
    groups: tuple[str, ...] = ()  # of which figures are reported beside that of all questions
    numbered: bool = False  # whether the id is a number in the benchmark's file
    values: Mapping[str, Any] = field(default_factory=dict)  # other fields of the file that the task needs


@dataclass(frozen=True, kw_only=True)
class Item:
    """What a figure is a mean over: one question, or the questions that are scored together."""

    id: str
    sums: tuple[float, ...]
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answered:
    """A question and a model's reply."""

    question: Question
    text: str
    verdicts: tuple[tuple[float, float], ...] = ()  # of a judge: scores of the reference and of the reply

    def item(self, *sums: float) -> Item:
        """Returns what the reply adds to the sums, as an item in the groups of its question."""
        return Item(id=self.question.id, sums=tuple(map(float, sums)), groups=self.question.groups)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the files of a benchmark are."""

    folder: Path
    images: Path | None = None  # folder of the pictures, if it is not where the original has it
    split: str = ""  # of a benchmark that has several

    @classmethod
    def of(cls, task: "Task", folder: Path | None, *, images: Path | None = None, split: str | None = None) -> "Data":
        """Returns the data of a task. folder: that of the task, or the one that contains it in the original's layout.

        If it is None, the files of an included task are used. Raises ConfigError if there is no such folder, or the
        task has no such split.
        """
        folder = folder or task.included
        if folder is None or not folder.is_dir():
            found = "is missing" if folder is None else f"is {folder}, which is no folder"
            raise ConfigError(f"--data {found}; expected the folder with the files that llava eval tasks lists")
        if split is not None and split not in task.splits:
            known = f"choose one of {', '.join(task.splits)}" if task.splits else "it has none, omit --split"
            raise ConfigError(f"there is no split {split!r:.40} of {task.name}; {known}")
        inner = folder / task.folder
        return cls(
            folder=inner if task.folder and inner.is_dir() else folder,
            images=images,
            split=split or next(iter(task.splits), ""),
        )

    def file(self, name: str, content: str) -> Path:
        """Returns a file in the folder. Raises DataError, which says what it should contain, if it is missing."""
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"{path}: not found; expected {content}; llava eval tasks lists the files of each task")
        return path

    def json(self, name: str, content: str) -> JsonFile:
        """Returns a JSON file in the folder. Raises DataError, also if it is empty."""
        file = JsonFile(self.file(name, content), content)
        if not file.text.strip():
            raise DataError(f"{file.path}: is empty; expected {content}")
        return file

    def image(self, name: str, usual: str = "") -> Path:
        """Returns the path of a picture. usual: the folder of pictures in the original's layout."""
        return (self.images or self.folder / usual) / name


class Task(ABC):
    """A benchmark. A new one is a file in `tasks` and a line in its table."""

    name: str
    title: str
    metric: str  # what `figure` returns, with its unit
    files: Mapping[str, str]  # each file or folder that `questions` reads, and its content
    folder: str = ""  # where these are in the original's layout, below playground/data/eval
    included: Path | None = None  # folder in this package that is used if no other one is given
    splits: Sequence[str] = ()  # the values of --split, the default first
    max_new_tokens: int = 128
    judged: bool = False  # whether the figures follow from a judge's verdicts on the replies
    lower_is_better: bool = False  # as of a perplexity

    @abstractmethod
    def questions(self, data: Data) -> list[Question]:
        """Returns the questions in the order of the file. Raises DataError."""

    def prompt(self, question: Question) -> str:
        """Returns what the user says, without image placeholders."""
        return question.text

    @abstractmethod
    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns what the replies add to the sums."""

    def figure(self, sums: Sequence[float]) -> float | None:
        """Returns the metric of items with these sums; None if it is not defined. Default: the first in % of the last.

        Sums are added up over items, so a figure must not depend on their order.
        """
        return share(sums[0], sums[-1])

    def item_of(self, question: str) -> str:
        """Returns the id of the item that a question is part of, by their ids. Default: each is one of its own."""
        return question

    def item_score(self, sums: Sequence[float]) -> float | None:
        """Returns how good the replies of one item are. Default: its figure. See `verdict`."""
        return self.figure(sums)

    def verdict(self, score: float | None) -> Verdict:
        """Returns what the score of an item means: 0 is wrong and 100 or more is right, unless it is a judge's."""
        if score is None or self.judged or self.lower_is_better:
            return "scored" if score is not None else "not scored"
        return "right" if score >= _RIGHT else "wrong" if score <= 0 else "partly right"

    def headline(self, figures: Mapping[str, float | None]) -> float | None:
        """Returns the one number by which models are compared. figures: of ALL, and of each group."""
        return figures[ALL]

    def details(self, sums: Sequence[float]) -> Mapping[str, float | None]:
        """Returns further figures of all items."""
        return {}

    def submission(self, answered: Sequence[Answered], data: Data) -> Mapping[str, bytes]:
        """Returns the files in which the benchmark's own programs expect the replies. Default: none.

        Each is written beside the answers, under its path here. Raises DataError.
        """
        return {}

    def note(self, answered: Sequence[Answered]) -> str:
        """Returns what is to be known about the figures, such as why there are none. Default: nothing."""
        return ""


def question(entry: Entry, data: Data, folder: str, **values: Any) -> Question:
    """Returns a question in LLaVA's layout, with question_id, image and text. Raises DataError.

    folder: that of the pictures in the original's layout. values: the other fields of the question.
    """
    path, id = data.image(entry.text("image"), folder), entry.id("question_id")
    own = {"id": id, "numbered": "id" not in values and isinstance(entry.value["question_id"], int)}
    return Question(**{**own, "text": entry.text("text"), "images": (path,), **values})


def read_questions(task: Task, data: Data) -> list[Question]:
    """Returns the questions of a task. Raises DataError, also if there are none."""
    found = task.questions(data)
    if not found:
        names = ", ".join(name.replace("{split}", data.split) for name in task.files)
        raise DataError(f"{data.folder}: no question of {task.name} found; expected some in {names}")
    return found


class Judged(Task):
    """A benchmark whose figures follow from a judge's verdicts: llava eval judge."""

    judged = True

    @abstractmethod
    def judge_prompt(self, question: Question, reply: str) -> str:
        """Returns what the judge is asked about a reply. The question's values have its category and reference_id."""


class Measured(Task):
    """A benchmark in which the model generates nothing: a measurement takes the place of a reply."""

    @abstractmethod
    def measure(self, assistant: "Assistant", question: Question) -> str:
        """Returns the measurement, as JSON. Raises LlavaError."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The figures of a run, and what they follow from."""

    task: str
    metric: str
    value: float | None  # the headline
    n: int  # questions with an answer
    unanswered: int
    unjudged: int  # questions with an answer and without a verdict
    figures: Mapping[str, float | None]  # of ALL, and of each group
    details: Mapping[str, float | None]  # further figures of all questions
    items: Sequence[Item]
    note: str = ""  # what is to be known about the figures

    def summary(self) -> dict[str, Any]:
        """Returns everything except the items, as JSON-compatible values."""
        given = {key: value for key, value in vars(self).items() if key != "items"}
        return {**given, "figures": dict(self.figures), "details": dict(self.details)}

    def json(self) -> str:
        """Returns the content of scores.json, with each item on a line of its own."""
        items = ({"groups": list(one.groups), "sums": list(one.sums)} for one in self.items)
        lines = (f"  {_dumped(one.id)}: {_dumped(item)}" for one, item in zip(self.items, items, strict=True))
        head = "".join(f" {_dumped(key)}: {_dumped(value)},\n" for key, value in self.summary().items())
        return f'{{\n{head} "items": {{\n' + ",\n".join(lines) + "\n }\n}\n"


def scores(task: Task, answered: Sequence[Answered], *, n_questions: int) -> Scores:
    """Scores replies. Questions without a reply or a verdict are counted, and part of no figure."""
    judged = [one for one in answered if one.verdicts or not task.judged]
    items = task.score(judged)
    figures = figures_of(task, items)
    return Scores(
        task=task.name,
        metric=task.metric,
        value=task.headline(figures),
        n=len(judged),
        unanswered=n_questions - len(answered),
        unjudged=len(answered) - len(judged),
        figures=figures,
        details=task.details(_total(items)) if items else {},
        items=items,
        note=task.note(judged),
    )


def figures_of(task: Task, items: Sequence[Item]) -> dict[str, float | None]:
    """Returns the figure of all items, and of each group in the order in which the groups appear."""
    groups = dict.fromkeys(group for item in items for group in item.groups)
    members = {ALL: items, **{group: [item for item in items if group in item.groups] for group in groups}}
    return {group: task.figure(_total(some)) if some else None for group, some in members.items()}


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _total(items: Iterable[Item]) -> list[float]:
    return [sum(column) for column in zip(*(item.sums for item in items), strict=True)]


def check_images(questions: Iterable[Question]) -> None:
    """Raises DataError, which counts the pictures that do not exist."""
    paths = dict.fromkeys(path for question in questions for path in question.images if isinstance(path, Path))
    missing = [path for path in paths if not _is_file(path)]
    if missing:
        named = ", ".join(map(str, missing[:3])) + ", …" * (len(missing) > 3)
        raise DataError(
            f"{len(missing):,} of {counted(len(paths), 'picture')} not found ({named}); set images= (--images) to the "
            "folder that has them"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False
