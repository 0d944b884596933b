"""VizWiz: questions of blind people about their own photos, which may be unanswerable. arXiv:1802.08218.

Test is that of LLaVA's scripts/v1_5/eval/vizwiz.sh and convert_vizwiz_for_submission.py; its answers are not public.
Val has the official annotations, and the prompt of test.
"""

import json
from collections.abc import Mapping, Sequence

from llava.eval.entries import Entry, by_key
from llava.eval.metrics import m4c_normalize
from llava.eval.task import Answered, Data, Item, Question, Task, question
from llava.eval.tasks.vqav2 import SHORT, agreement, annotators, without_labels

_TEST, _VAL = "llava_test.jsonl", "val.json"
_SUFFIX = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"


class VizWiz(Task):
    """Sums: agreement with the annotators from 0 to 1, questions."""

    name = "vizwiz"
    title = "VizWiz"
    metric = "VQA accuracy (%)"
    folder = "vizwiz"
    splits = ("test", "val")
    files: Mapping[str, str] = {
        _TEST: "of test: questions, with question_id, image and text",
        "test/": "of test: pictures of VizWiz",
        _VAL: "of val: the official annotations",
        "val/": "of val: pictures of VizWiz",
    }

    def questions(self, data: Data) -> list[Question]:
        """Returns the questions in the order of the file. Raises DataError."""
        if data.split == "val":
            entries = by_key(data.json(_VAL, self.files[_VAL]).entries(), lambda one: one.text("image"))
            return [_labelled(entry, data) for entry in entries.values()]
        entries = by_key(data.json(_TEST, self.files[_TEST]).entries(), lambda one: one.id("question_id"))
        return [question(one, data, "test", values={"image": one.text("image")}) for one in entries.values()]

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns one item per question; none without labels."""
        return agreement(answered)

    def submission(self, answered: Sequence[Answered], data: Data) -> Mapping[str, bytes]:
        """Returns submission.json of test."""
        if data.split != "test":
            return {}
        found = [{"image": one.question.values["image"], "answer": m4c_normalize(one.text)} for one in answered]
        return {"submission.json": json.dumps(found).encode()}

    def note(self, answered: Sequence[Answered]) -> str:
        """Returns why there is no figure, if there is none."""
        where = "https://eval.ai/web/challenges/challenge-page/2185"
        return without_labels(answered, "test of VizWiz", f"submission.json, for {where}")


def _labelled(entry: Entry, data: Data) -> Question:
    name = entry.text("image")
    return Question(
        id=name,
        text=f"{entry.text('question')}\n{_SUFFIX}",
        images=(data.image(name, "val"),),
        answer=annotators(entry),
        groups=(entry.text("answer_type"),),
    )
