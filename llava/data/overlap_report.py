"""The report of `llava data overlap`: as JSON-compatible values, and as text."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from llava.data.findings import facts_table
from llava.errors import counted, printable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_SHOWN = 10  # pairs of each kind in the text; JSON has all
_SIDES = (
    ("train", "training data", "specify --images"),
    ("bench", "benchmark", "specify --bench-images"),
)


@dataclass(frozen=True)
class InCommon:
    """How many of the benchmark's items are in the training data, too."""

    count: int
    of: int  # items of the benchmark that can be compared

    @property
    def share(self) -> float | None:
        """In per cent, or None if there is nothing to compare."""
        return 100 * self.count / self.of if self.of else None

    def __str__(self) -> str:
        return "none to compare" if self.share is None else f"{self.count:,} of {self.of:,} ({self.share:.1f} %)"

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts and the share as JSON-compatible values."""
        return asdict(self) | {"share": self.share}


@dataclass(frozen=True)
class QuestionPair:
    """A question of the benchmark that is in the training data."""

    question: str  # as first written in the benchmark
    samples: list[int]  # zero-based indices in the training data


@dataclass(frozen=True)
class PicturePair:
    """A picture of the benchmark, and one in the training data that is the same."""

    bench: str  # its name
    train: str  # its name
    distance: int  # bits in which the hashes differ
    samples: list[int]  # zero-based indices in the training data


@dataclass(frozen=True)
class Questions:
    """The questions that both have."""

    train: int  # questions in the training data
    common: InCommon  # different questions of the benchmark, without generic ones
    generic: InCommon  # questions that fit any picture, such as "Describe the image"
    pairs: list[QuestionPair]  # of `common`


@dataclass(frozen=True)
class Side:
    """The pictures of the training data or of the benchmark."""

    pictures: int  # whose location is known
    hashed: int  # that have a hash; 0 if the other side has no pictures
    nowhere: int  # whose location is not known
    plain: list[str] = field(default_factory=list)  # names of those without a hash, such as one colour
    unreadable: Mapping[str, str] = field(default_factory=dict)  # name -> why


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Everything that `llava data overlap` reports."""

    train: str
    bench: str
    distance: int  # bits in which the hashes of the same picture may differ
    samples: int  # of the training data
    unread_samples: int  # malformed or unsupported; neither their questions nor pictures are compared
    bench_files: Mapping[str, int]  # file of the benchmark -> number of its questions
    bench_answers: int  # answers of models in these files, left out
    bench_unread: int  # malformed or unsupported training samples in these files
    bench_left_out: int  # pictures in the benchmark's folder that its questions do not name, although they name others
    sides: Mapping[str, Side]  # train and bench
    pictures: list[PicturePair]
    questions: Questions

    @property
    def common_pictures(self) -> InCommon:
        """The pictures of the benchmark that are in the training data."""
        return InCommon(len({pair.bench for pair in self.pictures}), self.sides["bench"].hashed)

    @property
    def found(self) -> bool:
        """Whether there is a picture or a question in common, generic questions aside."""
        return bool(self.pictures or self.questions.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-compatible values."""
        pictures = {side: asdict(one) for side, one in self.sides.items()} | self.common_pictures.to_dict()
        questions = {"train": self.questions.train, **self.questions.common.to_dict()}
        facts = {key: value for key, value in asdict(self).items() if key != "sides"}
        return {
            **facts,
            "overlap": self.found,
            "pictures": pictures | {"pairs": [asdict(pair) for pair in self.pictures]},
            "questions": questions
            | {"generic": self.questions.generic.to_dict(), "pairs": [asdict(pair) for pair in self.questions.pairs]},
        }


def render(report: Overlap) -> "Group":
    """Renders the report as Rich tables. Print them with markup=False, because names may contain brackets."""
    from rich.console import Group

    parts: list[Table | str] = [facts_table(_rows(report))]
    if report.pictures:
        parts.append(_pictures(report))
    if report.questions.pairs:
        parts.append(_questions(report))
    if max(len(report.pictures), len(report.questions.pairs)) > _SHOWN:
        parts.append("the rest is listed by --json")
    return Group(*parts)


def _rows(report: Overlap) -> Iterator[tuple[str, str]]:
    unread = f", {report.unread_samples:,} not read" if report.unread_samples else ""
    yield "training data", f"{printable(report.train)}: {counted(report.samples, 'sample')}{unread}"
    files = ", ".join(f"{counted(n, 'question')} in {name}" for name, n in report.bench_files.items())
    yield "benchmark", f"{printable(report.bench)}: {printable(files) or 'no questions'}"
    if report.bench_answers or report.bench_unread:
        yield "", f"left out: {report.bench_answers:,} answers of models, {report.bench_unread:,} malformed samples"
    n_samples = len({i for pair in report.pictures for i in pair.samples})
    where = f", in {counted(n_samples, 'sample')}" if n_samples else ""
    yield "pictures in common", f"{report.common_pictures}{where}"
    for side, name, advice in _SIDES:
        for text in _not_compared(report.sides[side], advice):
            yield "", f"{name}: {text}"
    if report.bench_left_out:
        yield "", f"benchmark: {counted(report.bench_left_out, 'picture')} left out, which no question names"
    yield "questions in common", str(report.questions.common)
    yield "", f"apart from generic ones, such as “Describe the image”: {report.questions.generic}"


def _not_compared(side: Side, advice: str) -> Iterator[str]:
    if side.nowhere:
        yield f"{counted(side.nowhere, 'picture')} not compared; {advice}"
    if side.plain:
        yield f"{counted(len(side.plain), 'picture')} not compared, too plain to be told apart: {_first(side.plain)}"
    if side.unreadable:
        first = printable(next(iter(side.unreadable.values())))
        yield f"{counted(len(side.unreadable), 'picture')} not compared, unreadable: {first:.200}"
    if side.pictures and not (side.hashed or side.plain or side.unreadable):
        yield f"{counted(side.pictures, 'picture')} not compared, because the other side has none"


def _first(names: list[str]) -> str:
    return printable(", ".join(f"{name:.60}" for name in names[:3])) + ", …" * (len(names) > 3)


def _pictures(report: Overlap) -> "Table":
    from rich.table import Table

    table = Table("picture of the benchmark", "of the training data", "bits", "samples")
    for pair in report.pictures[:_SHOWN]:
        table.add_row(f"{printable(pair.bench):.80}", f"{printable(pair.train):.80}", f"{pair.distance}", _some(pair))
    return table


def _questions(report: Overlap) -> "Table":
    from rich.table import Table

    table = Table("question of the benchmark", "samples")
    for pair in report.questions.pairs[:_SHOWN]:
        table.add_row(f"{printable(pair.question):.160}", _some(pair))
    return table


def _some(pair: PicturePair | QuestionPair) -> str:
    return ", ".join(map(str, pair.samples[:3])) + (f", … ({len(pair.samples):,})" if len(pair.samples) > 3 else "")
