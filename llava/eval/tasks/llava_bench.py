"""LLaVA-Bench: free answers about pictures, which a judge compares with those of a text-only GPT-4. arXiv:2304.08485.

Files, prompts and rules are those of LLaVA's model_vqa.py, eval_gpt_review_bench.py (In-the-Wild) and
eval_gpt_review_visual.py (COCO).
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from llava.errors import DataError, counted
from llava.eval.entries import Entry, JsonFile
from llava.eval.metrics import share
from llava.eval.reviews import UNPARSED
from llava.eval.task import Answered, Data, Item, Judged, Question

_CATEGORIES = ("conv", "detail", "complex")
_RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with {}\nPlease rate the helpfulness, relevance, accuracy, level of details of their "
    "responses. Each assistant receives an overall score on a scale of 1 to 10, where a higher score indicates better "
    "overall performance.\nPlease first output a single line containing only two values indicating the scores for "
    "Assistant 1 and 2, respectively. The two scores are separated by a space.\nIn the subsequent line, please provide "
    "a comprehensive explanation of your evaluation, avoiding any potential bias and ensuring that the order in which "
    "the responses were presented does not affect your judgment."
)
_BOXES = (
    "five descriptive sentences describing the same image and the bounding box coordinates of each object in the "
    "scene. These coordinates are in the form of bounding boxes, represented as (x1, y1, x2, y2) with floating numbers "
    "ranging from 0 to 1. These values correspond to the top left x, top left y, bottom right x, and bottom right y. "
)
_SENTENCES = "a few sentences describing the image. "


class Sums(NamedTuple):
    """What a question adds. Its scores are means over the judge's verdicts on it."""

    candidate: float  # of verdicts with scores
    reference: float
    n: float  # questions that have one
    published_candidate: float  # of all verdicts, with -1 for those without scores
    published_reference: float
    published_n: float
    unparsed: float  # verdicts without scores
    n_repeated: float  # questions with several verdicts with scores; the variances of their means follow
    candidate_variance: float
    reference_variance: float
    covariance: float


class LlavaBench(Judged):
    """A set of questions. The figure is the pooled ratio of the scores, as in summarize_gpt_review.py, unrounded."""

    metric = "score in % of the reference answers'"
    max_new_tokens = 1024
    rule: str  # what the judge is asked to do
    pictures: str  # folder of the pictures in the original's layout
    key: str  # of a category in the original's rule.json

    def questions(self, data: Data) -> list[Question]:
        """Returns the questions in the order of the file.

        Raises DataError if one has no reference answer, or its picture no description for the judge.
        """
        questions, answers, contexts = list(self.files)[:3]
        asked = _by("question_id", self._entries(data, questions)).values()
        references = _by("question_id", self._entries(data, answers))
        shown = {image: self.context(one) for image, one in _by("image", self._entries(data, contexts)).items()}
        _check_all(asked, references, "question_id", f"{data.folder / answers}: has no reference answer to")
        _check_all(asked, shown, "image", f"{data.folder / contexts}: has no description of the picture of")
        return [self._question(one, references[one.id("question_id")], shown, data) for one in asked]

    def _entries(self, data: Data, name: str) -> list[Entry]:
        content = self.files[name]
        entries = list(JsonFile(data.file(name, content), content).entries())
        if not entries:
            raise DataError(f"{data.folder / name}: is empty; expected {content}")
        return entries

    def _question(self, entry: Entry, reference: Entry, shown: Mapping[str, str], data: Data) -> Question:
        category, id = entry.text("category"), entry.id("question_id")
        if category not in _CATEGORIES:
            raise DataError(f"{entry.where}: category is {category!r:.40}; expected one of {', '.join(_CATEGORIES)}")
        return Question(
            id=id,
            numbered=isinstance(entry.value["question_id"], int),
            text=entry.text("text"),
            images=(self.picture(entry.text("image"), data),),
            answer=reference.text("text"),
            groups=(category,),
            values={
                "context": shown[entry.text("image")],
                "reference_id": reference.value.get("answer_id", id),
                "category": self.key.format(category),
            },
        )

    def picture(self, name: str, data: Data) -> Path:
        """Returns the path of a picture."""
        return data.image(name, self.pictures)

    @abstractmethod
    def context(self, entry: Entry) -> str:
        """Returns what the judge reads instead of the picture. Raises DataError."""

    def judge_prompt(self, question: Question, reply: str) -> str:
        """Returns the user's message to the judge."""
        return (
            f"[Context]\n{question.values['context']}\n\n[Question]\n{question.text}\n\n"
            f"[Assistant 1]\n{question.answer}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{reply}\n\n[End of Assistant 2]\n\n[System]\n{self.rule}\n\n"
        )

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns one item per question."""
        return [Item(id=one.question.id, sums=_sums(one), groups=one.question.groups) for one in answered]

    def figure(self, sums: Sequence[float]) -> float | None:
        """Returns the ratio of the scores."""
        return share(sums[0], sums[1])

    def details(self, sums: Sequence[float]) -> Mapping[str, float | None]:
        """Returns mean scores times 10, the figures with unparsed verdicts, and the error that the judge adds."""
        one = Sums(*sums)
        return {
            "10·reference": _ten(one.reference, one.n),
            "10·candidate": _ten(one.candidate, one.n),
            "standard error of the judge": _standard_error(one),
            "unparsed verdicts": int(one.unparsed),
            "as published": share(one.published_candidate, one.published_reference),
            "10·reference as published": _ten(one.published_reference, one.published_n),
            "10·candidate as published": _ten(one.published_candidate, one.published_n),
        }


def _by(key: str, entries: Sequence[Entry]) -> dict[str, Entry]:
    found = {one.id(key): one for one in entries}
    if len(found) < len(entries):
        repeated = next(one for one in entries if found[one.id(key)] is not one)
        raise DataError(f"{repeated.where}: {key} {repeated.id(key)} is there again in a later line; expected it once")
    return found


def _check_all(entries: Iterable[Entry], known: Mapping[str, Any], key: str, problem: str) -> None:
    missing = [one.id("question_id") for one in entries if one.id(key) not in known]
    if missing:
        named = ", ".join(missing[:5]) + ", …" * (len(missing) > 5)
        raise DataError(f"{problem} {counted(len(missing), 'question')} (question_id {named})")


def _sums(one: Answered) -> Sums:
    pairs = [pair for pair in one.verdicts if pair != UNPARSED]
    references, candidates = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    repeated = len(pairs) > 1
    return Sums(
        candidate=fmean(candidates) if pairs else 0.0,
        reference=fmean(references) if pairs else 0.0,
        n=float(bool(pairs)),
        published_candidate=fmean(pair[1] for pair in one.verdicts),
        published_reference=fmean(pair[0] for pair in one.verdicts),
        published_n=1.0,
        unparsed=float(len(one.verdicts) - len(pairs)),
        n_repeated=float(repeated),
        candidate_variance=_covariance(candidates, candidates) if repeated else 0.0,
        reference_variance=_covariance(references, references) if repeated else 0.0,
        covariance=_covariance(candidates, references) if repeated else 0.0,
    )


def _covariance(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns the covariance of the means of samples, estimated from at least two pairs."""
    n, mean_x, mean_y = len(x), fmean(x), fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / (n - 1) / n


