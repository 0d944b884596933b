"""Metrics of short answers, compared with plain loops and with examples of the programs that define them."""

import itertools
import random

import pytest

from llava.errors import DataError
from llava.eval.metrics import (
    COGNITION,
    PERCEPTION,
    MmeAnswer,
    YesNo,
    gqa_correct,
    m4c_normalize,
    mme,
    mme_answer,
    option_letter,
    pope,
    says_yes,
    textvqa_accuracy,
    vqa_accuracy,
    vqa_normalize,
)


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("NO", True),  # the original knows three spellings
        ("No, there is none.", False),
        ("There is not", False),
        ("There is nothing", True),
        ("Yes. But not here", True),  # only the first sentence
        ("", True),
        ("I see no dog. Yes", False),
        ("Nope", True),
        ("no\nyes", True),  # words are split at spaces only
    ],
)
def test_pope_reads_yes_unless_the_first_sentence_denies(text: str, yes: bool) -> None:
    assert says_yes(text) is yes


def test_pope_equals_counts_in_a_plain_loop() -> None:
    rng = random.Random(0)
    for n in range(1, 60):
        pairs = [
            (rng.choice(["Yes", "No", "Yes, it is.", "There is no cat."]), rng.choice(["yes", "no"])) for _ in range(n)
        ]
        tp = fp = tn = fn = 0
        for text, label in pairs:
            said = text.startswith("Yes")
            if label == "yes":
                tp, fn = tp + said, fn + (not said)
            else:
                fp, tn = fp + said, tn + (not said)
        found = pope(pairs)
        assert found.accuracy == pytest.approx(100 * (tp + tn) / n)
        assert found.yes_ratio == pytest.approx(100 * (tp + fp) / n)
        assert found.precision == (pytest.approx(100 * tp / (tp + fp)) if tp + fp else None)
        assert found.recall == (pytest.approx(100 * tp / (tp + fn)) if tp + fn else None)
        if tp:
            precision, recall = tp / (tp + fp), tp / (tp + fn)
            assert found.f1 == pytest.approx(100 * 2 * precision * recall / (precision + recall))
        else:
            assert found.f1 == (0 if fp + fn else None)


def test_pope_without_answers_has_no_figures() -> None:
    assert pope([]) == YesNo(None, None, None, None, None)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The cat", "cat"),
        ("a dog and an owl", "dog and owl"),
        ("two", "2"),
        ("None", "0"),
        ("ten people", "10 people"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("let's", "let's"),
        ("Id've", "id've"),  # the official table has capital letters, which are lower case by then
        ("lets", "lets"),
        ("1,000", "1000"),
        ("1,000 (one thousand)", "1000 1 thousand"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("yes!", "yes"),
        ("3.5", "3.5"),
        ("St. Ives.", "st ives"),
        ("a", ""),
        ("." * 40 + "x", "." * 8 + "x"),  # at most 32 periods, by a mistake in the official program
    ],
)
def test_answers_are_normalized_as_the_official_vqa_evaluation_does(text: str, wanted: str) -> None:
    assert vqa_normalize(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("What's this?", "what 's this"),
        ("1,000", "1000"),
        ("Joe's Bar\n", "joe 's bar"),
        ("She's", "she 's"),
        ("Dont\twalk", "don't walk"),
        ("STOP.", "stop"),
    ],
)
def test_answers_are_normalized_for_textvqa_as_in_m4c(text: str, wanted: str) -> None:
    assert m4c_normalize(text) == wanted


def leave_one_out(answer: str, references: list[str]) -> float:
    """The official accuracy, by comparing with every subset of all but one."""
    accuracies = []
    for others in itertools.combinations(references, len(references) - 1):
        accuracies.append(min(1.0, sum(other == answer for other in others) / 3))
    return sum(accuracies) / len(accuracies)


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_an_answer_with_so_many_of_ten_annotators_has_the_published_accuracy(matches: int, accuracy: float) -> None:
    references = ["yes"] * matches + [f"other {i}" for i in range(10 - matches)]
    for metric in (vqa_accuracy, textvqa_accuracy):
        assert metric("yes", references) == pytest.approx(accuracy)


