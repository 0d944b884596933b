"""The benchmark of drawn scenes: its files, its figures, and the errors of files that are not in order."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.errors import DataError
from llava.eval.task import ALL, Answered, Data, Question, scores
from llava.eval.tasks import TASKS
from llava.eval.tasks.llava_tiny import CATEGORIES, LlavaTiny
from tests.command import run, run_well

TASK = TASKS["llava-tiny"]
INCLUDED = Data.of(TASK, None)
TRAINING_SEEDS = 2**31  # training scenes have seeds below this


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return TASK.questions(INCLUDED)


def lines(folder: Path = INCLUDED.folder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text("utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------- the included files


def test_the_files_are_small_and_complete(questions: list[Question]) -> None:
    files = [file for file in INCLUDED.folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 1_500_000
    assert {file for file in files if file.suffix == ".jpg"} == {path for one in questions for path in one.images}
    for path in {path for one in questions for path in one.images}:
        with Image.open(path) as image:
            assert 120 <= min(image.size) <= max(image.size) <= 256


def test_there_are_enough_questions_of_each_category_kind_style_and_subset(questions: list[Question]) -> None:
    counts = Counter(group for one in questions for group in one.groups)
    assert counts["conv"] > 290
    assert counts["detail"] == 100
    assert counts["complex"] > 80
    assert min(counts.values()) >= 20
    assert len(set(counts) - set(CATEGORIES)) == 8  # kinds of questions in conversations
    assert len({one.id for one in questions}) == len(questions)
    scenes = {line["image"]: line for line in lines()}
    assert Counter(line["style"] for line in scenes.values()) == {"noto": 50, "twemoji": 50}
    subsets = {"fresh scenes": 60, "held-back phrasings": 20, "held-back pairs": 20}
    assert Counter(line["subset"] for line in scenes.values()) == subsets


def test_no_scene_has_a_seed_of_training() -> None:
    assert min(line["seed"] for line in lines()) >= TRAINING_SEEDS


# ------------------------------------------------------------------------------------------------------------ figures


def test_reference_answers_get_all_marks_and_empty_replies_none(questions: list[Question]) -> None:
    best = scores(TASK, [Answered(one, one.answer) for one in questions], n_questions=len(questions))
    assert best.value == 100
    assert set(best.figures.values()) == {100}
    assert best.details == {"things found": 100, "things invented": 0}
    worst = scores(TASK, [Answered(one, "") for one in questions], n_questions=len(questions))
    assert worst.value == 0
    assert set(worst.figures.values()) == {0}


def test_the_headline_is_the_mean_of_the_categories(questions: list[Question]) -> None:
    """Two marks of three in conversations, F1 of 2/3 in a description, nothing in a complex question."""
    chosen = [one for one in questions if one.id in ("000-0", "000-1", "000-2", "001-3", "001-4")]
    replies = [chosen[0].answer, chosen[1].answer, "", "There is shaved ice and a dog, perhaps.", "None of these."]
    result = scores(TASK, [Answered(*pair) for pair in zip(chosen, replies, strict=True)], n_questions=5)
    conv, detail = 100 * 2 / 3, 100 * 2 / 3
    assert [result.figures[name] for name in CATEGORIES] == pytest.approx([conv, detail, 0])
    assert result.value == pytest.approx((conv + detail + 0) / 3)
    assert result.figures[ALL] == pytest.approx(100 * (2 + 2 / 3) / 5)
    assert result.details == {"things found": 100, "things invented": 50}


def test_one_reply_can_be_marked_by_itself(questions: list[Question]) -> None:
    assert isinstance(TASK, LlavaTiny)
    question = next(one for one in questions if one.id == "001-3")
    assert question.answer == "There is shaved ice."
    assert [TASK.judge(question, text) for text in ("Shaved ice", "Shaved ice. A dog.", "A dog.")] == [1, 2 / 3, 0]


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_needs_no_data_and_takes_other_data(tmp_path: Path) -> None:
    """Other data is in the same layout, by itself or in a folder of several benchmarks."""
    copy = tmp_path / "eval" / "llava-tiny"
    shutil.copytree(INCLUDED.folder, copy)
    few = (copy / "questions.jsonl").read_text("utf-8").splitlines(keepends=True)[:5]
    (copy / "questions.jsonl").write_text("".join(few), encoding="utf-8")
    options = ("eval", "run", "llava-tiny", "--device", "cpu", "--json")
    included = json.loads(run_well(*options, "--out", tmp_path / "a", "--limit", 5).stdout)
    assert included["llava-tiny"]["n"] == 5
    for name, data in (("b", copy), ("c", copy.parent)):
        other = json.loads(run_well(*options, "--out", tmp_path / name, "--data", data).stdout)
        assert other == included
    answers = [json.loads(line) for line in (tmp_path / "a" / "llava-tiny" / "answers.jsonl").open()]
    assert [line["question_id"] for line in answers] == [f"000-{k}" for k in range(5)]
    assert [line["prompt"] for line in answers] == [line["text"] for line in lines()[:5]]


def test_the_list_of_tasks_says_that_it_is_included() -> None:
    assert (
        "llava-tiny: drawn scenes; marks, mean of conv, detail and complex (%); included"
        in run_well("eval", "tasks").stdout.splitlines()
    )
    listed = {one["name"]: one for one in json.loads(run_well("eval", "tasks", "--json").stdout)}
    assert listed["llava-tiny"]["included"] is True
    assert listed["pope"]["included"] is False


# -------------------------------------------------------------------------------------------------------------- errors


def first(**changes: Any) -> Callable[[Path], None]:
    """Changes fields of the first question."""

    def change(folder: Path) -> None:
        some = lines(folder)
        (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [some[0] | changes]))

    return change


def words(value: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "vocabulary.json").write_text(json.dumps(value)) and None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first(category="art"), r"questions\.jsonl, line 1: category is 'art'; expected one of conv, detail, complex"),
        (first(measure="taste"), r"line 1: measure is 'taste'; expected one of names, number, place"),
        (first(measure=None), r"line 1: measure is None; expected a text"),
        (first(answer=7), r"line 1: answer is 7; expected a text"),
        (first(kind=None), r"line 1: kind is None; expected a text"),
        (words([]), r"vocabulary\.json: expected an object with things"),
        (words({"things": {"dog": ["dog"]}, "colors": ["red"]}), r"vocabulary\.json: expected an object with things"),
        (words({"things": {"dog": "dog"}, "colors": [], "printed": []}), r"vocabulary\.json: expected an object"),
        (words({"things": [], "colors": [], "printed": []}), r"vocabulary\.json: expected an object"),
        (words({"things": {}, "colors": [1], "printed": []}), r"vocabulary\.json: expected an object"),
        (
            lambda folder: (folder / "vocabulary.json").unlink(),
            r"vocabulary\.json: not found; expected names of things",
        ),
    ],
)
def test_files_that_are_not_in_order_are_refused(tmp_path: Path, change, message) -> None:
    for name in ("questions.jsonl", "vocabulary.json"):
        shutil.copy(INCLUDED.folder / name, tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        TASK.questions(Data.of(TASK, tmp_path))


def test_a_missing_picture_ends_the_command_before_a_model_is_loaded(tmp_path: Path) -> None:
    done = run("eval", "run", "llava-tiny", "--out", tmp_path / "run", "--images", tmp_path, "--model", "none")
    assert done.returncode == 2
    assert "100 of 100 pictures not found" in done.stderr
