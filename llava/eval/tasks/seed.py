"""SEED-Bench: questions with four options, about pictures and about frames of videos. arXiv:2307.16125.

Files and rules are those of LLaVA's scripts/v1_5/eval/seed.sh and convert_seed_for_submission.py.
"""

import json
import logging
from collections.abc import Mapping, Sequence

from llava.errors import DataError, counted
from llava.eval.entries import Entry, by_key
from llava.eval.task import Answered, Data, Item, Question, Task, question

log = logging.getLogger(__name__)
_QUESTIONS, _LABELS = "llava-seed-bench.jsonl", "SEED-Bench.json"
_KINDS, _LETTERS = ("image", "video"), ("A", "B", "C", "D")


class Seed(Task):
    """Sums: right, questions."""

    name = "seed"
    title = "SEED-Bench"
    metric = "right letters (%)"
    folder = "seed_bench"
    splits = ("image", "all")
    files: Mapping[str, str] = {
        _QUESTIONS: "questions, with question_id, image and text",
        _LABELS: "SEED-Bench's questions, with answer, data_type and question_type_id, and its question_type",
        "SEED-Bench-image/": "pictures of SEED-Bench",
        "SEED-Bench-video-image/": "of all: the frame in the middle of each video",
    }

    def questions(self, data: Data) -> list[Question]:
        """Returns the questions in the order of the file, by default those about pictures. Raises DataError."""
        file = data.json(_LABELS, self.files[_LABELS]).object()
        types, labels = _types(file), by_key(file.parts("questions"), _id)
        entries = by_key(data.json(_QUESTIONS, self.files[_QUESTIONS]).entries(), _id)
        found = [_question(entry, labels.get(id), types, data) for id, entry in entries.items()]
        if data.split == "all":
            return found
        pictures = [one for one in found if "image" in one.groups]
        if n := len(found) - len(pictures):
            log.warning("seed: %s about videos left out; --split all asks them, too", counted(n, "question"))
        return pictures

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns one item per question. As in the original, the reply must be the letter and nothing else."""
        return [one.item(one.text == one.question.answer, 1) for one in answered]

    def submission(self, answered: Sequence[Answered], data: Data) -> Mapping[str, bytes]:
        """Returns the predictions for SEED-Bench's leaderboard."""
        lines = [{"question_id": one.question.values["id"], "prediction": one.text} for one in answered]
        return {"submission.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()}


def _id(entry: Entry) -> str:
    return entry.id("question_id")


def _types(file: Entry) -> dict[str, str]:
    """Returns the name of each type of questions by its id."""
    types = file.part("question_type")
    return {types.id(name): name for name in types.value}


def _question(entry: Entry, label: Entry | None, types: Mapping[str, str], data: Data) -> Question:
    if label is None:
        raise DataError(f"{entry.where}: question_id is {_id(entry)!r:.40}, which {_LABELS} lacks; expected its label")
    kind, type, answer = label.text("data_type"), label.id("question_type_id"), label.text("answer")
    if kind not in _KINDS or type not in types or answer not in _LETTERS:
        raise DataError(
            f"{label.where}: data_type is {kind!r:.40}, question_type_id {type!r:.40}, answer {answer!r:.40}; expected "
            "image or video, an id in question_type, and a letter from A to D"
        )
    values = {"id": label.value["question_id"]}
    return question(entry, data, "", answer=answer, groups=(kind, types[type]), values=values)
