"""VQAv2: open questions about pictures of COCO, each with the answers of ten annotators. arXiv:1612.00837.

Test-dev is that of LLaVA's scripts/v1_5/eval/vqav2.sh and convert_vqav2_for_submission.py; its answers are not public.
Val has the official questions, and the prompt of test-dev.
"""

import json
from collections.abc import Mapping, Sequence

from llava.errors import DataError
from llava.eval.entries import Entry, by_key
from llava.eval.metrics import m4c_normalize, vqa_accuracy
from llava.eval.task import Answered, Data, Item, Question, Task, question

_TEST_DEV, _TEST = "llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl"
_VAL, _LABELS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
SHORT = "Answer the question using a single word or phrase."


class Vqav2(Task):
    """Sums: agreement with the annotators from 0 to 1, questions."""

    name = "vqav2"
    title = "VQAv2"
    metric = "VQA accuracy (%)"
    folder = "vqav2"
    splits = ("test-dev", "val")
    files: Mapping[str, str] = {
        _TEST_DEV: "of test-dev: questions, with question_id, image and text",
        _TEST: "of test-dev: the questions of the whole test set, which a submission must name",
        "test2015/": "of test-dev: pictures of COCO test2015",
        _VAL: "of val: the official questions",
        _LABELS: "of val: the official annotations",
        "val2014/": "of val: pictures of COCO val2014",
    }

    def questions(self, data: Data) -> list[Question]:
        """Returns the questions in the order of the file. Raises DataError."""
        if data.split == "val":
            return self._val(data)
        entries = by_key(data.json(_TEST_DEV, self.files[_TEST_DEV]).entries(), _id)
        whole = self._whole_test(data)  # which fails now rather than after the questions have been asked
        if lost := [entry for id, entry in entries.items() if id not in whole]:
            raise DataError(f"{lost[0].where}: its question_id is not in {_TEST}; expected a part of that file")
        return [question(entry, data, "test2015") for entry in entries.values()]

    def _val(self, data: Data) -> list[Question]:
        asked = data.json(_VAL, self.files[_VAL]).object().parts("questions")
        labels = by_key(data.json(_LABELS, self.files[_LABELS]).object().parts("annotations"), _id)
        return [_labelled(entry, id, labels, data) for id, entry in by_key(asked, _id).items()]

    def _whole_test(self, data: Data) -> dict[str, Entry]:
        return by_key(data.json(_TEST, self.files[_TEST]).entries(), _id)

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns one item per question; none without labels."""
        return agreement(answered)

    def submission(self, answered: Sequence[Answered], data: Data) -> Mapping[str, bytes]:
        """Returns submission.json of test-dev, which has an empty answer to the other questions of the test set."""
        if data.split != "test-dev":
            return {}
        texts = {one.question.id: m4c_normalize(one.text) for one in answered}
        found = [
            {"question_id": entry.value["question_id"], "answer": texts.get(id, "")}
            for id, entry in self._whole_test(data).items()
        ]
        return {"submission.json": json.dumps(found).encode()}

    def note(self, answered: Sequence[Answered]) -> str:
        """Returns why there is no figure, if there is none."""
        where = "https://eval.ai/web/challenges/challenge-page/830"
        return without_labels(answered, "test-dev of VQAv2", f"submission.json, for {where}")


def _id(entry: Entry) -> str:
    return entry.id("question_id")


def _labelled(entry: Entry, id: str, labels: Mapping[str, Entry], data: Data) -> Question:
    if id not in labels:
        raise DataError(f"{entry.where}: question_id is {id}, which {_LABELS} lacks; expected its annotation")
    image = entry.value.get("image_id")
    if isinstance(image, bool) or not isinstance(image, int):
        raise DataError(f"{entry.where}: image_id is {image!r:.60}; expected a number of COCO")
    return Question(
        id=id,
        numbered=isinstance(entry.value["question_id"], int),
        text=f"{entry.text('question')}\n{SHORT}",
        images=(data.image(f"COCO_val2014_{image:012d}.jpg", "val2014"),),
        answer=annotators(labels[id]),
        groups=(labels[id].text("answer_type"),),
    )


def annotators(entry: Entry) -> list[str]:
    """Returns the answers of the annotators of a question. Raises DataError."""
    return [one.text("answer") for one in entry.parts("answers")]


def agreement(answered: Sequence[Answered]) -> list[Item]:
    """Returns an item per question with labels: VQA accuracy of the answer as LLaVA submits it."""
    return [
        one.item(vqa_accuracy(m4c_normalize(one.text), one.question.answer), 1)
        for one in answered
        if one.question.answer is not None
    ]


def without_labels(answered: Sequence[Answered], what: str, where: str) -> str:
    """Returns a note if there are no labels to compare the replies with."""
    if not answered or any(one.question.answer is not None for one in answered):
        return ""
    return f"no figure, since the labels of {what} are not public; the answers are in {where}"
