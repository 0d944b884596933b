"""TextVQA: questions about text in pictures, which come with tokens of an OCR system. arXiv:1904.08920.

Files and rules are those of LLaVA's scripts/v1_5/eval/textvqa.sh and eval_textvqa.py. There, the id of a question is
that of its picture, which several questions share; the ids here are numbered.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from llava.errors import DataError
from llava.eval.entries import Entry
from llava.eval.metrics import textvqa_accuracy
from llava.eval.task import Answered, Data, Item, Question, Task, question

_QUESTIONS, _LABELS = "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"
_IN_ONE_LINE = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
_OCR = "Reference OCR token: "


class TextVqa(Task):
    """Sums: agreement with the annotators from 0 to 1, questions."""

    name = "textvqa"
    title = "TextVQA"
    metric = "VQA accuracy (%)"
    folder = "textvqa"
    files: Mapping[str, str] = {
        _QUESTIONS: "questions with OCR tokens: question_id (of the picture), image and text",
        _LABELS: "TextVQA's questions in data, with image_id, question and answers",
        "train_images/": "pictures of TextVQA",
    }

    def questions(self, data: Data) -> list[Question]:
        """Returns the questions in the order of the file. Raises DataError."""
        labels = {
            (entry.id("image_id"), entry.text("question").lower()): entry.texts("answers")
            for entry in data.json(_LABELS, self.files[_LABELS]).object().parts("data")
        }  # as in the original, the last one counts if a question occurs twice
        seen: Counter[str] = Counter()
        found = []
        for entry in data.json(_QUESTIONS, self.files[_QUESTIONS]).entries():
            picture = entry.id("question_id")
            seen[picture] += 1
            id, values = f"{picture}:{seen[picture]}", {"picture": entry.value["question_id"]}
            answers = _answers(entry, picture, labels)
            found.append(question(entry, data, "train_images", id=id, answer=answers, values=values))
        return found

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns one item per question."""
        return [one.item(textvqa_accuracy(one.text, one.question.answer), 1) for one in answered]

    def submission(self, answered: Sequence[Answered], data: Data) -> Mapping[str, bytes]:
        """Returns the answers under the original's ids, which eval_textvqa.py reads."""
        lines = [
            {"question_id": one.question.values["picture"], "prompt": self.prompt(one.question), "text": one.text}
            for one in answered
        ]
        return {"eval_textvqa.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()}


def _answers(entry: Entry, picture: str, labels: Mapping[tuple[str, str], list[str]]) -> list[str]:
    key = (picture, _asked(entry))
    if key not in labels:
        raise DataError(
            f"{entry.where}: {_LABELS} has no question {key[1]!r:.60} about picture {picture!r:.40}; expected its "
            "answers"
        )
    return labels[key]


def _asked(entry: Entry) -> str:
    """Returns the question without OCR tokens and instructions, in lower case."""
    text = entry.text("text")
    lines = text.split("\n")
    if text.startswith("OCR tokens: ") and (found := _IN_ONE_LINE.search(text)):
        return found[1].lower()
    if _OCR in text and len(lines) == 3:
        return lines[text.startswith(_OCR)].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise DataError(
        f"{entry.where}: text is {text!r:.60}; expected a question, OCR tokens and an instruction, in lines"
    )
