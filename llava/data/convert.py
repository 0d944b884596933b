"""Converts data files in the layouts of ShareGPT and OpenAI, and ScienceQA's problems, to LLaVA's JSON."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llava.data.layouts import Layout, UnsupportedError, layout_of, parse, to_llava
from llava.data.records import BROKEN, Record, is_array, records
from llava.data.scienceqa import MissingProblemError, Problems, Wanted, read_split
from llava.data.scienceqa import sample as scienceqa_sample
from llava.data.write import check_target, write_samples
from llava.errors import DataError

_NAMED = 3  # maximum number of samples listed in an error message
_LISTED = 20  # maximum number of samples listed in the text of a summary


@dataclass(frozen=True)
class Lost:
    """A sample that cannot be converted."""

    sample: int  # zero-based index in the data
    kind: str  # malformed, unsupported, layout or missing
    text: str  # what was found; names the file, the sample and the key


@dataclass
class Conversion:
    """Summary of a conversion."""

    file: str
    out: str
    samples: int = 0  # samples read
    converted: int = 0
    with_pictures: int = 0  # among the converted samples
    lost: list[Lost] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as JSON-compatible values."""
        return asdict(self)

    def text(self) -> str:
        """Returns the summary as text, with one line for each of the first samples that were left out."""
        lines = [f"left out: {lost.text}" for lost in self.lost[:_LISTED]]
        if (more := len(self.lost) - _LISTED) > 0:
            lines.append(f"left out: {more:,} more; --json lists all")
        samples = f"{self.converted:,} sample{'s' * (self.converted != 1)}, {self.with_pictures:,} with pictures"
        lost = f"; left out {len(self.lost):,}: {self._counts()}" if self.lost else ""
        return "\n".join([*lines, f"{self.out}: {samples}{lost}"])

    def _counts(self) -> str:
        return ", ".join(f"{n:,} {kind}" for kind, n in Counter(lost.kind for lost in self.lost).most_common())

    def check_lost(self) -> None:
        """Raises DataError if any sample is lost."""
        if self.lost:
            examples = "; ".join(lost.text.removeprefix(f"{self.file}, ") for lost in self.lost[:_NAMED])
            raise DataError(
                f"{self.file}: {len(self.lost):,} of {self.samples:,} cannot be converted ({self._counts()}), such as "
                f"{examples}; nothing was written; add --drop to leave these samples out"
            )


def convert(file: Path, out: Path, *, layout: Layout, drop: bool = False) -> Conversion:
    """Writes the samples of `file` to `out` in LLaVA's JSON. Both are JSON arrays or JSON lines of any length.

    `out` is an array or lines according to its suffix, .json or .jsonl, and otherwise like `file`. drop: leave out
    samples that cannot be converted; otherwise, if there are any, raises DataError, and `out` is not written. Keys with
    other names are kept.
    """
    check_target(file, out, "OUT")
    array = out.suffix != ".jsonl" if out.suffix in (".json", ".jsonl") else is_array(file)
    makers = (
        partial(_converted, record, layout, f"{file}, sample {i}", str(i))
        for i, record in enumerate(records(file, None))
    )
    return _write(file, out, makers, array=array, drop=drop)


def convert_scienceqa(
    given: Path, out: Path, wanted: Wanted, *, drop: bool = False, progress: Callable[[int, int], None]
) -> Conversion:
    """Writes a split of ScienceQA to `out` in LLaVA's JSON: JSON lines if its suffix is .jsonl, otherwise an array.

    given: the folder with problems.json and pid_splits.json, or the former, with the latter beside it. drop: leave out
    problems that are missing or cannot be converted; otherwise, raises DataError, and `out` is not written. progress:
    receives the number of problems done and of all.
    """
    file = given / "problems.json" if given.is_dir() else given
    check_target(file, out, "OUT")
    ids = read_split(file.with_name("pid_splits.json"), wanted.split)
    problems = Problems(file)

    def make(i: int, id: str) -> dict[str, Any]:
        progress(i + 1, len(ids))
        return scienceqa_sample(problems[id], wanted.format)

    makers = (partial(make, i, id) for i, id in enumerate(ids))
    return _write(file, out, makers, array=out.suffix != ".jsonl", drop=drop)


_Maker = Callable[[], dict[str, Any]]  # returns a sample, or raises DataError


def _write(file: Path, out: Path, makers: Iterable[_Maker], *, array: bool, drop: bool) -> Conversion:
    result = Conversion(str(file), str(out))
    write_samples(_texts(makers, drop, result), out, array=array)
    return result


def _texts(makers: Iterable[_Maker], drop: bool, result: Conversion) -> Iterator[str]:
    """Yields the JSON text of each converted sample and counts them in `result`."""
    for i, make in enumerate(makers):
        result.samples += 1
        try:
            value = make()
        except DataError as error:
            result.lost.append(Lost(i, _kind(error), str(error)))
            continue
        result.converted += 1
        result.with_pictures += "image" in value
        yield json.dumps(value, ensure_ascii=False)
    if not drop:
        result.check_lost()
    if not result.converted:
        raise DataError(f"{result.file}: no sample can be converted; nothing was written")


def _kind(error: DataError) -> str:
    kinds = {UnsupportedError: "unsupported", _LayoutError: "layout", MissingProblemError: "missing"}
    return next((name for kind, name in kinds.items() if isinstance(error, kind)), "malformed")


class _LayoutError(DataError):
    pass


def _converted(record: Record, layout: Layout, where: str, fallback_id: str) -> dict[str, Any]:
    if record.value is BROKEN:
        raise DataError(f"{where}: not valid JSON; expected one sample as a JSON object")
    sample = parse(record.value, where, fallback_id)
    if (found := layout_of(record.value)) != layout:
        raise _LayoutError(f"{where} (id {sample.id:.60}): the layout is {found}; convert it with --from {found}")
    value = to_llava(record.value, sample)
    assert value is not None  # no turn was joined or dropped
    return value
