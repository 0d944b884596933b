"""The questions of a task as a file of a run, so that its answers can be judged without the benchmark's files."""

import json
from pathlib import Path

from llava.errors import DataError
from llava.eval.entries import Entry, JsonFile
from llava.eval.task import Question

QUESTIONS = "questions.jsonl"
_EXPECTED = "a question of this run"


def question_line(question: Question, prompt: str) -> str:
    """Returns the line of questions.jsonl for a question. Pictures have absolute paths."""
    value = {
        "question_id": question.id,
        "prompt": prompt,
        "text": question.text,
        "images": [str(path.absolute()) for path in question.images],
        "answer": question.answer,
        "groups": list(question.groups),
        "values": dict(question.values),
    }
    return json.dumps(value, ensure_ascii=False, default=str) + "\n"


def read_questions(file: Path) -> list[Question]:
    """Reads what is made of `question_line`. Raises DataError."""
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
