"""The questions of a task as a file of a run."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.eval.questions import question_line, read_questions
from llava.eval.task import Question

QUESTION = Question(
    id="7", text="What? <ü>\n", images=(Path("a b.png"),), answer=["x", 3], groups=("g",), values={"options": {"A": ""}}
)


def test_questions_are_read_as_they_were_written_with_absolute_paths(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    other = replace(QUESTION, id="8", images=())
    file.write_text(question_line(QUESTION, "prompt 7") + question_line(other, "prompt 8"))
    found = read_questions(file)
    assert found == [
        replace(QUESTION, images=(Path(os.getcwd()) / "a b.png",)),
        other,
    ]
    assert [json.loads(line)["prompt"] for line in file.read_text().splitlines()] == ["prompt 7", "prompt 8"]


def test_a_picture_without_a_file_is_written_as_its_digest(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(question_line(replace(QUESTION, images=(b"picture",)), "prompt"))
    assert json.loads(file.read_text())["images"] == [f"sha256:{hashlib.sha256(b'picture').hexdigest()}"]
    assert read_questions(file)[0].images == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": None}, "values is None"),
        ({"images": "a.png"}, "expected a list of texts"),
        ({"text": 3}, "expected a text"),
    ],
)
def test_a_damaged_line_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(json.loads(question_line(QUESTION, "prompt")) | change))
    with pytest.raises(DataError, match=message):
        read_questions(file)
