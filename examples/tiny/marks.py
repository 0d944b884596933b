"""Grades replies: pure functions of a question with its correct answer, and of a model's reply.

A reply is correct if it agrees with the answer on what the question is about: the names, the number or the position.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from examples.tiny.paint import COLORS, WORDS
from examples.tiny.questions import Turn
from examples.tiny.things import NUMBERS, many

PLACES = frozenset(("left", "right", "top", "bottom", "middle", "above", "below"))
DENIALS = frozenset(("no", "none", "not", "nothing", "cannot"))
PRINTED = frozenset(WORDS)
COUNTS = {word: n for n, word in enumerate(NUMBERS)} | {"none": 0, "zero": 0, "nothing": 0}


def tokens(text: str) -> list[str]:
    """Lower-case words. Hyphens and apostrophes inside a word are kept."""
    return re.findall(r"\w+(?:['-]\w+)*", text.lower().replace("’", "'"))


@dataclass
class Names:
    """Finds the names of things in a text. Only whole names count: "two hot dogs" does not contain a dog."""

    of: dict[tuple[str, ...], str] = field(default_factory=dict)  # tokens of a name or its plural -> the name

    @classmethod
    def of_things(cls, names: Iterable[str]) -> "Names":
        found = cls()
        for name in names:
            for form in (name, many(name)):
                if form:
                    found.of[tuple(tokens(form))] = name
        return found

    def split(self, text: str) -> tuple[set[str], list[str]]:
        """The names in a text, and its other words. Of overlapping names, the longest counts."""
        words, names, rest, i = tokens(text), set(), [], 0
        longest = max(map(len, self.of), default=0)
        while i < len(words):
            for size in range(longest, 0, -1):
                if name := self.of.get(tuple(words[i : i + size])):
                    names.add(name)
                    i += size
                    break
            else:
                rest.append(words[i])
                i += 1
        return names, rest


def printed(text: str) -> set[str]:
    """The printed words and numbers in a text, which are in capitals."""
    return {word for word in re.findall(r"[A-Z]+|\d+", text) if word in PRINTED}


def without_printed(text: str) -> str:
    """The text without printed words, because a printed CAT is not a cat."""
    return re.sub(r"\b[A-Z]{2,}\b", " ", text)


def number(words: list[str]) -> int | None:
    """The first number, in digits or as a word. "no" and "none" count as 0."""
    return next((int(w) if w.isdecimal() else COUNTS[w] for w in words if w.isdecimal() or w in COUNTS), None)


def correct(turn: Turn, reply: str, names: Names) -> bool:
    """Whether the reply agrees with the answer."""
    (said, words), (true, right) = (names.split(without_printed(text)) for text in (reply, turn.answer))
    match turn.measure:
        case "names":
            return said == true if true else not said and bool(DENIALS & set(words))
        case "number":
            return number(words) == number(right)
        case "place":
            return PLACES & set(words) == PLACES & set(right)
        case "color":
            return set(COLORS) & set(words) == set(COLORS) & set(right)
        case "yes or no":
            return tokens(reply)[:1] == tokens(turn.answer)[:1]
        case "words":
            return printed(reply) == printed(turn.answer) and (bool(printed(reply)) or bool(DENIALS & set(words)))
        case "none":
            return said <= true and bool(DENIALS & set(words))
        case "detail":
            return said == true


def found_and_invented(turn: Turn, reply: str, names: Names) -> tuple[int, int, int]:
    """Counts for a description: things named correctly, things present, and things named but not present."""
    said, true = (names.split(without_printed(text))[0] for text in (reply, turn.answer))
    return len(said & true), len(true), len(said - true)
