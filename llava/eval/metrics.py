"""Metrics of short answers: yes and no (POPE, MME), a few words (VQAv2, VizWiz, TextVQA, GQA), and option letters.

Each function names the program whose results it equals. All shares are in per cent, unless it says otherwise.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llava.errors import DataError


def share(part: float, whole: float) -> float | None:
    """Returns `part` in per cent of `whole`, or None if that is 0."""
    return 100 * part / whole if whole else None


# -------------------------------------------------------------------------------------------------------------- POPE


@dataclass(frozen=True)
class YesNo:
    """Figures of yes-or-no questions, of which "yes" is the positive class. None if a figure is not defined."""

    accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    yes_ratio: float | None  # answers that say yes


def says_yes(text: str) -> bool:
    """Whether an answer counts as yes: unless its first sentence has the word no, No or not.

    LLaVA's eval_pope.py, which is POPE's own evaluate.py (arXiv:2305.10355).
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def pope(answers: Iterable[tuple[str, str]]) -> YesNo:
    """Returns the figures of pairs of an answer and its label, "yes" or "no", as LLaVA's eval_pope.py."""
    pairs = [(says_yes(text), label != "no") for text, label in answers]
    true_yes, said, meant = pairs.count((True, True)), sum(yes for yes, _ in pairs), sum(yes for _, yes in pairs)
    return YesNo(
        accuracy=share(sum(said == meant for said, meant in pairs), len(pairs)),
        precision=share(true_yes, said),
        recall=share(true_yes, meant),
        f1=share(2 * true_yes, said + meant),
        yes_ratio=share(said, len(pairs)),
    )


# --------------------------------------------------------------------------------------------------------------- VQA

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(_NUMBERS)}}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = int(re.UNICODE)  # the official program passes this flag as the count of replacements, by mistake
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're "
    "you've"
)


def _contractions() -> dict[str, str]:
    """Returns the right form of words in which one apostrophe is missing, as in the official program's table."""
    found = {}
    for word in _CONTRACTED.split():
        found.update({word[:i] + word[i + 1 :]: word for i, letter in enumerate(word) if letter == "'"})
    return found | {"somebody'd": "somebodyd"}  # as there


_CONTRACTIONS = _contractions()


def vqa_normalize(text: str) -> str:
    """Returns an answer as the official VQA evaluation compares it: without punctuation and articles, with digits.

    GT-Vision-Lab/VQA, vqaEval.py: processPunctuation and processDigitArticle.
    """
    glued = bool(_COMMA_IN_NUMBER.search(text))
    result = text
    for mark in _PUNCTUATION:
        at_edge = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if at_edge or glued else " ")
    words = _PERIOD.sub("", result, count=_MAX_PERIODS).lower().split()
    digits = (_DIGITS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in digits if word not in _ARTICLES)


def m4c_normalize(text: str) -> str:
    """Returns an answer as LLaVA submits it to VQAv2 and VizWiz, and as its evaluation of TextVQA compares it.

    EvalAIAnswerProcessor in LLaVA's m4c_evaluator.py, from facebookresearch/mmf.
    """
    plain = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_normalize(_one_line(plain))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Returns the accuracy of an answer, from 0 to 1, by the official rule of VQAv2 and VizWiz (vqaEval.py).

    references: the answers of the annotators, usually ten. As there, nothing is normalized if all of them are equal.
    """
    answer, references = _one_line(answer), [_one_line(text) for text in references]
    if len(set(references)) > 1:
        answer, references = vqa_normalize(answer), [vqa_normalize(text) for text in references]
    return _agreement(answer, references)


def textvqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Returns the accuracy of an answer, from 0 to 1, as TextVQAAccuracyEvaluator in LLaVA's m4c_evaluator.py."""
    return _agreement(m4c_normalize(answer), [m4c_normalize(text) for text in references])


