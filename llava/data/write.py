"""Writes data files. A file appears only when it is complete."""

import os
from collections.abc import Iterable
from pathlib import Path

from llava.errors import DataError
from llava.tensors.atomic import check_space, replacing

_OTHER_FORMATS = (".tar", ".zip", ".gz", ".bz2", ".xz", ".zst", ".parquet", ".arrow")


def check_target(file: Path, out: Path, name: str) -> None:
    """Raises LlavaError if a changed copy of the data file `file` cannot be written to `out`.

    name: what the command line calls `out`, for error messages.
    """
    if file.is_dir() or file.suffix == ".tar":
        raise DataError(f"{file}: {name} cannot write tars; expected a .json or .jsonl file")
    if out.suffix.lower() in _OTHER_FORMATS:
        raise DataError(f"{out}: only JSON can be written; choose a .json or .jsonl file for {name}")
    if out.exists():
        raise DataError(f"{out}: already exists; choose another path for {name}")
    if not out.parent.is_dir():
        raise DataError(f"{out}: the parent folder does not exist; create it first")
    if not os.access(out.parent, os.W_OK):
        raise DataError(f"{out.parent}: no permission to write in this folder; choose another path for {name}")
    if file.is_file():
        check_space(out.parent, file.stat().st_size, out)


def write_samples(texts: Iterable[str], out: Path, *, array: bool) -> int:
    """Writes samples, given as JSON texts, as a JSON array or as JSON lines. Returns their number. Raises DataError."""
    first, between, last = ("[\n", ",\n", "\n]\n") if array else ("", "\n", "\n")
    n = 0
    try:
        with replacing(out) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(first)
            for text in texts:
                file.write(between * bool(n) + text)
                n += 1
            file.write(last)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror}); free some space, or choose another path"
        ) from None
    return n
