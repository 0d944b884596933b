"""Data files taken apart into samples: JSON arrays a block at a time, JSON lines, webdataset-style tars."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llava.data.pictures import Archives, Pictures
from llava.errors import DataError

BLOCK = 1 << 24  # characters of a JSON array that are read at once
BROKEN = object()  # the value of what is no JSON
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class Record(NamedTuple):
    """A sample's JSON."""

    text: str
    value: Any  # what it says; BROKEN if it is no JSON


def is_array(file: Path) -> bool:
    """Whether a file of JSON is one array; else it is JSON lines. Raises DataError."""
    with _reading(file) as text:
        return _Scanner(text).peek() == "["


@contextmanager
def _reading(file: Path) -> Iterator[TextIO]:
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as text:
            yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: no UTF-8 text ({error.reason}); expected JSON") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); expected a data file") from None


def records(file: Path, pictures: Pictures | None) -> Iterator[Record]:
    """The samples of a file. Raises DataError."""
    if file.suffix == ".tar":
        assert isinstance(pictures, Archives)
        return _of_tar(file, pictures)
    return _of_array(file) if is_array(file) else _of_lines(file)


class _Scanner:
    """Walks through a JSON text a block at a time."""

    def __init__(self, file: TextIO):
        self.file = file
        self.block = ""
        self.at = 0  # in the block
        self.before = 0  # characters in front of the block

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            space = _SPACE.match(self.block, self.at)
            assert space
            self.at = space.end()
            if self.at < len(self.block) or not self._more():
                return self.block[self.at : self.at + 1]

    def take(self, marks: str) -> str:
        """The next character, which must be one of these. Raises ValueError."""
        char = self.peek()
        if not char or char not in marks:
            raise ValueError(f"found {char!r} instead of {' or '.join(marks)}" if char else "the file ends here")
        self.at += 1
        return char

    def value(self) -> Record:
        """The next value. Raises ValueError, RecursionError."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.block, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.block) - 16
                if cut and self._more():
                    continue
                raise
            text, self.at = self.block[self.at : end], end
            return Record(text, value)

    def _more(self) -> bool:
        rest = self.block[self.at :]
        new = self.file.read(max(BLOCK, len(rest)))  # at least doubles: a long value is not tried again too often
        self.before, self.block, self.at = self.before + self.at, rest + new, 0
        return bool(new)


def _of_array(file: Path) -> Iterator[Record]:
    with _reading(file) as text:
        scanner, n = _Scanner(text), 0
        try:
            mark = scanner.take("[")
            if scanner.peek() == "]":
                mark = scanner.take("]")
            while mark != "]":
                yield scanner.value()
                n += 1
                mark = scanner.take(",]")
            if scanner.peek():
                raise ValueError("more text behind the array's end")
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            found = f"broken or cut off after {n} samples, at character {scanner.before + scanner.at}: {error}"
            raise DataError(f"{file}: {found}; expected a JSON array of samples, mend it or fetch it again") from None


def _of_lines(file: Path) -> Iterator[Record]:
    first = True
    with _reading(file) as lines:
        for line in lines:
            if not (text := line.strip()):
                continue
            try:
                yield Record(text, json.loads(text))
            except (ValueError, RecursionError) as error:
                if first:
                    raise DataError(
                        f"{file}: neither a JSON array nor JSON lines ({error}); expected samples"
                    ) from None
                yield Record(text, BROKEN)
            first = False


def _of_tar(file: Path, archives: Archives) -> Iterator[Record]:
    """KEY.json is a sample; pictures KEY.jpg and the like beside it are its pictures, in the tar's order."""
    names = archives.names(file)
    beside: dict[str, list[str]] = {}
    for name in names:
        if name.lower().endswith(_PICTURE_SUFFIXES):
            beside.setdefault(_key(name), []).append(name)
    for name in names:
        if not name.endswith(".json"):
            continue
        try:
            value = json.loads(archives.read(name))
        except (ValueError, RecursionError):
            yield Record(json.dumps(f"{name} is no JSON"), BROKEN)
            continue
        if isinstance(value, dict):
            pictures = beside.get(_key(name), [])
            own: dict[str, Any] = {"id": _key(name)} | value
            value = own | ({"image": pictures if len(pictures) > 1 else pictures[0]} if pictures else {})
        yield Record(json.dumps(value, ensure_ascii=False), value)


def _key(name: str) -> str:
    """What members of one sample share: the path up to the file name's first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
