"""Marks replies by rule: pure functions of the reference answer to a question, and of a model's reply.

A reply is correct if it agrees with the reference on what the question is about: the names, the number or the position.
The rules are those of the questions about drawn scenes (examples/tiny), and no model takes part in them.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Measure = Literal["names", "number", "place", "color", "yes or no", "words", "none", "detail"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLACES = frozenset(("left", "right", "top", "bottom", "middle", "above", "below"))
DENIALS = frozenset(("no", "none", "not", "nothing", "cannot"))
COUNTS = {word: n for n, word in enumerate(NUMBERS)} | {"none": 0, "zero": 0, "nothing": 0}


def tokens(text: str) -> list[str]:
    """Returns the words in lower case. Hyphens and apostrophes inside a word are kept."""
    return re.findall(r"\w+(?:['-]\w+)*", text.lower().replace("’", "'"))


@dataclass(frozen=True)
class Vocabulary:
    """The words that rules look for. Two vocabularies are equal if they have the same digest."""

    digest: str
    things: Mapping[tuple[str, ...], str] = field(repr=False, compare=False)  # tokens of a name or its plural -> name
    colors: frozenset[str] = field(repr=False, compare=False)
    printed: frozenset[str] = field(repr=False, compare=False)  # words and numbers in pictures

    @classmethod
    def of(cls, things: Mapping[str, Iterable[str]], colors: Iterable[str], printed: Iterable[str]) -> "Vocabulary":
        """Returns a vocabulary. things: for each name of a thing, the forms in which texts have it."""
        forms = {tuple(tokens(form)): name for name, some in things.items() for form in some}
        values = sorted(colors), sorted(printed)
        digest = hashlib.sha256(json.dumps([sorted(forms.items()), *values]).encode()).hexdigest()
        return cls(digest, forms, frozenset(values[0]), frozenset(values[1]))

    def split(self, text: str) -> tuple[set[str], list[str]]:
        """Returns the names of things in a text, and its other words.

        Of overlapping names, the longest counts: "two hot dogs" does not contain a dog.
        """
        words, names, rest, i = tokens(text), set(), [], 0
        longest = max(map(len, self.things), default=0)
        while i < len(words):
            for size in range(longest, 0, -1):
                if name := self.things.get(tuple(words[i : i + size])):
                    names.add(name)
                    i += size
                    break
            else:
                rest.append(words[i])
                i += 1
        return names, rest

    def read(self, text: str) -> set[str]:
        """Returns the printed words and numbers that a text quotes, in capitals."""
        return {word for word in re.findall(r"[A-Z]+|\d+", text) if word in self.printed}


def without_printed(text: str) -> str:
    """Returns the text without printed words, because a printed CAT is not a cat."""
    return re.sub(r"\b[A-Z]{2,}\b", " ", text)


def number(words: list[str]) -> int | None:
    """Returns the first number, in digits or as a word. "no" and "none" count as 0."""
    return next((int(w) if w.isdecimal() else COUNTS[w] for w in words if w.isdecimal() or w in COUNTS), None)


def correct(measure: Measure, answer: str, reply: str, vocabulary: Vocabulary) -> bool:
    """Whether the reply agrees with the answer in what is measured."""
    (said, words), (true, right) = (vocabulary.split(without_printed(text)) for text in (reply, answer))
    match measure:
        case "names":
            return said == true if true else not said and bool(DENIALS & set(words))
        case "number":
            return number(words) == number(right)
        case "place":
            return PLACES & set(words) == PLACES & set(right)
        case "color":
            return vocabulary.colors & set(words) == vocabulary.colors & set(right)
        case "yes or no":
            return tokens(reply)[:1] == tokens(answer)[:1]
        case "words":
            read = vocabulary.read(reply)
            return read == vocabulary.read(answer) and (bool(read) or bool(DENIALS & set(words)))
        case "none":
            return said <= true and bool(DENIALS & set(words))
        case "detail":
            return said == true


def found_and_invented(answer: str, reply: str, vocabulary: Vocabulary) -> tuple[int, int, int]:
    """Returns counts for a description: things named correctly, things present, things named but not present."""
    said, true = (vocabulary.split(without_printed(text))[0] for text in (reply, answer))
    return len(said & true), len(true), len(said - true)


def mark(measure: Measure, answer: str, reply: str, vocabulary: Vocabulary) -> float:
    """Returns a mark from 0 to 1: for a description F1 of the things that it names, else 1 if it is correct."""
    if measure != "detail":
        return float(correct(measure, answer, reply, vocabulary))
    found, there, invented = found_and_invented(answer, reply, vocabulary)
    total = found + invented + there
    return 2 * found / total if total else 1.0
