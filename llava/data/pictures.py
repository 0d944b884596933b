"""Reads the pictures of a data set by name, from a folder, a zip archive or tar archives.

Archive indexes are read once into a bytes buffer and an array, which forked workers share. Each read opens the archive
and seeks to the picture. File handles are not kept open, so a store can be pickled and can be shared by threads and
forked processes.
"""

import base64
import binascii
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

from llava.errors import DataError, ImageError

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
PLAIN = -1  # `method` of tar members; their `offset` points to the data, that of zip members to the local header
_ROW = np.dtype(
    [
        ("hash", "<u8"),
        ("name", "<i8"),  # offset of the name in the name buffer
        ("name_size", "<i4"),
        ("archive", "<i4"),  # index into `Archives.files`
        ("offset", "<i8"),
        ("size", "<i8"),  # compressed size in bytes
        ("method", "<i2"),
    ]
)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # zip local header: signature, name length, extra field length
_COCO = re.compile(r"(?:.*/)?(\d{12}\.jpg)")
_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w=.-]+)*;base64,", re.IGNORECASE)


class Pictures(Protocol):
    """A store of pictures, looked up by name."""

    def read(self, name: str) -> bytes:
        """Reads a picture's bytes. Raises DataError if the name is invalid or the picture is missing or unreadable."""
        ...


def open_pictures(path: Path) -> Pictures:
    """Opens a folder of pictures, a .zip, a .tar, or a folder with .tar files but no subfolders. Raises DataError."""
    if not path.exists():
        raise DataError(f"{path}: does not exist; expected a folder of pictures, a .zip or a .tar")
    if not path.is_dir():
        return Archives([path])
    shards = tars_in(path)
    return Archives(shards) if shards and not any(entry.is_dir() for entry in path.iterdir()) else Folder(path)


def tars_in(folder: Path) -> list[Path]:
    """Returns the .tar files at the top level of a folder, sorted by name."""
    return sorted(path for path in folder.glob("*.tar") if path.is_file())


def is_data_url(name: str) -> bool:
    """Whether a picture's name is a `data:` URL, which contains the picture itself."""
    return name.startswith("data:")


def decode_data_url(url: str) -> bytes:
    """Returns the bytes of a picture in a `data:` URL. Raises ImageError."""
    try:
        if match := _DATA_URL.match(url):
            return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        pass
    raise ImageError(f"picture: found {url[:40]}…; expected data:image/png;base64, (or another type) and base64 text")


class Folder:
    """Pictures in a folder, looked up by relative path, or by an absolute path that leads into the folder."""

    def __init__(self, root: Path):
        self.root = root
        given = {root.absolute(), Path(os.path.abspath(root)), root.resolve()}  # with and without "..", and real
        self._prefixes = [path.as_posix().rstrip("/") + "/" for path in given if _same(path, root)]

    def read(self, name: str) -> bytes:
        prefix = next((prefix for prefix in self._prefixes if name.startswith(prefix)), "")
        path = self.root / _safe_name(name.removeprefix(prefix))
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            first = [entry.name + "/" * entry.is_dir() for entry in islice(os.scandir(self.root), 3)]
            hint = _hint(name, first, "the folder contains entries such as")
            raise DataError(f"{name}: no such picture in {self.root}; {hint}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); expected an image file") from None


def _same(one: Path, two: Path) -> bool:
    return one.exists() and one.samefile(two)


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    method: int


