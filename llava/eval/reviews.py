"""Files of a judge's verdicts on LLaVA-Bench: read, and summarized by the rule of the original and by a sound one.

A verdict is a pair of scores, for the reference answer and for the candidate. If the original cannot parse what the
judge wrote, it stores -1 -1, which its summarize_gpt_review.py averages in (the published rule); the sound rule leaves
it out.
"""

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import DataError, counted, printable
from llava.eval.entries import Entry, JsonFile

if TYPE_CHECKING:
    from rich.table import Table

Pair = tuple[float, float]
log = logging.getLogger(__name__)
UNPARSED = (-1.0, -1.0)
REVIEWS = "reviews.jsonl"  # in the folder of a task
ALL = "all"  # the group of all verdicts
TITLES = {False: "unparsed verdicts left out", True: "as published: unparsed verdicts averaged in, as scores of -1"}

_EXPECTED = "a verdict as a JSON object with two scores in tuple or score"
_SCALE = (0.0, 10.0)  # the rule text asks for 1 to 10
_WHOLE = len("llava_bench_complex")  # wider categories are folded, as names are
_MAX = 1000.0  # a larger number is no score


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on one question."""

    scores: tuple[float, float]  # of the reference and of the candidate; UNPARSED
    category: str | None  # as in the file, e.g. llava_bench_conv

    @property
    def parsed(self) -> bool:
        """Whether the verdict has scores."""
        return self.scores != UNPARSED


@dataclass(frozen=True)
class Summary:
    """The figures of one category of a file. Scores are times 10, with one decimal, or None without verdicts."""

    name: str  # the file's name, without its suffix
    category: str
    relative: float | None  # 100 * candidate / reference
    reference: float | None
    candidate: float | None
    n: int  # verdicts in the means
    unparsed: int  # verdicts without scores, in the means only by the published rule

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON-compatible values."""
        return asdict(self)


def read_reviews(file: Path) -> list[Verdict]:
    """Returns the verdicts of a file, as JSON lines or a JSON array. Raises DataError.

    Warns about scores that are off the judge's scale, which count as they are, and about repeated questions, each of
    which counts, as in the original.
    """
    entries = list(JsonFile(file, _EXPECTED).entries())
    if not entries:
        raise DataError(f"{file}: contains no verdicts; expected {_EXPECTED} in each line")
    verdicts = [Verdict(_scores(entry), _category(entry)) for entry in entries]
    ids = [id for entry in entries if (id := _id(entry)) is not None]
    warn_of_scale(file, [one.scores for one in verdicts])
    if n := len(ids) - len(set(ids)):
        log.warning("%s: %s on a question that has one already; all count", file, counted(n, "verdict"))
    return verdicts


def warn_of_scale(file: Path, pairs: Sequence[Pair]) -> None:
    """Warns about scores that are off the judge's scale."""
    off = sum(pair != UNPARSED and not all(_SCALE[0] <= score <= _SCALE[1] for score in pair) for pair in pairs)
    if off:
        log.warning("%s: %s with a score that is not from 0 to 10, counted as it is", file, counted(off, "verdict"))


def pairs_by_question(file: Path, answer_ids: Mapping[str, str]) -> dict[str, list[Pair]]:
    """Returns the scores in the reviews.jsonl of a run, by question and in the order in which they were asked for.

    answer_ids: by question. Raises DataError if a verdict is about another answer.
    """
    entries = [one for one in JsonFile.appended(file, _EXPECTED).entries() if one.id("question_id") in answer_ids]
    check_answers(file, entries, answer_ids)
    found: dict[str, list[Pair]] = {}
    for one in sorted(entries, key=sample):
        found.setdefault(one.id("question_id"), []).append(_scores(one))
    return found


def sample(entry: Entry) -> int:
    """Returns the number of the verdict among those on its question, from 0. Files of others do not have it."""
    number = metadata(entry).get("sample", 0)
    return number if isinstance(number, int) else 0


def metadata(entry: Entry) -> Mapping[str, Any]:
    """Returns what the file says about how the verdict was made."""
    found = entry.value.get("metadata")
    return found if isinstance(found, dict) else {}


def check_answers(file: Path, entries: Sequence[Entry], answer_ids: Mapping[str, str]) -> None:
    """Raises DataError if verdicts are about other answers than those with `answer_ids`, which are by question."""
    ids = [(one.value.get("answer2_id"), answer_ids[one.id("question_id")]) for one in entries]
    others = [one for one, (given, wanted) in zip(entries, ids, strict=True) if given not in (None, wanted)]
    if others:
        raise DataError(
            f"{file}: {counted(len(others), 'verdict')} on other answers than those of the run, the first for question "
            f"{others[0].id('question_id')} (answer2_id); remove these lines"
        )


