"""Training samples, read from JSON arrays, JSONL files and webdataset-style tars.

As Python objects, 665,000 samples would take up several GB in every worker. Instead, they are kept as JSON text in one
buffer with an array of offsets, which forked workers share. A sample is parsed when it is accessed.
"""

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.layouts import Sample, parse
from llava.data.pictures import Archives, Pictures, decode_data_url, is_data_url, open_pictures, tars_in
from llava.data.records import records
from llava.errors import DataError

# Start method of worker processes. Forked workers share the samples with the parent. Each worker uses one thread and
# no GPU, so forking is safe even from a parent with several threads, although Python 3.12 issues a DeprecationWarning.
WORKERS_START = "fork" if sys.platform == "linux" else "spawn"


@contextmanager
def starting_workers() -> Iterator[None]:
    """Hides the parent's objects from the garbage collector of workers that are forked inside.

    If a worker collected the process group of an earlier training run, it would wait forever for threads that exist
    only in the parent.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Samples(Sequence[Sample]):
    """The samples of one or more data files, in order.

    files: .json (an array), .jsonl, .tar (with a `KEY.json` for each sample and pictures such as `KEY.jpg`), or folders
    of such tars. images: location of the pictures for .json and .jsonl files (see `open_pictures`), or None if pictures
    are not needed; must be None for tars, which contain their own pictures. Raises DataError if a file is unusable; a
    malformed sample raises DataError only when it is accessed.
    """

    def __init__(self, files: Sequence[Path], images: Path | None):
        self.files = [shard for file in files for shard in _shards(file)]
        if not self.files:
            raise DataError("no data files given; expected at least one")
        tars = [file for file in self.files if file.suffix == ".tar"]
        if tars and images is not None:
            raise DataError(f"{tars[0]}: a tar contains its own pictures; do not specify a separate location for them")
        self._pictures: Pictures | None = Archives(tars) if tars else open_pictures(images) if images else None
        self.n_named = 0  # number of samples that name a picture, which needs a location, unlike a data: URL
        self._text = bytearray()
        ends, lengths, firsts = [0], list[int](), list[int]()
        for file in self.files:
            firsts.append(len(lengths))
            for record in records(file, self._pictures):
                self._text += record.text.encode(errors="surrogatepass")
                ends.append(len(self._text))
                sample = _parsed(record.value)
                lengths.append(_signed_words(sample))
                self.n_named += sample is not None and not all(map(is_data_url, sample.images))
            if len(lengths) == firsts[-1]:
                raise DataError(f"{file}: contains no samples; expected at least one")
        self._ends = np.array(ends, np.int64)
        self._lengths = np.array(lengths, np.int64)
        self._firsts = np.array(firsts, np.int64)  # index of the first sample of each file

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, i: int) -> Sample:  # type: ignore[override]  # slices are not supported
        """Parses sample `i`. Raises IndexError if `i` is out of range, and DataError like `parse`."""
        return parse(self.value(i), self.where(i), str(i))

    @property
    def lengths(self) -> list[int]:
        """Number of words per sample (at least 1), negated for text-only samples, as in LLaVA's `modality_lengths`."""
        return self._lengths.tolist()

    @property
    def has_pictures(self) -> bool:
        """Whether the location of the pictures is known, so that `picture` can read them."""
        return self._pictures is not None

    def picture(self, name: str) -> bytes:
        """Returns the bytes of an image file. Raises DataError, and ImageError for a broken data: URL."""
        if is_data_url(name):
            return decode_data_url(name)
        if self._pictures is None:
            raise DataError(
                f"{name}: no location given for the pictures; set images= (--images) to a folder, a .zip or a .tar"
            )
        return self._pictures.read(name)

    def text(self, i: int) -> str:
        """Returns the JSON text of a sample, exactly as in the file or, for tars, re-encoded."""
        i = range(len(self))[i]
        return self._text[self._ends[i] : self._ends[i + 1]].decode(errors="surrogatepass")

    def value(self, i: int) -> Any:
        """Returns the parsed JSON of a sample, which can be of any type. Raises DataError if it is not valid JSON."""
        try:
            return json.loads(self.text(i))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.where(i)}: not valid JSON ({error}); expected one sample as a JSON object"
            ) from None

    def where(self, i: int) -> str:
        """Returns the file that contains a sample and the sample's index in that file, for error messages."""
        i = range(len(self))[i]
        file = self._file_index(i)
        return f"{self.files[file]}, sample {i - int(self._firsts[file])}"

    def file(self, i: int) -> Path:
        """Returns the file that contains a sample."""
        return self.files[self._file_index(range(len(self))[i])]

    def _file_index(self, i: int) -> int:
        return int(np.searchsorted(self._firsts, i, "right")) - 1


def _signed_words(sample: Sample | None) -> int:
    """Returns a sample's entry in `Samples.lengths`, or -1 if it is malformed; accessing it raises the error."""
    if sample is None:
        return -1
    n = max(1, sum(len((turn.text or "").split()) for turn in sample.turns))
    return n if sample.images else -n


def _parsed(value: Any) -> Sample | None:
    try:
        return parse(value, "", "")
    except DataError:
        return None


def _shards(file: Path) -> list[Path]:
    if not file.is_dir():
        return [file]
    if shards := tars_in(file):
        return shards
    raise DataError(
        f"{file}: folder contains no .tar files; expected a .json, .jsonl or .tar file, or a folder of tars"
    )
