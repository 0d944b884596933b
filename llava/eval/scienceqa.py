"""ScienceQA: scores of answers to its multiple-choice questions, by the rules of LLaVA's eval_science_qa.py.

The rule `current` is that of the script since its commit ce1aa08 (October 2023), `before-2023-10` the one before, with
which the scores of LLaVA v0 and v1.3 were published.
"""

import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llava.config import IMAGE_PLACEHOLDER
from llava.data.scienceqa import LETTERS, Problem, Problems, check_present, read_split
from llava.errors import DataError, counted
from llava.eval.entries import Entry, JsonFile

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)
Rule = Literal["current", "before-2023-10"]
RULES: tuple[Rule, ...] = ("current", "before-2023-10")

_EXPECTED = "an answer as a JSON object with question_id and text"
_NO_ANSWER = "FAILED"  # what eval_science_qa.py writes for a question that has none
_ANSWER = re.compile(r"The answer is ([A-Z]).")  # the last dot is any character, as in the original
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_GRADES = {f"grade{n}": "G1-6" if n <= 6 else "G7-12" for n in range(1, 13)}
_GROUPS = {"subject": ("NAT", "SOC", "LAN"), "context": ("TXT", "IMG", "NO"), "grade": ("G1-6", "G7-12")}


@dataclass(frozen=True)
class Prediction:
    """An answer, as a model wrote it."""

    text: str
    prompt: str = ""  # that the model saw, if the file has it


@dataclass(frozen=True)
class Run:
    """What the answers are compared with."""

    problems: Mapping[str, Problem]  # of the split, by id
    split: str
    rule: Rule
    seed: int = 0  # of the draws of before-2023-10


def open_run(
    problems: Path, splits: Path, split: str, *, rule: Rule, seed: int = 0, skip_missing_problems: bool = False
) -> Run:
    """Reads the problems of a split. Raises DataError or ConfigError.

    skip_missing_problems: leave out ids of the split that `problems` lacks; otherwise, they are an error.
    """
    read, ids = Problems(problems), read_split(splits, split)
    present = [id for id in ids if id in read]
    if not (skip_missing_problems and present):
        check_present(ids, read)
    run = Run({id: read[id] for id in present}, split, rule, seed)
    if n := len(ids) - len(present):
        log.warning("%s: lacks %s of the split %s, left out", problems, counted(n, "problem"), split)
    return run


# ------------------------------------------------------------------------------------------------------- predictions


def read_predictions(file: Path) -> dict[str, Prediction]:
    """Returns the predictions of a file by question, in the order of the file. Raises DataError.

    Reads what LLaVA's scripts write: answers as JSON lines (or a JSON array), and the two files of eval_science_qa.py,
    with `outputs`, or with the lists `correct` and `incorrect`. If there are several answers to a question, the last
    one counts, as in the original, and a warning says how many.
    """
    entries = list(_answers(JsonFile(file, _EXPECTED)))
    found = {_id(one): Prediction(_text(one, "text"), _text(one, "prompt", missing="")) for one in entries}
    if n := len(entries) - len(found):
        log.warning("%s: %s; the last answer to each question counts", file, counted(n, "repeated answer"))
    return found


def _answers(file: JsonFile) -> Iterator[Entry]:
    value = file.value() if file.text.lstrip()[:1] == "{" and file.is_one_value() else {}
    if "question_id" in value or not value.keys() & {"outputs", "correct"}:
        yield from file.entries()
    elif isinstance(value.get("outputs"), dict):
        answered = {id: text for id, text in value["outputs"].items() if text != _NO_ANSWER}
        for id, text in answered.items():
            yield Entry(f"{file.path}, outputs, question {id!r:.40}", {"question_id": id, "text": text})
    else:
        for key in ("correct", "incorrect"):
            yield from _analyses(file, key, value.get(key))


def _analyses(file: JsonFile, key: str, values: Any) -> Iterator[Entry]:
    """Yields the answers of one of the lists in the file that the original calls --output-file."""
    if not isinstance(values, list):
        raise DataError(f"{file.path}: {key} is {values!r:.60}; expected a list of answers, or outputs for each id")
    for i, value in enumerate(values, start=1):
        where = f"{file.path}, {key}, entry {i}"
        given = file.entry(value, where).value
        if given.get("pred") != _NO_ANSWER:
            names = {"question_id": "question_id", "text": "pred", "prompt": "question"}  # ours: theirs
            yield Entry(where, {ours: given.get(theirs) for ours, theirs in names.items()})


def _id(entry: Entry) -> str:
    id = entry.value.get("question_id")
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise DataError(f"{entry.where}: question_id is {id!r:.60}; expected the id of a problem")
    return str(id)


def _text(entry: Entry, key: str, missing: str | None = None) -> str:
    text = entry.value.get(key, missing)
    if not isinstance(text, str):
        raise DataError(f"{entry.where}: {key} is {text!r:.60}; expected a text")
    return text


def letter(text: str, rule: Rule) -> str | None:
    """Returns the letter that an answer chooses, or None if it cannot be parsed."""
    if rule == "current":
        if len(text) == 1 and text in LETTERS:
            return text
        if text[:1] and text[0] in LETTERS and text[1:3] == ". ":
            return text[0]
    found = _ANSWER.findall(text)
    return found[0] if len(found) == 1 else None


# ------------------------------------------------------------------------------------------------------------- score


@dataclass
class Tally:
    """How many questions, and how many right answers."""

    count: int = 0
    correct: int = 0

    def add(self, correct: bool) -> None:
        self.count += 1
        self.correct += correct

    @property
    def accuracy(self) -> float | None:
        """In per cent; None without questions."""
        return self.correct / self.count * 100 if self.count else None


