"""The words of the drawn world, by which replies are marked (`llava/eval/marks.py`)."""

from collections.abc import Iterable

from examples.tiny.glyphs import Entry
from examples.tiny.paint import COLORS, WORDS
from examples.tiny.things import many
from llava.eval.marks import Vocabulary


def forms(entries: Iterable[Entry]) -> dict[str, list[str]]:
    """The names of things, each with the forms in which texts have it: the name, and its plural if it has one."""
    return {entry.name: [form for form in (entry.name, many(entry.name)) if form] for entry in entries}


def vocabulary(entries: Iterable[Entry]) -> Vocabulary:
    return Vocabulary.of(forms(entries), COLORS, WORDS)
