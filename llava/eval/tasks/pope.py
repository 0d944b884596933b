"""POPE: whether an object is in the picture, in three splits of 3,000 questions. arXiv:2305.10355.

Files and rules are those of LLaVA's scripts/v1_5/eval/pope.sh and eval_pope.py.
"""

from collections.abc import Mapping, Sequence

from llava.errors import DataError
from llava.eval.entries import Entry, by_key
from llava.eval.metrics import says_yes, share
from llava.eval.task import ALL, Answered, Data, Item, Question, Task, question

_SPLITS = ("random", "popular", "adversarial")
_QUESTIONS, _LABELS = "llava_pope_test.jsonl", "coco/coco_pope_{}.json"


class Pope(Task):
    """Sums: true yes, said yes, meant yes, right, questions."""

    name = "pope"
    title = "POPE"
    metric = "F1 of yes, mean of the splits (%)"
    folder = "pope"
    files: Mapping[str, str] = {
        _QUESTIONS: "questions, with question_id, image, text and category",
        _LABELS.format("{random,popular,adversarial}"): "labels, in the order of the questions of the category",
        "val2014/": "pictures of COCO val2014",
    }

    def questions(self, data: Data) -> list[Question]:
        """Returns the questions in the order of the file. Raises DataError."""
        file = data.json(_QUESTIONS, self.files[_QUESTIONS])
        entries = list(by_key(file.entries(), lambda one: one.id("question_id")).values())
        labels = {split: iter(self._labels(data, split)) for split in dict.fromkeys(_split(one) for one in entries)}
        found = [self._question(one, next(labels[_split(one)], None), data) for one in entries]
        for split, rest in labels.items():
            if next(rest, None):
                raise DataError(f"{file.path}: has fewer questions of the category {split} than there are labels")
        return found

    def _labels(self, data: Data, split: str) -> list[Entry]:
        return list(data.json(_LABELS.format(split), "the labels of this category").entries())

    def _question(self, entry: Entry, label: Entry | None, data: Data) -> Question:
        text, split = entry.text("text"), _split(entry)
        if label is None or label.text("label") not in ("yes", "no") or not text.startswith(label.text("text")):
            raise DataError(
                f"{entry.where}: {_LABELS.format(split)} has no label for it; expected as many labels as questions, in "
                "the same order"
            )
        return question(entry, data, "val2014", answer=label.text("label"), groups=(split,))

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns one item per question."""
        return [_item(one) for one in answered]

    def figure(self, sums: Sequence[float]) -> float | None:
        """Returns F1."""
        true_yes, said, meant, *_ = sums
        return share(2 * true_yes, said + meant)

    def headline(self, figures: Mapping[str, float | None]) -> float | None:
        """Returns the mean of the splits, which papers report."""
        values = [value for group, value in figures.items() if group != ALL and value is not None]
        return sum(values) / len(values) if values else None

    def details(self, sums: Sequence[float]) -> Mapping[str, float | None]:
        """Returns the other figures of eval_pope.py, over all splits."""
        true_yes, said, meant, right, n = sums
        return {
            "accuracy": share(right, n),
            "precision": share(true_yes, said),
            "recall": share(true_yes, meant),
            "yes ratio": share(said, n),
        }


def _split(entry: Entry) -> str:
    split = entry.text("category")
    if split not in _SPLITS:
        raise DataError(f"{entry.where}: category is {split!r:.40}; expected one of {', '.join(_SPLITS)}")
    return split


def _item(one: Answered) -> Item:
    said, meant = says_yes(one.text), one.question.answer == "yes"
    sums = (float(said and meant), float(said), float(meant), float(said == meant), 1.0)
    return Item(id=one.question.id, sums=sums, groups=one.question.groups)
