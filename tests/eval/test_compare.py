"""Runs side by side: differences, changed questions, what limits a comparison, and the folder that is written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.errors import ConfigError, DataError
from llava.eval import side_by_side
from llava.eval.bootstrap import Options
from llava.eval.compare import Comparison, compare, open_runs
from llava.eval.runs import read_run
from llava.eval.task import Question
from llava.eval.tasks import TASKS
from tests.command import assert_one_line_error, run, run_well
from tests.eval.answered import pope_questions, right, write_run, wrong, wrong_at

OPTIONS = Options(samples=100)
MME = [
    Question(id=f"count/{i}:{k}", text="?", answer=("Yes", "No")[k - 1], groups=("perception", "count"))
    for i in range(3)
    for k in (1, 2)
]
GQA = [Question(id=f"q{i}", text="What?", answer="yes") for i in range(4)]


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return pope_questions(tmp_path)


def compared(*folders: Path) -> Comparison:
    return compare(open_runs(folders), OPTIONS)


def test_changed_questions_are_listed_with_both_replies(questions: list[Question], tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", {"pope": (questions, wrong_at(1, 4))})
    second = write_run(
        tmp_path / "second",
        {"pope": (questions, lambda one: "Yes, there is." if one.id == "2" else wrong_at(4, 7)(one))},
    )
    (row,) = compared(first, second).rows
    (found,) = row.differences
    assert [(one.id, one.scores, one.better, one.texts) for one in found.changes] == [
        ("1", (0, 100), True, ("Yes", "No")),  # a right no, of which F1 knows nothing
        ("7", (100, 0), False, ("No", "Yes")),
    ]
    assert (found.changes[0].prompt, found.changes[0].answer) == (questions[1].text, "no")
    assert found.reworded == 1
    assert found.n == 24


def test_the_difference_is_that_of_the_headlines_and_lies_in_its_interval(
    questions: list[Question], tmp_path: Path
) -> None:
    first = write_run(tmp_path / "first", {"pope": (questions, wrong_at(0, 1, 2, 3, 4, 5, 6, 7))})
    second = write_run(tmp_path / "second", {"pope": (questions, wrong_at(0))})
    (row,) = compared(first, second).rows
    (found,) = row.differences
    assert found.value == pytest.approx(row.scores[1].value - row.scores[0].value)
    assert found.interval[0] < found.value < found.interval[1]


def test_tasks_are_in_the_order_of_the_zoo_and_a_run_may_lack_some(questions: list[Question], tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", {"pope": (questions, right), "gqa": (GQA, lambda one: "yes")})
    second = write_run(tmp_path / "second", {"pope": (questions, right), "mme": (MME, lambda one: "Yes")})
    found = compared(first, second)
    assert [row.task.name for row in found.rows] == ["gqa", "pope", "mme"]
    assert [[one and one.value for one in row.scores] for row in found.rows] == [[100, None], [100, 100], [None, 50]]
    assert [row.differences[0] is None for row in found.rows] == [True, False, True]
    text = side_by_side.write(found, tmp_path / "out").read_text()
    assert "| gqa | 100.00 | – |" in text


def test_an_item_of_several_questions_is_compared_with_all_of_them(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", {"mme": (MME, lambda one: "Yes")})
    second = write_run(tmp_path / "second", {"mme": (MME, lambda one: "No" if one.id == "count/1:2" else "Yes")})
    (row,) = compared(first, second).rows
    (change,) = row.differences[0].changes
    assert (change.id, change.scores, change.texts) == ("count/1", (50, 200), ("Yes / Yes", "Yes / No"))


def test_where_lower_is_better_a_lower_score_is(
    questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_run(tmp_path / "first", {"pope": (questions, wrong_at(0, 2))})
    second = write_run(tmp_path / "second", {"pope": (questions, wrong_at(4))})
    monkeypatch.setattr(TASKS["pope"], "lower_is_better", True)
    found = compared(first, second)
    assert {one.id: one.better for one in found.rows[0].differences[0].changes} == {"0": False, "2": False, "4": True}
    assert "0.00 → 100.00" in side_by_side.write(found, tmp_path / "out").read_text()


# ---------------------------------------------------------------------------------------------- questions that differ


def test_runs_with_other_questions_are_compared_in_those_that_both_have(
    questions: list[Question], tmp_path: Path
) -> None:
    first = write_run(tmp_path / "first", {"pope": (questions, wrong_at(0, 20))})
    second = write_run(tmp_path / "second", {"pope": (questions[:12], right)})
    found = compared(first, second)
    (difference,) = found.rows[0].differences
    assert (difference.n, [one.id for one in difference.changes]) == (12, ["0"])
    assert any("of 12 and 24 items, 12 are asked and answered in both" in note for note in found.notes)


def test_a_question_with_another_right_answer_is_left_out(questions: list[Question], tmp_path: Path) -> None:
    other = [replace(one, answer="no") if one.id == "0" else one for one in questions]
    first = write_run(tmp_path / "first", {"pope": (questions, right)})
    second = write_run(tmp_path / "second", {"pope": (other, right)})
    found = compared(first, second)
    assert (found.rows[0].differences[0].n, found.rows[0].differences[0].changes) == (23, [])
    assert any("1 item left out" in note for note in found.notes)


def test_other_prompts_are_compared_with_a_warning(questions: list[Question], tmp_path: Path) -> None:
    other = [replace(one, text=f"{one.text} Say yes or no.") for one in questions]
    first = write_run(tmp_path / "first", {"pope": (questions, right)})
    second = write_run(tmp_path / "second", {"pope": (other, right)})
    found = compared(first, second)
    assert found.rows[0].differences[0].n == 24
    assert any("the prompts of 24 common items differ" in note for note in found.notes)


def test_questions_without_an_answer_are_in_no_difference(questions: list[Question], tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", {"pope": (questions, lambda one: None if one.id == "3" else right(one))})
    second = write_run(tmp_path / "second", {"pope": (questions, right)})
    found = compared(first, second)
    assert found.rows[0].differences[0].n == 23
    assert any("of 24 and 23 items, 23 are answered in both" in note for note in found.notes)


def test_questions_that_differ_and_are_not_recorded_are_not_compared(questions: list[Question], tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", {"pope": (questions, right)})
    second = write_run(tmp_path / "second", {"pope": (questions[:12], right)})
    for name in ("questions.jsonl", "answers.jsonl"):
        (second / "pope" / name).unlink()
    found = compared(first, second)
    assert (found.rows[0].differences[0].value, found.rows[0].differences[0].n) == (None, 0)
    assert any("not compared" in note for note in found.notes)


def test_pictures_are_the_clusters_and_few_of_them_are_a_doubt(tmp_path: Path) -> None:
    questions = pope_questions(tmp_path, 24, per_picture=4)
    first = write_run(tmp_path / "first", {"pope": (questions, right)})
    second = write_run(tmp_path / "second", {"pope": (questions, wrong)})
    found = compared(first, second)
    assert found.rows[0].differences[0].n_clusters == 6
    assert any("6 clusters, too few" in note for note in found.notes)


# -------------------------------------------------------------------------------------------------- runs and settings


def test_settings_that_differ_are_listed(questions: list[Question], tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", {"pope": (questions, right)}, num_beams=1, dtype="auto")
    second = write_run(tmp_path / "second", {"pope": (questions, right)}, num_beams=5, dtype="auto")
    assert compared(first, second).settings == {"--num-beams": [1, 5]}


@pytest.mark.parametrize(
    ("models", "expected"), [(("a", "b"), ["a", "b"]), (("a", "a"), ["first", "second"])], ids=["models", "folders"]
)
def test_runs_have_the_names_of_their_models_if_these_differ(
    models: tuple[str, str], expected: list[str], questions: list[Question], tmp_path: Path
) -> None:
    for folder, name in zip(("first", "second"), models, strict=True):
        write_run(tmp_path / "runs" / folder, {"pope": (questions, right)}, name=name)
    assert compared(tmp_path / "runs").names == expected


@pytest.mark.parametrize(
    ("judges", "noted"), [(("a", "a"), False), (("a", "b"), True), (("a", None), True), (("a",), False)]
)
def test_scores_of_different_judges_are_compared_with_a_warning(
    judges: tuple[str | None, ...], noted: bool, questions: list[Question], tmp_path: Path
) -> None:
    folders = [write_run(tmp_path / name, {"gqa": (GQA, right)}) for name in ("first", "second")]
    for folder, judge in zip(folders, judges, strict=False):
        made = {"judge": judge, "temperature": 0.2} if judge else {}
        verdict = {"question_id": "q0", "content": "8 6", "metadata": made}
        (folder / "gqa" / "reviews.jsonl").write_text(json.dumps(verdict) + "\n")
    notes = [note for note in compared(*folders).notes if "the judges differ" in note]
    assert len(notes) == noted
    assert not noted or "a at temperature 0.2" in notes[0]


@pytest.mark.parametrize(("contexts", "noted"), [((512, 512), False), ((512, 2048), True)])
def test_perplexities_with_other_windows_are_compared_with_a_warning(
    contexts: tuple[int, int], noted: bool, tmp_path: Path
) -> None:
    text = Question(id="a.txt", text="a b", groups=("a.txt",))
    folders = []
    for i, context in enumerate(contexts):
        measured = json.dumps({"nll": 3.0, "bytes": 3, "tokens": 2, "context": context})
        folders.append(write_run(tmp_path / str(i), {"perplexity": ([text], lambda _, found=measured: found)}))
    notes = [note for note in compared(*folders).notes if "the notes on the figures differ" in note]
    assert len(notes) == noted
    assert not noted or "windows of up to 2,048 tokens; windows of up to 512 tokens" in notes[0]


def test_one_run_or_the_same_one_twice_is_refused(questions: list[Question], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "first", {"pope": (questions, right)})
    for folders in ([folder], [folder, tmp_path / "." / "first"]):
        with pytest.raises(ConfigError, match="two runs or more"):
            open_runs(folders)


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no record": ("run.json", Path.unlink, "contains no run"),
    "a record that ends early": ("run.json", _cut, "not valid JSON"),
    "another schema": ("run.json", _edit(schema="x"), "schema is 'x'"),
    "a model without a name": ("run.json", _edit(model={}), "the name of the model"),
    "zoo ids that are no list": ("run.json", _edit(model={"name": "m", "zoo": "x"}), "expected a list of ids"),
    "no scores": ("pope/scores.json", Path.unlink, "has no scores yet"),
    "scores that end early": ("pope/scores.json", _cut, "not valid JSON"),
    "the scores of another task": ("pope/scores.json", _edit(task="gqa"), "the name of its folder"),
    "a value that does not follow": ("pope/scores.json", _edit(value=3.0), "do not give the value 3.0"),
    "a value that is no number": ("pope/scores.json", _edit(value=float("nan")), "value is nan"),
    "items of another length": (
        "pope/scores.json",
        _edit(items={"0": {"groups": [], "sums": [1.0]}}),
        "do not give the value",
    ),
    "an item without sums": ("pope/scores.json", _edit(items={"0": {}}), "expected its groups and sums"),
    "an item that is no object": ("pope/scores.json", _edit(items={"0": 3}), "expected its groups and sums"),
    "a negative count": ("pope/scores.json", _edit(n=-1), "expected a number of questions"),
    "answers that end early": ("pope/answers.jsonl", _cut, "not valid JSON"),
    "questions that end early": ("pope/questions.jsonl", _cut, "not valid JSON"),
    "settings that end early": ("pope/settings.json", _cut, "not valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_with_its_file(damage: str, questions: list[Question], tmp_path: Path) -> None:
    name, edit, message = DAMAGES[damage]
    folders = [write_run(tmp_path / one, {"pope": (questions, right)}) for one in ("first", "second")]
    edit(folders[1] / name)
    with pytest.raises((DataError, ConfigError), match=message) as error:
        compared(*folders)
    assert str(folders[1]) in str(error.value)


def test_a_task_that_this_version_does_not_know_is_refused(questions: list[Question], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "first", {"pope": (questions, right)})
    (folder / "pope").rename(folder / "future")
    _edit(task="future")(folder / "future" / "scores.json")
    assert "future" in read_run(folder).scores
    with pytest.raises(DataError, match="there is no task 'future'"):
        compared(folder)


# ------------------------------------------------------------------------------------------------------------ command


@pytest.fixture
def two(questions: list[Question], tmp_path: Path) -> list[Path]:
    first = write_run(tmp_path / "first", {"pope": (questions, wrong_at(0, 1, 2))})
    return [first, write_run(tmp_path / "second", {"pope": (questions, wrong_at(1, 2, 3))}, seed=3)]


def test_the_command_prints_the_tables_and_writes_the_folder(two: list[Path], tmp_path: Path) -> None:
    done = run_well("eval", "compare", *two, "--out", tmp_path / "a" / "out", "--samples", 50)
    assert "second" in done.stdout
    text = (tmp_path / "a" / "out" / "compare.md").read_text()
    assert "| --seed | – | 3 |" in text
    assert "| 0 | Is there a thing of kind 0 in the image? | yes | No | Yes | wrong → right |" in text
    for name in ("bars.png", "radar.png"):
        assert f"({name})" in text
        with Image.open(tmp_path / "a" / "out" / name) as image:
            image.load()
            assert len(image.convert("RGB").getcolors(1 << 20)) > 5  # something is drawn


def test_equal_commands_print_and_write_the_same(two: list[Path], tmp_path: Path) -> None:
    printed = [run_well("eval", "compare", *two, "--out", tmp_path / name, "--json").stdout for name in "ab"]
    assert printed[0] == printed[1]
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_json_has_every_change(two: list[Path]) -> None:
    found = json.loads(run_well("eval", "compare", *two, "--json").stdout)
    assert [one["name"] for one in found["runs"]] == ["first", "second"]
    (task,) = found["tasks"]
    (difference,) = task["differences"]
    assert [(one["id"], one["better"]) for one in difference["changes"]] == [("0", True), ("3", False)]
    assert difference["interval"][0] <= difference["value"] <= difference["interval"][1]


def test_a_folder_that_cannot_be_written_is_refused(two: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_line_error(run("eval", "compare", *two, "--out", tmp_path / "file" / "out"), "with --out")