class Archives:
    """Pictures in a zip archive, or in one or more tar archives, looked up by member name."""

    def __init__(self, files: Sequence[Path]):
        """Indexes all archives. Raises DataError if an archive is unreadable or two archives contain the same name."""
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
        self._table = table[np.argsort(table["hash"], kind="stable")]  # stable: keeps duplicate names in archive order
        self._hashes = np.ascontiguousarray(self._table["hash"])
        self._refuse_duplicates()

    def names(self, file: Path) -> list[str]:
        """Returns the member names of one archive, in archive order."""
        rows = np.sort(self._table[self._table["archive"] == self.files.index(file)], order="name")
        return [self._name(row).decode(errors="surrogateescape") for row in rows]

    def read(self, name: str) -> bytes:
        row = self._find(_safe_name(name))
        if row is None:
            where = f"{self.files[0]}" + (
                f" and {n} other archive{'s' * (n > 1)}" if (n := len(self.files) - 1) else ""
            )
            first = [part.decode(errors="replace") for part in self._names[:1000].split(b"\0")[:3] if part]
            raise DataError(f"{name}: no such picture in {where}; {_hint(name, first, 'the first entries are')}")
        file = self.files[row["archive"]]
        try:
            return self._unpack(file, int(row["offset"]), int(row["size"]), int(row["method"]))
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise DataError(
                f"{name}: cannot be read from {file} ({error}); download the archive again or unpack it"
            ) from None

    def _unpack(self, path: Path, offset: int, size: int, method: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            if method != PLAIN:
                signature, n_name, n_extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                if signature != b"PK\x03\x04":
                    raise ValueError("no member at the offset listed in the central directory")
                file.seek(n_name + n_extra, os.SEEK_CUR)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f"read {len(data)} bytes, expected {size}")
        if method in (PLAIN, STORED):
            return data
        if method != DEFLATED:
            raise ValueError(f"found compression method {method}, expected stored or deflated")
        return zlib.decompress(data, wbits=-zlib.MAX_WBITS)

    def _find(self, name: str) -> Any:
        """Returns the row of `_table` for a name, or None. If the name is duplicated, the last row wins, as in tar."""
        encoded = name.encode(errors="surrogateescape")
        key = np.uint64(_hash(encoded))
        low, high = np.searchsorted(self._hashes, key, "left"), np.searchsorted(self._hashes, key, "right")
        return next((row for row in self._table[low:high][::-1] if self._name(row) == encoded), None)

    def _name(self, row: Any) -> bytes:
        return self._names[row["name"] : row["name"] + row["name_size"]]

    def _refuse_duplicates(self) -> None:
        for i in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            one, two = self._table[i], self._table[i + 1]
            if self._name(one) == self._name(two) and one["archive"] != two["archive"]:
                files = f"{self.files[one['archive']]} and in {self.files[two['archive']]}"
                name = self._name(one).decode(errors="replace")
                raise DataError(
                    f"{name} is in {files}; names must be unique across archives; rename one of the members"
                )


def _members(file: Path) -> Iterator[_Member]:
    """Yields the files in an archive, in archive order. Raises DataError."""
    try:
        yield from _zip_members(file) if zipfile.is_zipfile(file) else _tar_members(file)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        expected = "expected a zip or an uncompressed tar; unpack the file or download it again"
        raise DataError(f"{file}: not a readable archive ({error}); {expected}") from None


def _zip_members(file: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.flag_bits & 1:
                raise DataError(f"{file}: {info.filename} is encrypted; unpack the archive and use the folder instead")
            if not info.is_dir():
                yield _Member(_strip_dot(info.filename), info.header_offset, info.compress_size, info.compress_type)


def _tar_members(file: Path) -> Iterator[_Member]:
    with tarfile.open(file, "r:") as archive:
        while (info := archive.next()) is not None:
            vars(archive)["members"].clear()  # to save memory: TarFile would otherwise keep every member
            if info.isreg() and not info.issparse():
                yield _Member(_strip_dot(info.name), info.offset_data, info.size, PLAIN)


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def _strip_dot(name: str) -> str:
    return name.removeprefix("./")


def _safe_name(name: str) -> str:
    """Returns the name without a leading "./". Raises DataError if the name is invalid or points outside the root."""
    plain = _strip_dot(name)
    path = PurePosixPath(plain)
    if not plain or path.is_absolute() or ".." in path.parts or "\\" in plain or "\0" in plain:
        hint = "; an absolute path must lead into the folder of the pictures" if path.is_absolute() else ""
        raise DataError(
            f'{name!r:.200}: not a valid picture name; expected a relative path with "/" separators and no ".."{hint}'
        )
    return plain


def _hint(name: str, first: list[str], intro: str) -> str:
    """Returns a hint for the error message about a missing name."""
    hint = (
        f"{intro} {', '.join(first)}; choose the location that contains {name.split('/')[0]}"
        if first
        else "this location is empty"
    )
    if match := _COCO.fullmatch(name):
        hint += f" (in COCO's train2014, this picture is named COCO_train2014_{match[1]})"
    return hint