def _agreement(answer: str, references: Sequence[str]) -> float:
    """Returns the mean over the annotators of min(1, matches among the others / 3)."""
    if not references:
        raise DataError("a question has no reference answers; expected those of its annotators")
    n = references.count(answer)
    each = [min(1.0, (n - (reference == answer)) / 3) for reference in references]
    return sum(each) / len(each)


# --------------------------------------------------------------------------------------------------------------- GQA


def gqa_prediction(text: str) -> str:
    """Returns an answer as LLaVA's convert_gqa_for_eval.py writes it: in lower case, without final dots."""
    return text.rstrip(".").lower()


def gqa_correct(text: str, answer: str) -> bool:
    """Whether an answer is exactly that of GQA, after convert_gqa_for_eval.py."""
    return gqa_prediction(text) == answer


# --------------------------------------------------------------------------------------------------------------- MME

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


class MmeAnswer(NamedTuple):
    """An answer to one of the two questions about a picture."""

    category: str
    picture: str
    text: str
    label: Literal["Yes", "No"]


@dataclass(frozen=True)
class MmeCategory:
    """Shares of right answers, and of pictures with two right answers. Their sum, up to 200, is the score."""

    accuracy: float
    accuracy_plus: float

    @property
    def score(self) -> float:
        """The score of this category."""
        return self.accuracy + self.accuracy_plus


@dataclass(frozen=True)
class Mme:
    """MME's scores: sums over the categories, up to 2000 for perception and 800 for cognition."""

    categories: Mapping[str, MmeCategory]

    @property
    def perception(self) -> float:
        """The sum over the categories of perception that have answers."""
        return sum(self.categories[name].score for name in PERCEPTION if name in self.categories)

    @property
    def cognition(self) -> float:
        """The sum over the categories of cognition that have answers."""
        return sum(self.categories[name].score for name in COGNITION if name in self.categories)


def mme_answer(text: str) -> Literal["yes", "no", "other"]:
    """Returns what an answer says, judged by its first four characters, as MME's calculation.py does."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme(answers: Iterable[MmeAnswer]) -> Mme:
    """Returns the scores of MME (arXiv:2306.13394), as its calculation.py.

    Raises DataError if a category is unknown, or a picture has not exactly two questions.
    """
    rights: dict[str, dict[str, list[bool]]] = {}
    for one in answers:
        if one.category not in (*PERCEPTION, *COGNITION):
            raise DataError(
                f"MME has no category {one.category!r}; expected one of {', '.join(PERCEPTION + COGNITION)}"
            )
        right = mme_answer(one.text) == one.label.lower()
        rights.setdefault(one.category, {}).setdefault(one.picture, []).append(right)
    return Mme({category: _mme_category(category, pictures) for category, pictures in rights.items()})


def _mme_category(category: str, pictures: Mapping[str, Sequence[bool]]) -> MmeCategory:
    for picture, both in pictures.items():
        if len(both) != 2:
            raise DataError(f"MME, {category}, picture {picture!r}: found {len(both)} answers; expected 2")
    right = sum(sum(both) for both in pictures.values())
    return MmeCategory(100 * right / (2 * len(pictures)), 100 * sum(map(all, pictures.values())) / len(pictures))


# ------------------------------------------------------------------------------------------------------ option letter

_BRACKETS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MAX_WORDS = 3  # in a longer answer, A may be the article


def option_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter of the option that an answer chooses, or None if that is not clear.

    It is the only letter that is a word of the answer, or else the only option whose text is part of it. This is the
    part without a language model of VLMEvalKit's can_infer, which it uses for MMBench and SEED-Bench.

    options: the text of each option by its letter.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return None
    words = text.translate(_BRACKETS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and not ("A" in words and len(words) > _MAX_WORDS):
        return named[0]
    if not named and "Z" in words:  # none of the options
        return None
    quoted = [letter for letter, option in options.items() if option and option.lower() in text.lower()]
    return quoted[0] if len(quoted) == 1 else None
