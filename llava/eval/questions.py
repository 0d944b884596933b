"""The questions of a task as a file of a run: its answers can then be judged and shown without the benchmark."""

import hashlib
import json
from pathlib import Path

from llava.errors import DataError
from llava.eval.entries import Entry, JsonFile
from llava.eval.task import Question

QUESTIONS = "questions.jsonl"
DIGEST = "sha256:"  # of a picture without a file
_EXPECTED = "a question of this run"


def question_line(question: Question, prompt: str) -> str:
    """Returns the line of questions.jsonl for a question.

    Pictures have absolute paths. Those that are part of the benchmark's file, and so have none, have a digest.
    """
    value = {
        "question_id": question.id,
        "prompt": prompt,
        "text": question.text,
        "images": [_image(image) for image in question.images],
        "answer": question.answer,
        "groups": list(question.groups),
        "values": dict(question.values),
    }
    return json.dumps(value, ensure_ascii=False, default=str) + "\n"


def _image(image: Path | bytes) -> str:
    return str(image.absolute()) if isinstance(image, Path) else f"{DIGEST}{hashlib.sha256(image).hexdigest()}"


def read_questions(file: Path) -> list[Question]:
    """Reads what is made of `question_line`, except pictures without a file. Raises DataError."""
    return [_question(entry) for entry in JsonFile(file, _EXPECTED).entries()]


def _question(entry: Entry) -> Question:
    values = entry.value.get("values")
    if not isinstance(values, dict):
        raise DataError(f"{entry.where}: values is {values!r:.60}; expected {_EXPECTED}")
    return Question(
        id=entry.id("question_id"),
        text=entry.text("text"),
        images=tuple(Path(image) for image in _texts(entry, "images") if not image.startswith(DIGEST)),
        answer=entry.value.get("answer"),
        groups=tuple(_texts(entry, "groups")),
        values=values,
    )


def _texts(entry: Entry, key: str) -> list[str]:
    return [] if entry.value.get(key) == [] else entry.texts(key)
