"""Where a data set's pictures lie: a folder, a zip archive or tar archives, read by name from any process.

Names and places of an archive are read once, into one bytes buffer and one array that forked workers share. A picture
then costs one open, seek and read: no handle is kept, so a fork, a thread or a pickle needs no care.
"""

import hashlib
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np

from llava.errors import DataError

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
PLAIN = -1  # a tar's member: its bytes stand at the offset, without a header of a zip's kind
_ROW = np.dtype(
    [
        ("hash", "<u8"),
        ("name", "<i8"),  # where its name begins in the names' buffer
        ("name_size", "<i4"),
        ("archive", "<i4"),
        ("offset", "<i8"),
        ("size", "<i8"),  # in the archive
        ("method", "<i2"),
    ]
)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: signature, sizes of its name and of the extra field
_COCO = re.compile(r"(?:.*/)?(\d{12}\.jpg)")


class Pictures(Protocol):
    """A store of pictures."""

    def read(self, name: str) -> bytes:
        """The file of that name. Raises DataError: no such name, unreadable, or a name that leads outside."""
        ...


def open_pictures(path: Path) -> Pictures:
    """A folder of pictures, a .zip, a .tar, or a folder of .tar files without subfolders. Raises DataError."""
    if not path.exists():
        raise DataError(f"{path}: no such folder or archive of pictures")
    if not path.is_dir():
        return Archives([path])
    shards = tars_in(path)
    return Archives(shards) if shards and not any(entry.is_dir() for entry in path.iterdir()) else Folder(path)


def tars_in(folder: Path) -> list[Path]:
    """The .tar files that lie directly in a folder, by name."""
    return sorted(path for path in folder.glob("*.tar") if path.is_file())


class Folder:
    """Pictures below a folder, by their path from there."""

    def __init__(self, root: Path):
        self.root = root

    def read(self, name: str) -> bytes:
        path = self.root / _inside(name)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            first = [entry.name + "/" * entry.is_dir() for entry in islice(os.scandir(self.root), 3)]
            hint = _hint(name, first, f"{self.root} holds")
            raise DataError(f"{name}: no such picture below {self.root}; {hint}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); expected a picture") from None


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    method: int


class Archives:
    """Pictures in one zip archive, or in one or more tar archives, by their members' names."""

    def __init__(self, files: Sequence[Path]):
        """Reads all names. Raises DataError: no archive, or two archives with a member of the same name."""
        self.files = list(files)
        names = bytearray()

        def rows() -> Iterator[tuple[int, ...]]:
            for archive, file in enumerate(self.files):
                for name, offset, size, method in _members(file):
                    encoded = name.encode(errors="surrogateescape")
                    yield _hash(encoded), len(names), len(encoded), archive, offset, size, method
                    names.extend(encoded + b"\0")

        table = np.fromiter(rows(), _ROW)
        self._names = bytes(names)
        self._table = table[np.argsort(table["hash"], kind="stable")]  # of equal names the last stays last
        self._hashes = np.ascontiguousarray(self._table["hash"])
        self._refuse_doubles()

    def names(self, file: Path) -> list[str]:
        """The members of one of the archives, in its order."""
        rows = np.sort(self._table[self._table["archive"] == self.files.index(file)], order="name")
        return [self._name(row).decode(errors="surrogateescape") for row in rows]

    def read(self, name: str) -> bytes:
        row = self._find(_inside(name))
        if row is None:
            where = f"{self.files[0]}" + (f" and {len(self.files) - 1} more archives" if len(self.files) > 1 else "")
            first = [part.decode(errors="replace") for part in self._names[:1000].split(b"\0")[:3] if part]
            raise DataError(f"{name}: no such picture in {where}; {_hint(name, first, 'its names begin with')}")
        file = self.files[row["archive"]]
        try:
            return self._unpack(file, int(row["offset"]), int(row["size"]), int(row["method"]))
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise DataError(f"{name}: cannot be read from {file} ({error}); the archive is damaged") from None

    def _unpack(self, path: Path, offset: int, size: int, method: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            if method != PLAIN:
                signature, n_name, n_extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                if signature != b"PK\x03\x04":
                    raise ValueError("no member begins where the directory says")
                file.seek(n_name + n_extra, os.SEEK_CUR)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes where {size} are expected")
        if method in (PLAIN, STORED):
            return data
        if method != DEFLATED:
            raise ValueError(f"packing method {method}, expected stored or deflated")
        return zlib.decompress(data, wbits=-zlib.MAX_WBITS)

    def _find(self, name: str) -> Any:
        """Its row of the table; of equal names the last, as tar has it."""
        encoded = name.encode(errors="surrogateescape")
        key = np.uint64(_hash(encoded))
        low, high = np.searchsorted(self._hashes, key, "left"), np.searchsorted(self._hashes, key, "right")
        return next((row for row in self._table[low:high][::-1] if self._name(row) == encoded), None)

    def _name(self, row: Any) -> bytes:
        return self._names[row["name"] : row["name"] + row["name_size"]]

    def _refuse_doubles(self) -> None:
        for at in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            one, two = self._table[at], self._table[at + 1]
            if self._name(one) == self._name(two) and one["archive"] != two["archive"]:
                files = f"{self.files[one['archive']]} and in {self.files[two['archive']]}"
                name = self._name(one).decode(errors="replace")
                raise DataError(f"{name} lies in {files}: names must be unique over all archives")


def _members(file: Path) -> Iterator[_Member]:
    """The files in an archive, in its order. Raises DataError."""
    try:
        yield from _of_zip(file) if zipfile.is_zipfile(file) else _of_tar(file)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        expected = "expected a zip or an uncompressed tar; unpack it or fetch it again"
        raise DataError(f"{file}: no archive that can be read ({error}); {expected}") from None


def _of_zip(file: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.flag_bits & 1:
                raise DataError(f"{file}: {info.filename} is encrypted; unpack the archive into a folder")
            if not info.is_dir():
                yield _Member(_plain(info.filename), info.header_offset, info.compress_size, info.compress_type)


def _of_tar(file: Path) -> Iterator[_Member]:
    with tarfile.open(file, "r:") as archive:
        while (info := archive.next()) is not None:
            vars(archive)["members"].clear()  # else it keeps an object for each
            if info.isreg() and not info.issparse():
                yield _Member(_plain(info.name), info.offset_data, info.size, PLAIN)


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _inside(name: str) -> str:
    """The name below its root. Raises DataError if it leads elsewhere."""
    plain = _plain(name)
    path = PurePosixPath(plain)
    if not plain or path.is_absolute() or ".." in path.parts or "\\" in plain or "\0" in plain:
        raise DataError(
            f"{name!r:.200}: no name of a picture; expected a path below the pictures' root, with / and no .."
        )
    return plain


def _hint(name: str, first: list[str], intro: str) -> str:
    """What to do about a name that is not there."""
    hint = f"{intro} {', '.join(first)}; point to where {name.split('/')[0]} lies" if first else "it is empty"
    if match := _COCO.fullmatch(name):
        hint += f" (COCO's train2014 calls it COCO_train2014_{match[1]})"
    return hint
