"""ScienceQA as published (https://github.com/lupantech/ScienceQA): `problems.json` and `pid_splits.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import ConfigError, DataError, counted

LETTERS = "ABCDE"  # of the choices


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with its choices."""

    id: str
    where: str  # the file and the id, for error messages
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    values: Mapping[str, Any]  # as in the file


class Problems:
    """The problems of a `problems.json`. Raises DataError if it is not one."""

    def __init__(self, file: Path):
        self.file = file
        self._values = _read_object(file, "an object with the problem of each id, as in ScienceQA's problems.json")

    def __contains__(self, id: str) -> bool:
        return id in self._values

    def __getitem__(self, id: str) -> Problem:
        where = f"{self.file}, problem {id!r:.40}"
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
