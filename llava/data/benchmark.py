"""Reads the questions and pictures of a benchmark, in whatever files it was published, to compare them with others.

A question is the text of a JSON object under `question`, or else `text`, or what the human says in a training sample.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.data.layouts import parse
from llava.data.pictures import Archives, Folder, Pictures, decode_data_url, is_data_url, open_pictures, tars_in
from llava.data.questions import normalized, questions_of
from llava.data.records import PICTURE_SUFFIXES, records
from llava.errors import DataError, counted

log = logging.getLogger(__name__)

_QUESTION_FILES = (".json", ".jsonl")
_TABLES = (".tsv", ".csv", ".parquet", ".arrow")
_ANSWER_KEYS = frozenset(("answer_id", "model_id"))  # of answers, as LLaVA's scripts write them
_EXPECTED = "expected JSON or JSON lines"


@dataclass
class Benchmark:
    """The questions of a benchmark, and the names of its pictures."""

    path: Path
    questions: dict[str, str] = field(default_factory=dict)  # normalized -> as first written
    files: Counter[str] = field(default_factory=Counter)  # file -> number of its questions
    n_answers: int = 0  # objects that are the answer of a model, which are left out
    n_unread: int = 0  # training samples that cannot be read
    pictures: list[str] = field(default_factory=list)  # names of those to compare
    n_left_out: int = 0  # pictures in the folder that no question names, although the questions name others
    n_nowhere: int = 0  # pictures that are named, but whose location is not known
    store: Pictures | None = None

    def picture(self, name: str) -> bytes:
        """Returns the bytes of an image file. Raises DataError or ImageError."""
        if is_data_url(name):
            return decode_data_url(name)
        assert self.store
        return self.store.read(name)


def read_benchmark(path: Path, images: Path | None) -> Benchmark:
    """Reads a benchmark: a file of questions, or a folder with such files and pictures. Raises DataError.

    images: location of the pictures; None if that is `path`.
    """
    found = Benchmark(path)
    location = images or (path if _holds_pictures(path) else None)
    found.store = open_pictures(location) if location else None
    named = dict[str, None]()
    for file in _question_files(path):
        for value in _values(file):
            for row in _rows(value):
                _add(found, file, row, named)
    _choose_pictures(found, list(named))
    if not found.questions and not found.pictures:
        raise DataError(
            f"{path}: found neither pictures nor questions; expected image files, or JSON objects with question or text"
        )
    return found


def _holds_pictures(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in (".tar", ".zip")


def _question_files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: does not exist; expected a folder or a file with the questions of a benchmark")
    if not path.is_dir():
        return [] if path.suffix.lower() == ".zip" else [path]
    names = list(_files(path))
    if tables := [name for name in names if name.lower().endswith(_TABLES)]:
        n = counted(len(tables), "file")
        log.warning("%s: %s such as %s not searched for questions; only .json and .jsonl are", path, n, tables[0])
    return tars_in(path) + [path / name for name in names if name.lower().endswith(_QUESTION_FILES)]


def _files(root: Path) -> Iterator[str]:
    """Yields the relative path of each file in a folder, except hidden ones, in order. Follows links."""
    seen = set[str]()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from ((Path(folder) / name).relative_to(root).as_posix() for name in sorted(names) if name[0] != ".")


def _values(file: Path) -> Iterator[Any]:
    """Yields the JSON values of a file: one, or one in each line, or the samples of a tar. Raises DataError."""
    if file.suffix == ".tar":
        yield from (record.value for record in records(file, Archives([file])))
        return
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {_EXPECTED}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason}); {_EXPECTED}") from None
    try:
        yield json.loads(text)
    except ValueError:
        yield from (_parsed(line, f"{file}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip())
    except RecursionError:
        raise DataError(f"{file}: nested too deeply; {_EXPECTED}") from None


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); {_EXPECTED}") from None


def _rows(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the objects that have a question, at whatever depth they are."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict) and _is_row(one):
            yield one
        elif isinstance(one, dict | list):
            inner = one.values() if isinstance(one, dict) else one
            waiting += reversed([part for part in inner if isinstance(part, dict | list)])


def _is_row(value: Mapping[str, Any]) -> bool:
    return _is_sample(value) or any(isinstance(value.get(key), str) for key in ("question", "text"))


def _is_sample(value: Mapping[str, Any]) -> bool:
    return any(isinstance(value.get(key), list) for key in ("conversations", "messages"))


def _add(found: Benchmark, file: Path, row: Mapping[str, Any], named: dict[str, None]) -> None:
    texts: list[str] = []
    if _is_sample(row):
        try:
            sample = parse(row, str(file), "")
        except DataError:
            found.n_unread += 1
            return
        texts = list(questions_of(sample))
        named.update(dict.fromkeys(sample.images))
    elif _ANSWER_KEYS & row.keys():
        found.n_answers += 1
    else:
        texts = [row["question"] if isinstance(row.get("question"), str) else row["text"]]
        named.update(dict.fromkeys([row["image"]] if isinstance(row.get("image"), str) else []))
    for text in texts:
        if key := normalized(text):
            found.questions.setdefault(key, text)
            found.files[str(file)] += 1


def _choose_pictures(found: Benchmark, named: list[str]) -> None:
    """Chooses the pictures that the questions name or, if some of these are not in the folder, all that are in it.

    Many benchmarks name their pictures by an id, but others use a few pictures of a large folder.
    """
    store = found.store
    if isinstance(store, Archives):
        names = [name for file in store.files for name in store.names(file)]
    else:
        names = list(_files(store.root)) if isinstance(store, Folder) else []
    there = dict.fromkeys(name for name in names if name.lower().endswith(PICTURE_SUFFIXES))
    inside = [name for name in named if is_data_url(name)]
    paths = [name for name in named if not is_data_url(name)]
    is_exact = bool(paths) and all(name.removeprefix("./") in there for name in paths)
    found.pictures = [*inside, *(paths if is_exact else there)]
    found.n_left_out = len(there) - len(paths) if is_exact else 0
    found.n_nowhere = 0 if store else len(paths)
