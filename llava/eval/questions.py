"""The questions of a task as a file of a run, so that its answers can be judged without the benchmark's files."""

import json
from collections.abc import Sequence
from pathlib import Path

from llava.errors import DataError
from llava.eval.entries import Entry, JsonFile
from llava.eval.task import Question
from llava.tensors.atomic import replacing

QUESTIONS = "questions.jsonl"
_EXPECTED = "a question of this run"


def write_questions(file: Path, questions: Sequence[Question]) -> None:
    """Writes questions, one a line. Raises OSError."""
    values = (
        {
            "question_id": one.id,
            "text": one.text,
            "images": [str(path.absolute()) for path in one.images],
            "answer": one.answer,
            "groups": list(one.groups),
            "values": dict(one.values),
        }
        for one in questions
    )
    with replacing(file) as partial:
        partial.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def read_questions(file: Path) -> list[Question]:
    """Reads what `write_questions` wrote. Raises DataError."""
    return [_question(entry) for entry in JsonFile(file, _EXPECTED).entries()]


def _question(entry: Entry) -> Question:
    values = entry.value.get("values")
    if not isinstance(values, dict):
        raise DataError(f"{entry.where}: values is {values!r:.60}; expected {_EXPECTED}")
    return Question(
        id=entry.id("question_id"),
        text=entry.text("text"),
        images=tuple(map(Path, entry.texts("images"))),
        answer=entry.value.get("answer"),
        groups=tuple(entry.texts("groups")),
        values=values,
    )
