"""Markdown in which a model's words stay words: no markup, no links, no HTML, and no end of a table's cell."""

import re
from collections.abc import Iterable, Sequence
from itertools import chain

from llava.errors import printable

_MARKUP = re.compile(r"[\\`*_{}\[\]<>|~&#$@^!]|(?<=www)\.|:(?=//)")
_ALIGN = {"left": "---", "right": "--:"}


def words(text: str) -> str:
    """Returns a text in one line, as part of a paragraph or of a table's cell."""
    return _MARKUP.sub(r"\\\g<0>", printable(text.strip().replace("\n", " ⏎ ")))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Returns a table of cells that are Markdown already. left: how many columns have texts, before the numbers."""
    align = [_ALIGN["left" if i < left else "right"] for i in range(len(columns))]
    return "".join(f"| {' | '.join(row)} |\n" for row in chain((columns, align), rows))


def block(text: str) -> str:
    """Returns a text as it is, in a block that no line of it can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    shown = "\n".join(map(printable, text.split("\n")))
    return f"{fence}text\n{shown}\n{fence}\n"


def figure(value: float | None, *, sign: bool = False) -> str:
    """Returns a figure with two decimals, a count without, or a dash. sign: also of one above 0."""
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if value is None else f"{value:{'+' if sign else ''},.2f}"