def test_vqa_accuracy_equals_the_mean_over_all_sets_of_nine() -> None:
    rng = random.Random(1)
    for _ in range(300):
        references = [rng.choice("abcd") * 2 for _ in range(10)]
        answer = rng.choice("abcde") * 2
        for metric in (vqa_accuracy, textvqa_accuracy):
            assert metric(answer, references) == pytest.approx(leave_one_out(answer, references))


def test_equal_references_are_compared_as_they_are() -> None:
    assert vqa_accuracy("2", ["two"] * 10) == 0
    assert vqa_accuracy("two\n", [" two"] * 10) == 1
    assert vqa_accuracy("2", ["two"] * 9 + ["three"]) == 1
    assert textvqa_accuracy("2", ["two"] * 10) == 1


def test_a_question_without_references_is_refused() -> None:
    with pytest.raises(DataError, match="no reference answers"):
        vqa_accuracy("yes", [])


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("Yes.", "yes", True),
        ("yes", "yes", True),
        ("yes it is", "yes", False),
        ("Left..", "left", True),
        (" no", "no", False),
    ],
)
def test_gqa_wants_the_exact_answer(text: str, answer: str, right: bool) -> None:
    assert gqa_correct(text, answer) is right


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Yes", "yes"),
        ("NO.", "no"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("Not", "no"),
        ("Maybe", "other"),
        ("", "other"),
    ],
)
def test_mme_judges_the_first_four_characters(text: str, wanted: str) -> None:
    assert mme_answer(text) == wanted


def test_mme_adds_shares_of_questions_and_of_pictures() -> None:
    rng = random.Random(2)
    answers, wanted = [], {}
    for category in (*PERCEPTION, *COGNITION):
        questions = pictures = n = 0
        for picture in range(rng.randint(1, 30)):
            first, second = (rng.choice(["Yes", "No", "Hm"]) for _ in range(2))
            answers += [
                MmeAnswer(category, str(picture), first, "Yes"),
                MmeAnswer(category, str(picture), second, "No"),
            ]
            questions += (first == "Yes") + (second == "No")
            pictures += first == "Yes" and second == "No"
            n += 1
        wanted[category] = 100 * questions / (2 * n) + 100 * pictures / n
    rng.shuffle(answers)
    found = mme(answers)
    assert {name: one.score for name, one in found.categories.items()} == pytest.approx(wanted)
    assert found.perception == pytest.approx(sum(wanted[name] for name in PERCEPTION))
    assert found.cognition == pytest.approx(sum(wanted[name] for name in COGNITION))


def test_a_perfect_mme_scores_2000_and_800() -> None:
    both = [("Yes", "Yes"), ("No", "No")]
    found = mme(MmeAnswer(name, "0", text, label) for name in (*PERCEPTION, *COGNITION) for text, label in both)  # type: ignore[arg-type]
    assert (found.perception, found.cognition) == (2000, 800)


def test_mme_refuses_unknown_categories_and_unpaired_questions() -> None:
    with pytest.raises(DataError, match="no category 'ocr'"):
        mme([MmeAnswer("ocr", "0", "Yes", "Yes")])
    with pytest.raises(DataError, match="OCR, picture '0': found 1 answers; expected 2"):
        mme([MmeAnswer("OCR", "0", "Yes", "Yes")])


OPTIONS = {"A": "a red bus", "B": "a dog", "C": "two dogs", "D": "nothing"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("The answer is C.", "C"),
        ("b", None),
        ("A", "A"),
        ("A.", "A"),
        ("A big truck is here", None),  # the article
        ("A photo of two dogs", "C"),
        ("A or B", None),
        ("E", None),
        ("It shows two dogs", "C"),
        ("It shows A Red Bus", "A"),
        ("a dog and two dogs", None),
        ("Z", None),
        ("Z: nothing", None),
        ("", None),
        ("Cannot determine the answer, B", None),
    ],
)
def test_an_option_is_named_by_its_letter_or_its_text(text: str, letter: str | None) -> None:
    assert option_letter(text, OPTIONS) == letter
