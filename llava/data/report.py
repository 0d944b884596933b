"""What a check of training data found, and how it is shown to people."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llava.data.repair import RULES

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_EXAMPLES = 3  # of each kind of problem
_SOURCES = 12  # shown by name


class Finding(NamedTuple):
    """One problem of one sample."""

    kind: str  # a key of RULES
    sample: int  # its number in the data, from 0
    id: str  # empty for a malformed sample: its text names it
    text: str


@dataclass(frozen=True)
class TokenFigures:
    """In places of the sequence, pictures' included, of the samples that can be trained on."""

    limit: int
    samples: int  # measured
    total: int
    median: int
    longest: int
    learnt: int  # within the limit
    masked_share: float  # of all places within the limit


@dataclass(frozen=True)
class Fixed:
    """What the cleaned copy holds."""

    out: str
    kept: int  # samples in it
    mended: int  # those of them that were changed
    dropped: int


@dataclass(frozen=True)
class Report:
    """All that `llava data check` tells."""

    file: str
    samples: int
    with_pictures: int
    text_only: int
    pictures: int  # named by all samples together
    pictures_read: bool  # whether they were looked for and decoded
    sources: Mapping[str, int]  # samples by where their first picture lies
    turns: Mapping[int, int]  # samples by their number of turns
    problems: Mapping[str, int]  # samples by kind of problem
    repeated_ids: int  # samples whose id an earlier one has; published sets have many, so that is no problem
    findings: list[Finding]
    tokens: TokenFigures | None
    fixed: Fixed | None
    seconds: float

    @property
    def clean(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"findings": [finding._asdict() for finding in self.findings], "clean": self.clean}


def shown(report: Report) -> "Group":
    """The report as tables, for a Console with markup=False: names may hold brackets."""
    from rich.console import Group

    parts = [_facts(report), *([_problems(report)] if report.problems else [])]
    return Group(*parts, "no problems" if report.clean else _verdict(report))


def _facts(report: Report) -> "Table":
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _rows(report):
        table.add_row(name, text)
    return table


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    yield "file", report.file
    yield "samples", f"{report.samples:,}: {report.with_pictures:,} with pictures, {report.text_only:,} of text alone"
    read = "" if report.pictures_read else ", not looked at: give --images"
    yield "pictures", f"{report.pictures:,}{read if report.pictures else ''}"
    yield "sources", _most(report.sources)
    yield "turns", _most({f"{n} turns": count for n, count in report.turns.items()})
    if report.repeated_ids:
        yield "repeated ids", f"{report.repeated_ids:,} (no problem by itself)"
    if tokens := report.tokens:
        yield "tokens", f"{tokens.total:,}; a sample: median {tokens.median:,}, longest {tokens.longest:,}"
        yield "masked", f"{tokens.masked_share:.1%} of tokens; {tokens.learnt:,} are learnt"
    yield "checked in", f"{report.seconds:.1f} s, {report.samples / max(report.seconds, 1e-9):,.0f} samples/s"


def _most(counts: Mapping[str, int]) -> str:
    """The largest counts, named."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    rest = sum(count for _, count in ordered[_SOURCES:])
    text = ", ".join(f"{name} {count:,}" for name, count in ordered[:_SOURCES])
    return text + (f", {len(ordered) - _SOURCES} others {rest:,}" if rest else "")


def _problems(report: Report) -> "Table":
    from rich.table import Table

    table = Table("problem", "samples", "for example", "what --fix does")
    for kind, count in sorted(report.problems.items(), key=lambda item: -item[1]):
        some = [finding for finding in report.findings if finding.kind == kind][:_EXAMPLES]
        lines = [f"{number} (id {id:.30}): {text:.160}" if id else f"{text:.200}" for _, number, id, text in some]
        table.add_row(kind.replace("_", " "), f"{count:,}", "\n".join(lines), RULES[kind])
    return table


def _verdict(report: Report) -> str:
    wrong = len({finding.sample for finding in report.findings})
    text = f"{wrong:,} of {report.samples:,} samples have problems"
    if fixed := report.fixed:
        return f"{text}; {fixed.out}: {fixed.kept:,} samples, {fixed.mended:,} mended, {fixed.dropped:,} dropped"
    return text + "; --fix OUT writes a cleaned copy"