@dataclass
class Score:
    """The score of a file of predictions."""

    all: Tally = field(default_factory=Tally)
    image: Tally = field(default_factory=Tally)  # questions whose stored prompt contains <image>
    by: dict[str, dict[str, Tally]] = field(
        default_factory=lambda: {group: {name: Tally() for name in names} for group, names in _GROUPS.items()}
    )
    unparsed: int = 0  # answers in which no single letter is found
    missing: int = 0  # questions without an answer
    drawn: list[float] = field(default_factory=list)  # probability that each answer drawn at random is right
    drawn_correct: int = 0

    @property
    def expected_accuracy(self) -> float | None:
        """The mean over all random draws of the accuracy, in per cent."""
        right = self.all.correct - self.drawn_correct + sum(self.drawn)
        return right / self.all.count * 100 if self.all.count else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the score as JSON-compatible values. Accuracies are in per cent, or None without questions."""
        return {
            "count": self.all.count,
            "correct": self.all.correct,
            "accuracy": self.all.accuracy,
            "image_count": self.image.count,
            "image_accuracy": self.image.accuracy,
            "unparsed": self.unparsed,
            "missing": self.missing,
            "by": {group: {name: one.accuracy for name, one in tallies.items()} for group, tallies in self.by.items()},
        }


def score(predictions: Mapping[str, Prediction], run: Run) -> Score:
    """Scores predictions. Raises DataError if nothing can be scored.

    current: a letter that is none of the choices, an answer that cannot be parsed and a missing answer are wrong.
    before-2023-10: instead of the first two, a choice is drawn at random; questions without an answer are left out.
    """
    result = Score(missing=sum(id not in predictions for id in run.problems))
    rng = random.Random(run.seed)
    answered = [id for id in predictions if id in run.problems]  # in the order of the file, in which answers are drawn
    if run.rule != "current" and not answered:
        raise DataError(
            f"none of the {counted(len(predictions), 'answer')} is about a question of the split {run.split}; "
            "expected answers to this split"
        )
    for id in answered:
        correct = _is_correct(predictions[id].text, run.problems[id], run.rule, rng, result)
        _add(result, run.problems[id], correct, image=IMAGE_PLACEHOLDER in predictions[id].prompt)
    for id in run.problems if run.rule == "current" else ():
        if id not in predictions:
            _add(result, run.problems[id], False, image=False)
    if others := len(predictions) - len(answered):
        log.warning("%s not about questions of the split %s, and left out", _are(others, "answer"), run.split)
    _warn_of_groups(result)
    return result


def _are(n: int, noun: str) -> str:
    return f"{counted(n, noun)} {'is' if n == 1 else 'are'}"


def _is_correct(text: str, problem: Problem, rule: Rule, rng: random.Random, result: Score) -> bool:
    found = letter(text, rule)
    result.unparsed += found is None
    n = len(problem.choices)
    if found is not None and found in LETTERS[:n]:
        return LETTERS.index(found) == problem.answer
    if rule == "current":
        return False
    correct = rng.choice(range(n)) == problem.answer
    result.drawn.append(1 / n)
    result.drawn_correct += correct
    return correct


def _add(result: Score, problem: Problem, correct: bool, *, image: bool) -> None:
    result.all.add(correct)
    if image:
        result.image.add(correct)
    for group, name in groups_of(problem):
        result.by[group][name].add(correct)


def groups_of(problem: Problem) -> Iterator[tuple[str, str]]:
    """Yields the groups of a problem. One with a hint and a picture is in TXT and in IMG, as in the paper."""
    hint, image = problem.values.get("hint"), problem.values.get("image")
    contexts = [name for name, given in (("TXT", hint), ("IMG", image)) if given]
    yield from (("context", name) for name in contexts or ["NO"])
    for group, names in (("subject", _SUBJECTS), ("grade", _GRADES)):
        value = problem.values.get(group)
        if isinstance(value, str) and value in names:
            yield group, names[value]


def _warn_of_groups(result: Score) -> None:
    for group in ("subject", "grade"):
        if n := result.all.count - sum(tally.count for tally in result.by[group].values()):
            log.warning("%s without a known %s, and only in the other figures", _are(n, "problem"), group)


# ------------------------------------------------------------------------------------------------------------ tables


def table(result: Score) -> "Table":
    """Returns the score as a table."""
    from rich.table import Table

    made = Table("questions", box=None, padding=(0, 2, 0, 0))
    for column in ("count", "correct", "accuracy"):
        made.add_column(column, justify="right", no_wrap=True)
    rows = [("all", result.all), ("<image> in the prompt", result.image)]
    for name, tally in [*rows, *_named(result.by)]:
        value = "–" if tally.accuracy is None else f"{tally.accuracy:.2f} %"
        made.add_row(name, f"{tally.count:,}", f"{tally.correct:,}", value)
    return made


def _named(by: Mapping[str, Mapping[str, Tally]]) -> Iterable[tuple[str, Tally]]:
    return [(f"{group} {name}", tally) for group, tallies in by.items() for name, tally in tallies.items()]


def notes(result: Score, rule: Rule) -> list[str]:
    """Returns what is to be known beside the table, one line each."""
    treated = "wrong" if rule == "current" else "left out"
    lines = [f"missing answers: {result.missing:,}" + f" ({treated})" * bool(result.missing)]
    lines.append(f"unparsed answers: {result.unparsed:,}" + " (wrong)" * (rule == "current" and result.unparsed > 0))
    if rule != "current":
        lines.append(
            f"drawn at random: {len(result.drawn):,}, of which {result.drawn_correct:,} right; "
            f"expected accuracy: {result.expected_accuracy:.2f} %"
        )
    return lines
