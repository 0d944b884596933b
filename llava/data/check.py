"""Checks all samples of a data file in worker processes, reports the problems, and optionally writes a fixed copy."""

import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median

from llava.config import PictureOptions, Transparency
from llava.data.examine import Examined, Examiner
from llava.data.findings import Change, Finding, Fixed, Report, TokenFigures
from llava.data.layouts import Sample
from llava.data.measure import Measure
from llava.data.pictures import is_data_url
from llava.data.pool import Progress, run_in_chunks
from llava.data.records import is_array
from llava.data.repair import Fault
from llava.data.samples import Samples
from llava.data.write import check_target, write_samples
from llava.errors import DataError


@dataclass
class _Tally:
    """Running totals over all samples examined so far. Call `add` in sample order."""

    findings: list[Finding] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    texts: dict[int, str | None] = field(default_factory=dict)  # changed samples: index -> JSON text, None if dropped
    changes: list[Change] = field(default_factory=list)  # what a fixed copy does with samples that have faults
    totals: list[int] = field(default_factory=list)  # token count of each measured sample
    n_pictures: int = 0
    text_only: int = 0
    unread: int = 0  # malformed or unsupported
    target_tokens: int = 0
    repeated_ids: int = 0
    _ids: set[str] = field(default_factory=set)
    _digests: set[int] = field(default_factory=set)

    def add(self, i: int, found: Examined, text: str) -> None:
        if found.digest in self._digests:
            found.faults.append(Fault("repeated", "identical to an earlier sample"))
            found.text = None
        elif found.sample:
            self.repeated_ids += found.id in self._ids
            self._ids.add(found.id)
        self._digests.add(found.digest)
        self.problems.update({fault.kind for fault in found.faults})
        self.findings += [Finding(fault.kind, i, found.id, fault.text) for fault in found.faults]
        if found.faults:
            action = "dropped" if found.text is None else "left" if found.text == text else "repaired"
            self.changes.append(Change(i, found.id, action, tuple(fault.kind for fault in found.faults)))
        if found.text != text:
            self.texts[i] = found.text
        if found.tokens:
            self.totals.append(found.tokens.total)
            self.target_tokens += found.tokens.targets
        self._describe(found.sample)

    def _describe(self, sample: Sample | None) -> None:
        if sample is None:
            self.unread += 1
            return
        self.sources[_source(sample)] += 1
        self.turns[len(sample.turns)] += 1
        self.n_pictures += len(sample.images)
        self.text_only += not sample.images

    def tokens(self, limit: int) -> TokenFigures | None:
        if not self.totals:
            return None
        kept = sum(min(n, limit) for n in self.totals)
        return TokenFigures(
            limit=limit,
            samples=len(self.totals),
            total=sum(self.totals),
            median=int(median(self.totals)),
            longest=max(self.totals),
            targets=self.target_tokens,
            masked_share=1 - self.target_tokens / kept,
        )


def check(
    file: Path,
    images: Path | None = None,
    *,
    measure: Measure | None = None,
    fix: Path | None = None,
    workers: int | None = None,
    transparency: Transparency = "drop",
    progress: Progress = lambda done, total: None,
) -> Report:
    """Checks every sample of a data file and, if `fix` is a path, writes a fixed copy there.

    images: location of the pictures; if None, only pictures in tars are read. measure: counts the tokens of a sample.
    workers: number of processes (0: run in this process; None: one per CPU). transparency: as in the recipe.
    Raises DataError if the file cannot be read or the copy cannot be written, or CheckpointError if the disk has no
    room for the copy.
    """
    started = time.perf_counter()
    if fix is not None:
        check_target(file, fix, "--fix")
    samples = Samples([file], images)
    examiner = Examiner(samples, samples.has_pictures, measure, PictureOptions(transparency=transparency))
    if measure and measure.needs_sizes and not samples.has_pictures:
        raise DataError(
            "for this model, token counts depend on picture sizes; specify the location of the pictures with --images"
        )
    tally = _Tally()
    chunks = run_in_chunks(examiner, len(samples), workers, progress)
    for i, found in enumerate(chain.from_iterable(chunks)):
        tally.add(i, found, samples.text(i))
    fixed = _write_fixed(samples, tally, fix, array=is_array(file)) if fix else None
    return Report(
        file=str(file),
        samples=len(samples),
        with_pictures=len(samples) - tally.text_only - tally.unread,
        text_only=tally.text_only,
        unread=tally.unread,
        pictures=tally.n_pictures,
        pictures_read=samples.has_pictures,
        sources=dict(tally.sources),
        turns=dict(sorted(tally.turns.items())),
        problems=dict(tally.problems),
        repeated_ids=tally.repeated_ids,
        findings=tally.findings,
        tokens=tally.tokens(measure.limit) if measure else None,
        fixed=fixed,
        seconds=time.perf_counter() - started,
    )


def _source(sample: Sample) -> str:
    """Returns the top-level folder of the first picture. All folders with numeric names count as one source."""
    if not sample.images:
        return "text only"
    if is_data_url(sample.images[0]):
        return "data: URLs"
    top, slash, _ = sample.images[0].removeprefix("./").partition("/")
    return "no folder" if not slash else "<number>/" if top.isdecimal() else f"{top}/"


def _write_fixed(samples: Samples, tally: _Tally, out: Path, *, array: bool) -> Fixed:
    """Writes the fixed copy in the form of the original file."""
    dropped = sum(text is None for text in tally.texts.values())
    if dropped == len(samples):
        raise DataError(f"{out}: not written, because no samples would remain; run without --fix to see the problems")
    texts = (tally.texts[i] if i in tally.texts else samples.text(i) for i in range(len(samples)))
    write_samples((text for text in texts if text is not None), out, array=array)
    return Fixed(
        out=str(out),
        kept=len(samples) - dropped,
        repaired=len(tally.texts) - dropped,
        dropped=dropped,
        left=sum(change.action == "left" for change in tally.changes),
        changes=tally.changes,
    )
