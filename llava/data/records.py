"""Reads samples from JSON arrays (block by block), JSON lines and webdataset-style tars."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llava.data.pictures import Archives, Pictures
from llava.errors import DataError

BLOCK = 1 << 24  # number of characters to read from a JSON array at a time
BROKEN = object()  # sentinel: value of a record that is not valid JSON
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_OTHER_MEDIA_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".mp3", ".wav", ".flac", ".ogg", ".m4a", ".opus")
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class Record(NamedTuple):
    """One sample as JSON."""

    text: str  # exactly as in the file; for tars, re-encoded with `id` and `image` filled in
    value: Any  # parsed; BROKEN if the text is not valid JSON


def is_array(file: Path) -> bool:
    """Whether a data file is a JSON array rather than JSON lines. Raises DataError."""
    with _open_text(file) as text:
        return _ArrayScanner(text).peek() == "["


@contextmanager
def _open_text(file: Path) -> Iterator[TextIO]:
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as text:
            yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason}); expected JSON") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); expected a data file") from None


def records(file: Path, pictures: Pictures | None) -> Iterator[Record]:
    """Iterates over a file's samples. For a .tar, `pictures` must be an `Archives` including it. Raises DataError."""
    if file.suffix == ".tar":
        assert isinstance(pictures, Archives)
        return _read_tar(file, pictures)
    return _read_array(file) if is_array(file) else _read_lines(file)


class _ArrayScanner:
    """Reads the elements of a JSON array block by block, so that a large file needs little memory.

    Unlike an event parser such as ijson, it returns each element's exact text, as `Samples` requires, and it accepts
    NaN, since Python's json module writes NaN.
    """

    def __init__(self, file: TextIO):
        self.file = file
        self.block = ""
        self.offset = 0  # index of the next character in the block
        self.block_start = 0  # offset of the block in the file, in characters

    @property
    def position(self) -> int:
        """Number of characters of the file consumed so far."""
        return self.block_start + self.offset

    def peek(self) -> str:
        """Skips white space and returns the next character, or "" at the end of the file."""
        while True:
            space = _SPACE.match(self.block, self.offset)
            assert space
            self.offset = space.end()
            if self.offset < len(self.block) or not self._read_more():
                return self.block[self.offset : self.offset + 1]

    def take(self, expected: str) -> str:
        """Consumes the next character. Raises ValueError if it is not one of `expected`."""
        char = self.peek()
        if not char or char not in expected:
            wanted = " or ".join(map(repr, expected))
            raise ValueError(f"found {char!r}, expected {wanted}" if char else "unexpected end of file")
        self.offset += 1
        return char

    def value(self) -> Record:
        """Consumes the next JSON value. Raises ValueError if it is invalid, RecursionError if nested too deeply."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.block, self.offset)
            except json.JSONDecodeError as error:
                truncated = error.msg.startswith("Unterminated string") or error.pos > len(self.block) - 16
                if truncated and self._read_more():
                    continue
                raise
            text, self.offset = self.block[self.offset : end], end
            return Record(text, value)

    def _read_more(self) -> bool:
        rest = self.block[self.offset :]
        new = self.file.read(max(BLOCK, len(rest)))  # at least double the block, to limit retries for long values
        self.block_start, self.block, self.offset = self.position, rest + new, 0
        return bool(new)


def _read_array(file: Path) -> Iterator[Record]:
    with _open_text(file) as text:
        scanner, n = _ArrayScanner(text), 0
        try:
            mark = scanner.take("[")
            if scanner.peek() == "]":
                mark = scanner.take("]")
            while mark != "]":
                yield scanner.value()
                n += 1
                mark = scanner.take(",]")
            if scanner.peek():
                raise ValueError("unexpected text after the end of the array")
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            found = f"broken or truncated after {n} sample{'s' * (n != 1)}, at character {scanner.position}: {error}"
            raise DataError(
                f"{file}: {found}; expected a JSON array of samples; repair the file or download it again"
            ) from None


def _read_lines(file: Path) -> Iterator[Record]:
    first = True
    with _open_text(file) as lines:
        for line in lines:
            if not (text := line.strip()):
                continue
            try:
                yield Record(text, json.loads(text))
            except (ValueError, RecursionError) as error:
                if first:
                    raise DataError(
                        f"{file}: neither a JSON array nor JSON lines ({error}); expected one of these formats"
                    ) from None
                yield Record(text, BROKEN)
            first = False


def _read_tar(file: Path, archives: Archives) -> Iterator[Record]:
    """Yields samples in tar order: one for each KEY.json, with the pictures that share its key, such as KEY.jpg."""
    names = archives.names(file)
    pictures: dict[str, list[str]] = {}
    other_media: dict[str, list[str]] = {}  # listed under "media", which `parse` refuses
    for name in names:
        if name.lower().endswith(PICTURE_SUFFIXES):
            pictures.setdefault(_key(name), []).append(name)
        elif name.lower().endswith(_OTHER_MEDIA_SUFFIXES):
            other_media.setdefault(_key(name), []).append(name)
    for name in names:
        if not name.endswith(".json"):
            continue
        try:
            value = json.loads(archives.read(name))
        except (ValueError, RecursionError):
            yield Record(json.dumps(f"{name} is not valid JSON"), BROKEN)
            continue
        if isinstance(value, dict):
            own = pictures.get(_key(name), [])
            with_id: dict[str, Any] = {"id": _key(name)} | value
            if own:
                with_id.pop("images", None)
                with_id["image"] = own if len(own) > 1 else own[0]
            value = with_id | ({"media": other_media[_key(name)]} if _key(name) in other_media else {})
        yield Record(json.dumps(value, ensure_ascii=False), value)


def _key(name: str) -> str:
    """Returns the part of a name that all files of a sample share: the path up to the first dot in the file name."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
