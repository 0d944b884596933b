"""ScienceQA as published: `problems.json`, `pid_splits.json`, and its problems as training samples.

https://github.com/lupantech/ScienceQA. The samples equal those of LLaVA's scripts/convert_sqa_to_llava.py.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.config import IMAGE_PLACEHOLDER
from llava.data.layouts import UnsupportedError, parse
from llava.errors import ConfigError, DataError, counted

LETTERS = "ABCDE"  # of the choices
_INPUTS = {
    "QCM": "Question: {question}\nContext: {context}\nOptions: {options}\n",
    "CQM": "Context: {context}\nQuestion: {question}\nOptions: {options}\n",
}
_OUTPUTS = {
    "LEA": "Answer: {lecture} {solution} The answer is {letter}.",
    "LEPA": "{lecture_line}{solution_line}###\nANSWER: {letter}.",
    "A": "Answer: The answer is {letter}.",
}
FORMATS = tuple(f"{question}-{answer}" for question in _INPUTS for answer in _OUTPUTS)
_PUBLISHED_NAME = re.compile(r"llava_(\w+?)_([A-Z]+-[A-Z]+)")


class MissingProblemError(DataError):
    """An id of a split has no problem."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with its choices."""

    id: str
    where: str  # the file and the id, for error messages
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    values: Mapping[str, Any]  # as in the file

    def text(self, key: str) -> str:
        """Returns a text, such as the hint. Raises DataError if it is missing."""
        value = self.values.get(key)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: {key} is {value!r:.60}; expected a text")
        return value

    @property
    def image(self) -> str | None:
        """File name of the picture, or None. Raises DataError."""
        name = self.values.get("image")
        if name is not None and (not isinstance(name, str) or name in ("", ".", "..") or "/" in name):
            raise DataError(f"{self.where}: image is {name!r:.60}; expected a file name or null")
        return name


class Problems:
    """The problems of a `problems.json`. Raises DataError if it is not one."""

    def __init__(self, file: Path):
        self.file = file
        self._values = _read_object(file, "an object with the problem of each id, as in ScienceQA's problems.json")

    def __contains__(self, id: str) -> bool:
        return id in self._values

    def __getitem__(self, id: str) -> Problem:
        where = f"{self.file}, problem {id!r:.40}"
        if id not in self:
            raise MissingProblemError(f"{where}: not in this file; expected a problem for each id of the split")
        value = self._values[id]
        choices = value.get("choices") if isinstance(value, dict) else None
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
            raise DataError(f"{where}: choices is {choices!r:.60}; expected a list of texts")
        answer, last = value.get("answer"), min(len(choices), len(LETTERS)) - 1
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer <= last:
            raise DataError(f"{where}: answer is {answer!r:.60}; expected the index of a choice, from 0 to {last}")
        return Problem(id=id, where=where, choices=tuple(choices), answer=answer, values=value)


def read_split(file: Path, split: str) -> list[str]:
    """Returns the ids of a split, each once, from a `pid_splits.json`. Raises DataError or ConfigError."""
    splits = _read_object(file, "an object with the ids of each split, as in ScienceQA's pid_splits.json")
    if not splits:
        raise DataError(f"{file}: has no splits; expected the ids of each")
    if split not in splits:
        raise ConfigError(f"{file}: has no split {split!r}; choose one of {', '.join(splits)} with --split")
    ids = splits[split]
    if not isinstance(ids, list) or not ids or not all(isinstance(id, str) for id in ids):
        raise DataError(f"{file}: the split {split!r} is {ids!r:.60}; expected a list of ids as texts")
    return list(dict.fromkeys(ids))


def _read_object(file: Path, expected: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); expected {expected}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); expected {expected}") from None
    if not isinstance(value, dict):
        raise DataError(f"{file}: found {value!r:.60}; expected {expected}")
    return value


def check_present(ids: list[str], problems: Problems) -> None:
    """Raises DataError, which counts the ids that `problems` lacks."""
    missing = [id for id in ids if id not in problems]
    if len(missing) == len(ids):
        raise DataError(
            f"{problems.file}: has none of the {counted(len(ids), 'problem')} of the split; expected the problems.json "
            "of the same release"
        )
    if missing:
        named = ", ".join(f"{id:.40}" for id in missing[:3]) + ", …" * (len(missing) > 3)
        raise DataError(
            f"{problems.file}: lacks {len(missing):,} of the {counted(len(ids), 'problem')} of the split ({named}); "
            "add --skip-missing-problems to leave them out"
        )


# ---------------------------------------------------------------------------------------------------- training samples


@dataclass(frozen=True)
class Wanted:
    """Which samples to make."""

    split: str
    format: str  # one of FORMATS

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"--format is {self.format!r}; choose one of {', '.join(FORMATS)}")


def wanted(out: Path, split: str | None, format: str | None) -> Wanted:
    """Returns what is given, completed from a name as LLaVA's script writes it, such as llava_train_QCM-LEA.json."""
    named = _PUBLISHED_NAME.fullmatch(out.stem)
    split, format = split or (named and named[1]), format or (named and named[2])
    if not split or not format:
        raise ConfigError(
            f"{out}: the name says neither split nor format, as in llava_train_QCM-LEA.json; add --split and --format"
        )
    return Wanted(split, format)


def sample(problem: Problem, format: str) -> dict[str, Any]:
    """Returns a problem as a training sample in LLaVA's JSON. Raises DataError."""
    given, answer = (
        _tidy(table[part].format(**_parts(problem)))
        for table, part in zip((_INPUTS, _OUTPUTS), format.split("-"), strict=True)
    )
    given, answer = _without(given, "Question: "), _without(answer, "Answer: ")
    if IMAGE_PLACEHOLDER in given + answer:
        raise UnsupportedError(f"{problem.where}: contains the mark {IMAGE_PLACEHOLDER}; expected plain text")
    made: dict[str, Any] = {"id": problem.id}
    if problem.image is not None:
        made["image"] = f"{problem.id}/{problem.image}"
        given += f"\n{IMAGE_PLACEHOLDER}"
    made["conversations"] = [{"from": "human", "value": given}, {"from": "gpt", "value": answer}]
    parse(made, problem.where, problem.id)  # what training would refuse
    return made


def _parts(problem: Problem) -> dict[str, str]:
    if len(problem.choices) > len(LETTERS):
        raise DataError(f"{problem.where}: has {len(problem.choices)} choices; expected at most {len(LETTERS)}")
    # the original escapes line breaks as \\n and takes that back, which also turns a literal \\n into a line break
    lecture, solution = (problem.text(key).replace("\\n", "\n") for key in ("lecture", "solution"))
    return {
        "question": problem.text("question"),
        "context": problem.text("hint").strip() or "N/A",
        "options": " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False)),
        "letter": LETTERS[problem.answer],
        "lecture": lecture,
        "solution": solution,
        "lecture_line": f"LECTURE: {lecture}\n" if lecture.strip() else "",
        "solution_line": f"SOLUTION: {solution}\n" if solution.strip() else "",
    }


def _tidy(text: str) -> str:
    return text.replace("  ", " ").strip()  # one pass, as in the original: three spaces become two


def _without(text: str, name: str) -> str:
    """Removes a name from a text that starts with it, also where it occurs again, as the original does."""
    return text.replace(name, "") if text.startswith(name) else text
