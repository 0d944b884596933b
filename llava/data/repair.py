"""Finds and repairs faults in the turns and <image> placeholders of a sample."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from llava.config import IMAGE_PLACEHOLDER
from llava.data.layouts import NAMES, Sample
from llava.preprocess import placeholders
from llava.preprocess.conversation import Turn

_PLACEHOLDERS = "placeholders rewritten: one per picture, at the start of the first turn; within a text, made literal"
LEFT = "sample left unchanged"
RULES = {  # kind of fault -> what `--fix` does
    "malformed": "sample dropped",
    "unsupported": LEFT,
    "repeated": "later copies dropped",
    "missing_picture": "sample dropped",
    "broken_picture": "sample dropped",
    "lossy_picture": LEFT,
    "leading_answer": "turn dropped",
    "trailing_question": "turn dropped",
    "same_side_twice": "turns joined with a line break",
    "empty_turn": "exchange dropped",
    "no_picture": "sample dropped",
    "missing_placeholder": _PLACEHOLDERS,
    "surplus_placeholder": _PLACEHOLDERS,
    "late_placeholder": _PLACEHOLDERS,
    "nothing_to_learn": "sample dropped",
    "too_long": "exchanges dropped from the end; sample dropped if even the first is too long",
    "refused": "sample dropped",
}


_FIRST = re.compile(rf"\A\s*(?:{IMAGE_PLACEHOLDER}\s*)+")


class Fault(NamedTuple):
    """A fault in a sample."""

    kind: str  # a key of RULES
    text: str  # what was found


def find_faults(sample: Sample) -> list[Fault]:
    """Checks the order of roles, the turn texts and the image placeholders. Returns at most one fault of each kind."""
    return [*_order_faults(sample.turns), *_empty_turns(sample.turns), *_mark_faults(sample.turns, len(sample.images))]


def repair(sample: Sample) -> Sample | None:
    """Returns the sample with its faults repaired, or None if no exchange remains or its picture is unknown."""
    while sample.turns and (faults := find_faults(sample)):
        if any(fault.kind == "no_picture" for fault in faults):
            return None
        turns = _drop_empty(_alternate(sample.turns))
        sample = replace(sample, turns=_rewrite_marks(turns, len(sample.images)))
    return sample if sample.turns else None


def drop_last_exchange(sample: Sample) -> Sample | None:
    """Drops the last exchange and repairs the remaining sample. Returns None if no exchange remains."""
    return repair(replace(sample, turns=sample.turns[:-2]))


def _order_faults(turns: Sequence[Turn]) -> Iterator[Fault]:
    if turns[0].role == "assistant":
        yield Fault("leading_answer", "the first turn is from gpt")
    for i in range(1, len(turns)):
        if turns[i].role == turns[i - 1].role:
            yield Fault("same_side_twice", f"turns {i} and {i + 1} are both from {NAMES[turns[i].role]}")
            break
    if turns[-1].role == "user":
        yield Fault("trailing_question", "the last turn is from human")
    if not any(_is_answer(turn) for turn in turns):
        yield Fault("nothing_to_learn", "there is no text from gpt")


def _is_answer(turn: Turn) -> bool:
    return turn.role == "assistant" and bool((turn.text or "").strip())


def _empty_turns(turns: Sequence[Turn]) -> Iterator[Fault]:
    empty = [f"{i + 1} ({NAMES[turn.role]})" for i, turn in enumerate(turns) if not (turn.text or "").strip()]
    if empty:
        word = "turn" if len(empty) == 1 else "turns"
        yield Fault("empty_turn", f"{word} {', '.join(empty[:5])}{' and more' * (len(empty) > 5)}")


def _mark_faults(turns: Sequence[Turn], n_pictures: int) -> Iterator[Fault]:
    counts = [placeholders.count(turn.text or "") for turn in turns]
    found = f"{IMAGE_PLACEHOLDER} placeholders: {sum(counts)}; pictures: {n_pictures}"
    if sum(counts) and not n_pictures:
        return (yield Fault("no_picture", f"{found}, because image names none"))
    if sum(counts) < n_pictures:
        yield Fault("missing_placeholder", found)
    elif sum(counts) > n_pictures:
        yield Fault("surplus_placeholder", found)
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    late = [i for i, turn in enumerate(turns) if counts[i] and i != first]
    in_answer = any(turns[i].role == "assistant" for i in late)
    if late and (n_pictures < 2 or in_answer):  # with several pictures, any human turn may contain placeholders
        yield Fault("late_placeholder", f"{IMAGE_PLACEHOLDER} in turn {late[0] + 1} ({NAMES[turns[late[0]].role]})")


def _alternate(turns: Sequence[Turn]) -> list[Turn]:
    """Joins and drops turns so that the roles alternate, starting with human and ending with gpt."""
    runs = [(role, [turn.text or "" for turn in run]) for role, run in groupby(turns, lambda turn: turn.role)]
    alternating = [
        Turn(role, "\n".join(filter(str.strip, texts)) if len(texts) > 1 else texts[0]) for role, texts in runs
    ]
    start = 1 if alternating[0].role == "assistant" else 0
    return alternating[start : len(alternating) - (alternating[-1].role == "user")]


def _rewrite_marks(turns: Sequence[Turn], n_pictures: int) -> tuple[Turn, ...]:
    """Replaces faulty placeholders with one per picture at the start of the first turn. Turns may become empty."""
    if not any(_mark_faults(turns, n_pictures)):
        return tuple(turns)
    unmarked = [_unmark(turn) for turn in turns]
    unmarked[:1] = [f"{IMAGE_PLACEHOLDER}\n" * n_pictures + text for text in unmarked[:1]]
    return tuple(Turn(turn.role, text) for turn, text in zip(turns, unmarked, strict=True))


def _unmark(turn: Turn) -> str:
    """Returns the text of a turn without placeholders.

    Placeholders at the start of a question or on lines of their own at its end are removed. All others, such as the
    word in "What does the <image> tag mean?", are part of a text and become literal.
    """
    text = turn.text or ""
    if not placeholders.count(text):
        return text
    if not placeholders.replace(text, "").strip():
        return ""
    if turn.role == "user":
        lines = _FIRST.sub("", text).split("\n")
        while not placeholders.replace(lines[-1], "").strip():
            lines.pop()
        text = "\n".join(lines)
    return placeholders.escape(text).strip()


def _drop_empty(turns: Sequence[Turn]) -> list[Turn]:
    exchanges = zip(turns[::2], turns[1::2], strict=True)
    return [turn for both in exchanges if all((turn.text or "").strip() for turn in both) for turn in both]