def _standard_error(one: Sums) -> float | None:
    """Returns the standard error of the figure because the judge's verdicts vary; None without repeated verdicts.

    The ratio is linearized. Questions with a single verdict count with the mean variance of the others.
    """
    if not one.n_repeated or not one.reference:
        return None
    ratio = one.candidate / one.reference
    variance = one.candidate_variance - 2 * ratio * one.covariance + ratio**2 * one.reference_variance
    return 100 / abs(one.reference) * math.sqrt(max(0.0, variance * one.n / one.n_repeated))


def _ten(total: float, n: float) -> float | None:
    return 10 * total / n if n else None


class LlavaBenchWild(LlavaBench):
    """24 pictures with a caption each, 60 questions."""

    name = "llava-bench-wild"
    title = "LLaVA-Bench (In-the-Wild)"
    folder = "llava-bench-in-the-wild"
    files: Mapping[str, str] = {
        "questions.jsonl": "questions, with question_id, image, text and category",
        "answers_gpt4.jsonl": "reference answers, with question_id and text",
        "context.jsonl": "descriptions of the pictures, with image and caption",
        "images/": "the pictures",
    }
    pictures = "images"
    rule = _RULE.format(_SENTENCES)
    key = "llava_bench_{}"

    def context(self, entry: Entry) -> str:
        """Returns the caption, or the lines of several. Raises DataError."""
        if isinstance(entry.value.get("caption"), list):
            return "\n".join(entry.texts("caption"))
        return entry.text("caption")


class LlavaBenchCoco(LlavaBench):
    """30 pictures of COCO with captions and boxes, 90 questions."""

    name = "llava-bench-coco"
    title = "LLaVA-Bench (COCO)"
    folder = "coco2014_val_qa_eval"
    files: Mapping[str, str] = {
        "qa90_questions.jsonl": "questions, with question_id, image, text and category",
        "qa90_gpt4_answer.jsonl": "reference answers, with question_id and text",
        "caps_boxes_coco2014_val_80.jsonl": "descriptions of the pictures, with image, captions and instances",
        "val2014/": "pictures of COCO val2014, with or without COCO_val2014_ in their names",
    }
    pictures = "val2014"
    rule = _RULE.format(_BOXES)
    key = "{}"

    def picture(self, name: str, data: Data) -> Path:
        """Returns the path of a picture; COCO's own archive has longer names than the questions."""
        path = super().picture(name, data)
        published = path.with_name(f"COCO_val2014_{path.name}")
        return published if published.is_file() and not path.is_file() else path

    def context(self, entry: Entry) -> str:
        """Returns the captions, an empty line, and a line for each object. Raises DataError."""
        objects = entry.value.get("instances")
        if not isinstance(objects, list) or not all(map(_is_object, objects)):
            raise DataError(f"{entry.where}: instances is {objects!r:.60}; expected objects with category and bbox")
        boxes = [f"{one['category']}: {one['bbox']}" for one in objects]
        return "\n".join(entry.texts("captions")) + "\n\n" + "\n".join(boxes)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("category"), str) and isinstance(value.get("bbox"), list)
