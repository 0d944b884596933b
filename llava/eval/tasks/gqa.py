"""GQA: questions about scene graphs, with answers of a word or two. arXiv:1902.09506.

Files and rules are those of LLaVA's scripts/v1_5/eval/gqa.sh, convert_gqa_for_eval.py and GQA's eval.py.
"""

import json
from collections.abc import Mapping, Sequence

from llava.errors import DataError
from llava.eval.entries import Entry, by_key
from llava.eval.metrics import gqa_correct, gqa_prediction
from llava.eval.task import Answered, Data, Item, Question, Task, question

_QUESTIONS, _LABELS = "llava_gqa_testdev_balanced.jsonl", "data/testdev_balanced_questions.json"


class Gqa(Task):
    """Sums: right, questions."""

    name = "gqa"
    title = "GQA"
    metric = "exact answers (%)"
    folder = "gqa"
    files: Mapping[str, str] = {
        _QUESTIONS: "questions, with question_id, image and text",
        _LABELS: "GQA's questions by id, with answer and types.structural",
        "data/images/": "pictures of GQA",
    }

    def questions(self, data: Data) -> list[Question]:
        """Returns the questions in the order of the file. Raises DataError."""
        entries = by_key(data.json(_QUESTIONS, self.files[_QUESTIONS]).entries(), lambda one: one.id("question_id"))
        labels = data.json(_LABELS, self.files[_LABELS]).object()
        return [self._question(entry, id, labels, data) for id, entry in entries.items()]

    def _question(self, entry: Entry, id: str, labels: Entry, data: Data) -> Question:
        if id not in labels.value:
            raise DataError(f"{entry.where}: question_id is {id!r:.40}, which {labels.where} lacks; expected its label")
        label = labels.part(id)
        kind = label.part("types").text("structural")
        groups = ("open" if kind == "query" else "binary", kind)
        return question(entry, data, "data/images", answer=label.text("answer"), groups=groups)

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns one item per question."""
        return [one.item(gqa_correct(one.text, one.question.answer), 1) for one in answered]

    def submission(self, answered: Sequence[Answered], data: Data) -> Mapping[str, bytes]:
        """Returns the predictions that GQA's eval.py reads."""
        found = [{"questionId": one.question.id, "prediction": gqa_prediction(one.text)} for one in answered]
        return {"testdev_balanced_predictions.json": json.dumps(found).encode()}
