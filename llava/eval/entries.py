"""Reads files of answers and verdicts: JSON lines, or one JSON value. Errors name the file and the line."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llava.errors import DataError

_Key = TypeVar("_Key")


class Entry(NamedTuple):
    """One JSON object of a file."""

    where: str  # the file and the line, for error messages
    value: dict[str, Any]

    def text(self, key: str) -> str:
        """Returns a text. Raises DataError."""
        value = self.value.get(key)
        if not isinstance(value, str) or not is_unicode(value):
            raise DataError(f"{self.where}: {key} is {value!r:.60}; expected a text")
        return value

    def id(self, key: str) -> str:
        """Returns an id, which may be a number in the file. Raises DataError."""
        value = self.value.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int) or not is_unicode(str(value)):
            raise DataError(f"{self.where}: {key} is {value!r:.60}; expected the id of a question")
        return str(value)

    def texts(self, key: str) -> list[str]:
        """Returns a list of at least one text. Raises DataError."""
        value = self.value.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise DataError(f"{self.where}: {key} is {value!r:.60}; expected a list of texts")
        return value

    def part(self, key: str) -> "Entry":
        """Returns an object in this one. Raises DataError."""
        value = self.value.get(key)
        if not isinstance(value, dict):
            raise DataError(f"{self.where}: {key} is {value!r:.60}; expected an object")
        return Entry(f"{self.where}, {key}", value)

    def parts(self, key: str) -> "list[Entry]":
        """Returns the objects of a list in this one. Raises DataError."""
        value = self.value.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
            raise DataError(f"{self.where}: {key} is {value!r:.60}; expected a list of objects")
        return [Entry(f"{self.where}, {key}, entry {i}", one) for i, one in enumerate(value, start=1)]


def is_unicode(text: str) -> bool:
    """Whether a text can be written to a file; half of a pair of surrogates, which JSON may contain, cannot."""
    return text.isascii() or text == text.encode("utf-8", "ignore").decode()


def by_key(entries: Iterable[Entry], key: Callable[[Entry], _Key]) -> dict[_Key, Entry]:
    """Returns entries by their keys, which must differ. Raises DataError."""
    found: dict[_Key, Entry] = {}
    for entry in entries:
        id = key(entry)
        first = found.setdefault(id, entry)
        if first is not entry:
            raise DataError(f"{entry.where}: has the id {id!r:.60} of {first.where}; expected different ids")
    return found


def read_text(path: Path, expected: str) -> str:
    """Returns the content of a file in UTF-8, with or without a byte order mark. Raises DataError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason}); expected {expected}") from None


class JsonFile:
    """A text file in UTF-8, with or without a byte order mark, that contains JSON. Raises DataError."""

    def __init__(self, path: Path, expected: str):
        """expected: what the file should contain, for error messages."""
        self.path, self.expected = path, expected
        self.text = read_text(path, expected)

    @classmethod
    def appended(cls, path: Path, expected: str) -> "JsonFile":
        """Reads a file to which lines are appended. A last line without its end was not completed, and is left out."""
        file = cls(path, expected)
        file.text = file.text[: file.text.rfind("\n") + 1]
        return file

    def value(self) -> Any:
        """Returns the one value that the file contains."""
        return self._parsed(self.text, f"{self.path}")

    def object(self) -> Entry:
        """Returns the one object that the file contains."""
        return self.entry(self.value(), f"{self.path}")

    def is_one_value(self) -> bool:
        """Whether the file contains one JSON value, on any number of lines."""
        try:
            json.loads(self.text)
        except (ValueError, RecursionError):
            return False
        return True

    def entries(self) -> Iterator[Entry]:
        """Yields the objects of JSON lines, or of one JSON array. Lines of white space are skipped."""
        if self.text.lstrip()[:1] == "[" and self.is_one_value():
            for i, value in enumerate(self.value(), start=1):
                yield self.entry(value, f"{self.path}, entry {i}")
            return
        lines = self.text.split("\n")  # not splitlines: strings in JSON may contain other line separators
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{self.path}, line {number}"
                ends = ", where the file ends" if number == len(lines) else ""
                yield self.entry(self._parsed(line, where + ends), where)

    def entry(self, value: Any, where: str) -> Entry:
        """Returns an entry. Raises DataError if the value is not an object."""
        if not isinstance(value, dict):
            raise DataError(f"{where}: found {value!r:.60}; expected {self.expected}")
        return Entry(where, value)

    def _parsed(self, text: str, where: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:  # also integers with thousands of digits
            raise DataError(f"{where}: not valid JSON ({error}); expected {self.expected}") from None
        except RecursionError:
            raise DataError(f"{where}: nested too deeply; expected {self.expected}") from None
