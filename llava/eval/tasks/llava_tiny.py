"""Drawn scenes, such as the included llava-tiny was trained on: conversation, descriptions, and complex questions.

The files are part of this package, and written by examples/tiny/bench.py. No judge is asked: replies are marked by
rule, so that the figures of a model are the same in every run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.entries import Entry, JsonFile
from llava.eval.marks import MEASURES, Vocabulary, found_and_invented, mark
from llava.eval.metrics import share
from llava.eval.task import Answered, Data, Item, Question, Task

CATEGORIES = ("conv", "detail", "complex")
_QUESTIONS, _VOCABULARY, _IMAGES = "questions.jsonl", "vocabulary.json", "images"


class LlavaTiny(Task):
    """Sums: marks; in descriptions, things found, things there, things invented; questions."""

    name = "llava-tiny"
    title = "drawn scenes"
    metric = "marks, mean of conv, detail and complex (%)"
    folder = "llava-tiny"
    files: Mapping[str, str] = {
        _QUESTIONS: "questions, with question_id, image, text, category, kind, measure and answer",
        _VOCABULARY: "names of things and their forms, colors, and words printed in pictures",
        f"{_IMAGES}/": "pictures of the scenes",
    }
    included = Path(__file__).parent.parent / "data"
    max_new_tokens = 160

    def questions(self, data: Data) -> list[Question]:
        """Returns the questions in the order of the file. Raises DataError."""
        file = data.file(_QUESTIONS, self.files[_QUESTIONS])
        vocabulary = read_vocabulary(data.file(_VOCABULARY, self.files[_VOCABULARY]))
        return [_question(entry, data, vocabulary) for entry in JsonFile(file, "a question").entries()]

    def judge(self, question: Question, reply: str) -> float:
        """Returns the mark of a reply, from 0 to 1."""
        return mark(question.values["measure"], question.answer, reply, question.values["vocabulary"])

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns one item per question."""
        return [self._item(one.question, one.text) for one in answered]

    def _item(self, question: Question, reply: str) -> Item:
        counts = (0, 0, 0)
        if question.values["measure"] == "detail":
            counts = found_and_invented(question.answer, reply, question.values["vocabulary"])
        sums = (self.judge(question, reply), *map(float, counts), 1.0)
        return Item(id=question.id, sums=sums, groups=question.groups)

    def headline(self, figures: Mapping[str, float | None]) -> float | None:
        """Returns the mean of the categories, each of which counts the same."""
        values = [value for name in CATEGORIES if (value := figures.get(name)) is not None]
        return sum(values) / len(values) if values else None

    def details(self, sums: Sequence[float]) -> Mapping[str, float | None]:
        """Returns shares of things in all descriptions: of those there, and of those named."""
        _, found, there, invented, _ = sums
        return {"things found": share(found, there), "things invented": share(invented, found + invented)}


def read_vocabulary(file: Path) -> Vocabulary:
    """Reads vocabulary.json. Raises DataError."""
    expected = "an object with things (lists of forms by name), colors and printed (lists of words)"
    value = JsonFile(file, expected).value()
    lists = [value.get("colors"), value.get("printed")] if isinstance(value, dict) else [None]
    things = value.get("things") if isinstance(value, dict) else None
    if not isinstance(things, dict) or not all(map(_is_list_of_texts, [*lists, *things.values()])):
        raise DataError(f"{file}: expected {expected}")
    return Vocabulary.of(things, *lists)


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _question(entry: Entry, data: Data, vocabulary: Vocabulary) -> Question:
    category, kind = _one_of(entry, "category", CATEGORIES), entry.text("kind")
    return Question(
        id=entry.id("question_id"),
        text=entry.text("text"),
        images=(data.image(entry.text("image"), _IMAGES),),
        answer=entry.text("answer"),
        groups=tuple(dict.fromkeys((category, kind))),
        values={"measure": _one_of(entry, "measure", MEASURES), "vocabulary": vocabulary},
    )


def _one_of(entry: Entry, key: str, allowed: Sequence[str]) -> str:
    value = entry.text(key)
    if value not in allowed:
        raise DataError(f"{entry.where}: {key} is {value!r:.40}; expected one of {', '.join(allowed)}")
    return value
