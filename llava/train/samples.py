"""Training samples in LLaVA's JSON format, from JSON arrays, JSONL and webdataset-style tars.

665,000 samples as Python objects would fill several GB in every worker: what is kept is their JSON text in one buffer
with int64 places, shared by forked workers, and a sample is parsed when it is asked for.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from llava.errors import DataError
from llava.preprocess.conversation import Turn
from llava.train.pictures import Archives, Pictures, open_pictures, tars_in

BLOCK = 1 << 24  # characters of a JSON array that are read at once
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ROLES = {"human": "user", "gpt": "assistant"}
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Sample:
    """One conversation, as the file has it."""

    id: str
    turns: tuple[Turn, ...]  # in the file's order, marks kept
    images: tuple[str, ...]  # names of its pictures; () for text alone


class Record(NamedTuple):
    """A sample's JSON."""

    text: str
    value: Any  # what it says; BROKEN if it is no JSON


BROKEN = object()


class Samples(Sequence[Sample]):
    """The samples of one or more data files, in their order.

    `files`: .json (an array), .jsonl, .tar (a `KEY.json` for each sample, pictures `KEY.jpg` beside it), or folders of
    such tars. `images`: where the pictures of .json and .jsonl lie (see `open_pictures`); None: those of tars are in
    the tars, others cannot be read. Raises DataError for files that cannot be used; one bad sample raises when read.
    """

    def __init__(self, files: Sequence[Path], images: Path | None):
        self.files = [shard for file in files for shard in _shards(file)]
        if not self.files:
            raise DataError("no data file is given; expected one at least")
        tars = [file for file in self.files if file.suffix == ".tar"]
        if tars and images is not None:
            raise DataError(f"{tars[0]}: its pictures lie beside its samples; leave out the folder of pictures")
        self._pictures: Pictures | None = Archives(tars) if tars else open_pictures(images) if images else None
        self._text = bytearray()
        ends, lengths, firsts = [0], list[int](), list[int]()
        for file in self.files:
            firsts.append(len(lengths))
            for record in _records(file, self._pictures):
                self._text += record.text.encode(errors="surrogatepass")
                ends.append(len(self._text))
                lengths.append(_signed_words(record.value))
            if len(lengths) == firsts[-1]:
                raise DataError(f"{file}: holds no samples; expected a JSON array of them, or one a line")
        self._ends = np.array(ends, np.int64)
        self._lengths = np.array(lengths, np.int64)
        self._firsts = np.array(firsts, np.int64)  # index of each file's first sample

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, i: int) -> Sample:  # type: ignore[override]  # no slices: they would be lists of samples
        """Raises DataError naming file, index and id; IndexError past the end."""
        return parse(self.value(i), self.where(i), str(i))

    @property
    def lengths(self) -> list[int]:
        """Words over all turns (at least 1), negative for a sample without picture: LLaVA's `modality_lengths`."""
        return self._lengths.tolist()

    @property
    def has_pictures(self) -> bool:
        """Whether a place of pictures is known."""
        return self._pictures is not None

    def picture(self, name: str) -> bytes:
        """The file of a picture. Raises DataError."""
        if self._pictures is None:
            raise DataError(f"{name}: no place of pictures is given; name their folder, .zip or .tar")
        return self._pictures.read(name)

    def text(self, i: int) -> str:
        """A sample's JSON as the file has it."""
        i = range(len(self))[i]
        return self._text[self._ends[i] : self._ends[i + 1]].decode(errors="surrogatepass")

    def value(self, i: int) -> Any:
        """What a sample's JSON says, whatever that is. Raises DataError if it is no JSON."""
        try:
            return json.loads(self.text(i))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where(i)}: no JSON ({error}); expected one sample") from None

    def where(self, i: int) -> str:
        """File and index of a sample in it, for messages."""
        i = range(len(self))[i]
        file = int(np.searchsorted(self._firsts, i, "right")) - 1
        return f"{self.files[file]}, sample {i - int(self._firsts[file])}"


def parse(value: Any, where: str, fallback_id: str) -> Sample:
    """A sample of what its JSON says; order of roles and marks are not looked at. Raises DataError."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: found {value!r:.60}; expected an object with conversations")
    id = value.get("id", fallback_id)
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise DataError(f"{where}: the id is {id!r:.60}; expected text")
    where += f" (id {id!s:.60})"
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: conversations is {turns!r:.60}; expected a list of turns")
    return Sample(str(id), tuple(_turn(turn, where, i) for i, turn in enumerate(turns)), _names(value, where))


def _turn(turn: Any, where: str, i: int) -> Turn:
    role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        expected = '{"from": "human" or "gpt", "value": text}'
        raise DataError(f"{where}: turn {i + 1} is {turn!r:.80}; expected {expected}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: turn {i + 1} holds half of a character; expected UTF-8 text") from None
    return Turn("user" if role == "human" else "assistant", text)


def _names(value: dict[str, Any], where: str) -> tuple[str, ...]:
    image = value.get("image")
    names = image if isinstance(image, list) else [] if image is None else [image]
    if not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: image is {image!r:.60}; expected a name, a list of names, or none")
    return tuple(names)


def _signed_words(value: Any) -> int:
    """See `Samples.lengths`. A malformed sample counts as one word: it is refused when it is read."""
    if not isinstance(value, dict):
        return -1
    turns = value.get("conversations")
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    n = max(1, sum(len(text.split()) for text in texts if isinstance(text, str)))
    return n if value.get("image") else -n


def _shards(file: Path) -> list[Path]:
    if not file.is_dir():
        return [file]
    if shards := tars_in(file):
        return shards
    raise DataError(f"{file}: a folder without .tar files; expected a .json, .jsonl or .tar data file")


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


def _records(file: Path, pictures: Pictures | None) -> Iterator[Record]:
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
        if name.lower().endswith(PICTURE_SUFFIXES):
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