def parse_scores(text: str) -> tuple[float, float]:
    """Returns the scores in what a judge wrote, or UNPARSED, as parse_score in the original's eval_gpt_review_bench.py.

    Its first line must be two numbers with one space or comma between them, not both. Other than there, NaN and numbers
    that are no scores are unparsed.
    """
    words = text.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, words)
    except ValueError:
        return UNPARSED
    return (first, second) if _is_score(first) and _is_score(second) else UNPARSED


def _scores(entry: Entry) -> tuple[float, float]:
    """Returns both scores. `tuple` is the key of LLaVA's scripts, `score` that of the older ones."""
    given = {key: entry.value[key] for key in ("tuple", "score") if key in entry.value}
    if not given and isinstance(content := entry.value.get("content"), str):
        return parse_scores(content)
    if not given:
        raise DataError(f"{entry.where}: has neither tuple, score nor content; expected {_EXPECTED}")
    pairs = [_pair(value, f"{entry.where}: {key}") for key, value in given.items()]
    if len(set(pairs)) > 1:
        raise DataError(f"{entry.where}: tuple and score differ; keep the one that counts")
    return pairs[0]


def _pair(value: Any, where: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_score, value)):
        raise DataError(f"{where} is {value!r:.60}; expected two numbers, or [-1, -1] for an unparsed verdict")
    return float(value[0]), float(value[1])


def _is_score(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -_MAX <= value <= _MAX  # false for NaN


def _category(entry: Entry) -> str | None:
    category = entry.value.get("category")
    if category is not None and (not isinstance(category, str) or category in ("", ALL)):
        raise DataError(
            f"{entry.where}: category is {category!r:.60}; expected a name other than {ALL}, such as conv, or no "
            "category"
        )
    return category


def _id(entry: Entry) -> str | None:
    id = entry.value.get("question_id")
    if isinstance(id, bool) or not (id is None or isinstance(id, str | int)):
        raise DataError(f"{entry.where}: question_id is {id!r:.60}; expected the id of a question")
    return None if id is None else str(id)


# ------------------------------------------------------------------------------------------------------------- score


def summarize(name: str, verdicts: Sequence[Verdict], *, as_published: bool = False) -> list[Summary]:
    """Returns the figures of all verdicts, and of each category by name. `all` is pooled, not a mean of categories.

    as_published: average unparsed verdicts in, as -1 -1.
    """
    categories = sorted({one.category for one in verdicts if one.category is not None})
    groups = {ALL: verdicts, **{key: [one for one in verdicts if one.category == key] for key in categories}}
    return [_summary(name, category, group, as_published) for category, group in groups.items()]


def _summary(name: str, category: str, verdicts: Sequence[Verdict], as_published: bool) -> Summary:
    used = [one.scores for one in verdicts if as_published or one.parsed]
    unparsed = sum(not one.parsed for one in verdicts)
    reference, candidate = (_mean([pair[i] for pair in used]) for i in (0, 1))
    if reference is None or candidate is None:
        return Summary(name, category, None, None, None, 0, unparsed)
    relative = round(candidate / reference * 100, 1) if reference else None
    return Summary(name, category, relative, round(reference * 10, 1), round(candidate * 10, 1), len(used), unparsed)


def _mean(scores: Sequence[float]) -> float | None:
    """Returns the mean, rounded to 3 decimals before anything else is computed from it, as in the original.

    The scores are added one by one, as numpy does; `sum` has another error, which can change the last decimal.
    """
    return round(reduce(operator.add, scores) / len(scores), 3) if scores else None


# ------------------------------------------------------------------------------------------------------------ tables


def table(summaries: Sequence[Summary], title: str) -> "Table":
    """Returns figures as a table."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="", box=None, padding=(0, 2, 0, 0))
    made.add_column("name", overflow="fold")
    longest = max((len(printable(one.category)) for one in summaries), default=0)
    made.add_column("category", overflow="fold", no_wrap=longest <= _WHOLE)
    for column in ("100·cand/ref", "10·ref", "10·cand", "n", "unparsed"):
        made.add_column(column, justify="right", no_wrap=True)
    for one in summaries:
        figures = ("–" if value is None else f"{value:.1f}" for value in (one.relative, one.reference, one.candidate))
        made.add_row(printable(one.name), printable(one.category), *figures, f"{one.n:,}", f"{one.unparsed:,}")
    return made
