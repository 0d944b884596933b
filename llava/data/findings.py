"""The report of `llava data check`, and its rendering as tables."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llava.data.repair import LEFT, RULES

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_EXAMPLES = 3  # number of examples per kind of problem
_MAX_EXAMPLES = 8  # number of examples if they differ by more than the names and numbers in them
_VALUE = re.compile(r"\d+|'[^']*'|\[[^]]*\]")
_SOURCES = 12  # maximum number of sources listed by name
_CHANGES = 40  # maximum number of changed samples listed


class Finding(NamedTuple):
    """One problem in one sample."""

    kind: str  # a key of RULES
    sample: int  # zero-based index in the data
    id: str  # empty for a malformed sample, in which case `text` identifies it
    text: str


@dataclass(frozen=True)
class Change:
    """What the fixed copy does with a sample that has problems."""

    sample: int  # zero-based index in the data
    id: str  # empty for a malformed sample
    action: str  # "repaired", "dropped" or "left" (unchanged)
    problems: tuple[str, ...]  # keys of RULES


@dataclass(frozen=True)
class TokenFigures:
    """Token counts over all measured samples, including image tokens."""

    limit: int
    samples: int  # number of samples counted
    total: int
    median: int
    longest: int
    targets: int  # target tokens within the limit
    masked_share: float  # fraction of non-target tokens among the tokens within the limit


@dataclass(frozen=True)
class Fixed:
    """Summary of the fixed copy."""

    out: str
    kept: int  # samples in the copy
    repaired: int  # repaired samples, included in `kept`
    dropped: int
    left: int  # samples with problems that are copied unchanged, included in `kept`
    changes: list[Change]  # in the order of the data


@dataclass(frozen=True)
class Report:
    """Everything that `llava data check` reports."""

    file: str
    samples: int
    with_pictures: int
    text_only: int
    unread: int  # malformed or unsupported samples
    pictures: int  # number of picture names in all samples
    pictures_read: bool  # whether the pictures were decoded
    sources: Mapping[str, int]  # top-level folder of the first picture -> number of samples
    turns: Mapping[int, int]  # number of turns -> number of samples
    problems: Mapping[str, int]  # kind of problem -> number of samples
    repeated_ids: int  # samples that reuse an earlier id; common in published data and not a problem
    findings: list[Finding]
    tokens: TokenFigures | None
    fixed: Fixed | None
    seconds: float

    @property
    def clean(self) -> bool:
        return not self.problems

    @property
    def resolved(self) -> bool:
        """Whether the data or its fixed copy has no problems."""
        return self.clean or (self.fixed is not None and not self.fixed.left)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-compatible values."""
        return asdict(self) | {"findings": [finding._asdict() for finding in self.findings], "clean": self.clean}


def render(report: Report) -> "Group":
    """Renders the report as Rich tables. Print them with markup=False, because names may contain brackets."""
    from rich.console import Group

    parts: list[Table | str] = [facts_table(_rows(report)), *([_problems(report)] if report.problems else [])]
    if report.fixed and report.fixed.changes:
        parts.append("\n".join(_changes(report.fixed)))
    return Group(*parts, "no problems" if report.clean else _verdict(report))


def facts_table(rows: Iterable[tuple[str, str]]) -> "Table":
    """Returns names and texts as a table without a header."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    return table


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    yield "file", report.file
    unread = f", {report.unread:,} not read" if report.unread else ""
    kinds = f"{report.with_pictures:,} with pictures, {report.text_only:,} text-only"
    yield "samples", f"{report.samples:,}: {kinds}{unread}"
    read = "" if report.pictures_read else ", not checked; specify --images"
    yield "pictures", f"{report.pictures:,}{read if report.pictures else ''}"
    yield "sources", _most(report.sources)
    yield "turns", _most({f"{n} turn{'s' * (n != 1)}": count for n, count in report.turns.items()})
    if report.repeated_ids:
        yield "repeated ids", f"{report.repeated_ids:,} (not a problem)"
    if tokens := report.tokens:
        yield "tokens", f"{tokens.total:,}; per sample: median {tokens.median:,}, longest {tokens.longest:,}"
        yield "masked", f"{tokens.masked_share:.1%} of tokens; {tokens.targets:,} are targets"
    yield "checked in", f"{report.seconds:.1f} s, {report.samples / max(report.seconds, 1e-9):,.0f} samples/s"


def _most(counts: Mapping[str, int]) -> str:
    """Returns the largest counts with their names, followed by the sum of the others."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    rest = sum(count for _, count in ordered[_SOURCES:])
    text = ", ".join(f"{name} {count:,}" for name, count in ordered[:_SOURCES])
    n = len(ordered) - _SOURCES
    return text + (f", {n} other{'s' * (n != 1)} {rest:,}" if rest else "")


def _problems(report: Report) -> "Table":
    from rich.table import Table

    table = Table("problem", "samples", "examples", "what --fix does")
    for kind, count in sorted(report.problems.items(), key=lambda item: -item[1]):
        some = _examples([finding for finding in report.findings if finding.kind == kind])
        lines = [
            f"{number} (id {id:.30}): {text:.160}" if id else text.removeprefix(f"{report.file}, ")[:280]
            for _, number, id, text in some
        ]
        table.add_row(kind.replace("_", " "), f"{count:,}", "\n".join(lines), RULES[kind])
    return table


def _examples(findings: list[Finding]) -> list[Finding]:
    """Returns the first findings, and the first of each further group that differs in more than its values."""
    groups: dict[str, Finding] = {}
    for finding in findings:
        groups.setdefault(_VALUE.sub("", finding.text), finding)
    others = [finding for finding in groups.values() if finding not in findings[:_EXAMPLES]]
    return [*findings[:_EXAMPLES], *others][:_MAX_EXAMPLES]


def _changes(fixed: Fixed) -> Iterator[str]:
    for change in fixed.changes[:_CHANGES]:
        id = f" (id {change.id:.30})" if change.id else ""
        action = "left unchanged" if change.action == "left" else change.action
        problems = ", ".join(kind.replace("_", " ") for kind in change.problems)
        yield f"sample {change.sample}{id}: {action} ({problems})"
    if (more := len(fixed.changes) - _CHANGES) > 0:
        yield f"and {more:,} more; --json lists all"


def _verdict(report: Report) -> str:
    n_bad = len({finding.sample for finding in report.findings})
    text = f"{n_bad:,} of {report.samples:,} sample{'s' * (report.samples != 1)} with problems"
    if fixed := report.fixed:
        kept = f"{fixed.kept:,} sample{'s' * (fixed.kept != 1)}"
        left = f", {fixed.left:,} left with problems" if fixed.left else ""
        return f"{text}; {fixed.out}: {kept}, {fixed.repaired:,} repaired, {fixed.dropped:,} dropped{left}"
    fixable = any(RULES[kind] != LEFT for kind in report.problems)
    return text + "; --fix OUT writes a fixed copy" * fixable
