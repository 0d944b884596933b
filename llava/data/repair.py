"""What can be wrong with a sample's turns and marks, and how it is put right; one rule for each kind of fault."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from llava.config import IMAGE_MARK
from llava.data.samples import ROLES, Sample
from llava.preprocess.conversation import Turn

_MARKS = "marks set anew: one a picture, in front of the first turn"
RULES = {  # every kind of fault, and what `--fix` does about it
    "malformed": "sample dropped",
    "repeated": "later copies dropped",
    "missing_picture": "sample dropped",
    "broken_picture": "sample dropped",
    "leading_answer": "turn dropped",
    "trailing_question": "turn dropped",
    "same_side_twice": "turns joined with a line break",
    "empty_turn": "exchange dropped",
    "missing_mark": _MARKS,
    "surplus_mark": _MARKS,
    "late_mark": _MARKS,
    "nothing_to_learn": "sample dropped",
    "too_long": "exchanges dropped from the end; sample dropped if its first is too long",
    "refused": "sample dropped",
}
_NAMES = {role: name for name, role in ROLES.items()}  # as the file has them


class Fault(NamedTuple):
    """One kind of fault of a sample."""

    kind: str  # a key of RULES
    text: str  # what was found


def faults(sample: Sample) -> list[Fault]:
    """What is wrong with order, text and marks of the turns; each kind once."""
    return [*_order_faults(sample.turns), *_empty_turns(sample.turns), *_mark_faults(sample.turns, len(sample.images))]


def mended(sample: Sample) -> Sample | None:
    """The sample without its faults; None if no exchange is left."""
    while sample.turns and faults(sample):
        turns = _without_empty(_ordered(sample.turns))
        sample = replace(sample, turns=_marked(turns, len(sample.images)))
    return sample if sample.turns else None


def shortened(sample: Sample) -> Sample | None:
    """The sample without its last exchange, marks set right; None if no exchange is left."""
    return mended(replace(sample, turns=sample.turns[:-2]))


def as_conversations(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Turns in the form of the file."""
    return [{"from": _NAMES[role], "value": text or ""} for role, text in turns]


def _order_faults(turns: Sequence[Turn]) -> Iterator[Fault]:
    if turns[0].role == "assistant":
        yield Fault("leading_answer", "the first turn is gpt's")
    for i in range(1, len(turns)):
        if turns[i].role == turns[i - 1].role:
            yield Fault("same_side_twice", f"turns {i} and {i + 1} are both {_NAMES[turns[i].role]}'s")
            break
    if turns[-1].role == "user":
        yield Fault("trailing_question", "the last turn is human's")
    if not any(_answers(turn) for turn in turns):
        yield Fault("nothing_to_learn", "gpt says nothing")


def _answers(turn: Turn) -> bool:
    return turn.role == "assistant" and bool((turn.text or "").strip())


def _empty_turns(turns: Sequence[Turn]) -> Iterator[Fault]:
    empty = [f"{i + 1} ({_NAMES[turn.role]})" for i, turn in enumerate(turns) if not (turn.text or "").strip()]
    if empty:
        yield Fault("empty_turn", f"turn {', '.join(empty[:5])}{' and more' * (len(empty) > 5)}")


def _mark_faults(turns: Sequence[Turn], n_pictures: int) -> Iterator[Fault]:
    counts = [(turn.text or "").count(IMAGE_MARK) for turn in turns]
    found = f"{sum(counts)} {IMAGE_MARK} for {n_pictures} pictures"
    if sum(counts) < n_pictures:
        yield Fault("missing_mark", found)
    elif sum(counts) > n_pictures:
        yield Fault("surplus_mark", found)
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    late = [i for i, turn in enumerate(turns) if counts[i] and i != first]
    if late and (
        n_pictures < 2 or any(turns[i].role == "assistant" for i in late)
    ):  # several may stand where they come
        yield Fault("late_mark", f"{IMAGE_MARK} in turn {late[0] + 1} ({_NAMES[turns[late[0]].role]})")


def _ordered(turns: Sequence[Turn]) -> list[Turn]:
    """Human first, gpt last, one after the other."""
    runs = [(role, [turn.text or "" for turn in run]) for role, run in groupby(turns, lambda turn: turn.role)]
    ordered = [Turn(role, "\n".join(filter(str.strip, texts)) if len(texts) > 1 else texts[0]) for role, texts in runs]
    start = 1 if ordered[0].role == "assistant" else 0
    return ordered[start : len(ordered) - (ordered[-1].role == "user")]


def _marked(turns: Sequence[Turn], n_pictures: int) -> tuple[Turn, ...]:
    """One mark a picture; may leave a later turn empty that was nothing but a mark."""
    if not any(_mark_faults(turns, n_pictures)):
        return tuple(turns)
    bare = [(turn.text or "").replace(IMAGE_MARK, "").strip() for turn in turns]
    bare[:1] = [f"{IMAGE_MARK}\n" * n_pictures + text for text in bare[:1]]
    return tuple(Turn(turn.role, text) for turn, text in zip(turns, bare, strict=True))


def _without_empty(turns: Sequence[Turn]) -> list[Turn]:
    exchanges = zip(turns[::2], turns[1::2], strict=True)
    return [turn for both in exchanges if all((turn.text or "").strip() for turn in both) for turn in both]
