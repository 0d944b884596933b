"""`llava data convert --from scienceqa`: the samples of LLaVA's convert_sqa_to_llava.py, on hand-made problems."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.data.check import check
from llava.data.scienceqa import FORMATS, Problems, sample
from llava.errors import DataError
from tests.command import assert_one_line_error, run, run_well
from tests.data.published import picture, talk, write_folder
from tests.eval.science import problem, write_problems

MAGNET: dict[str, Any] = {
    "question": "Which one  is a magnet?",
    "choices": ["the left one", "the right one", "none"],
    "answer": 1,
    "hint": " Two bars. ",
    "image": "image.png",
    "lecture": "Iron is pulled.\nWood is not.",
    "solution": "The nails move.",
}
PLAIN: dict[str, Any] = {**MAGNET, "hint": "", "image": None, "lecture": "", "solution": " ", "answer": 2}
QCM = "Which one is a magnet?\nContext: {}\nOptions: (A) the left one (B) the right one (C) none"
CQM = "Context: {}\nQuestion: Which one is a magnet?\nOptions: (A) the left one (B) the right one (C) none"


def made(values: dict[str, Any], format: str, tmp_path: Path) -> dict[str, Any]:
    write_problems(tmp_path, {"7": values}, {"train": ["7"]})
    return sample(Problems(tmp_path / "problems.json")["7"], format)


@pytest.mark.parametrize(
    ("format", "question", "with_texts", "without"),
    [
        ("QCM-LEA", QCM, "Iron is pulled.\nWood is not. The nails move. The answer is B.", "The answer is C."),
        (
            "QCM-LEPA",
            QCM,
            "LECTURE: Iron is pulled.\nWood is not.\nSOLUTION: The nails move.\n###\nANSWER: B.",
            "###\nANSWER: C.",
        ),
        ("QCM-A", QCM, "The answer is B.", "The answer is C."),
        ("CQM-A", CQM, "The answer is B.", "The answer is C."),
    ],
)
def test_each_format_has_the_texts_of_the_original(
    format: str, question: str, with_texts: str, without: str, tmp_path: Path
) -> None:
    assert made(MAGNET, format, tmp_path) == {
        "id": "7",
        "image": "7/image.png",
        "conversations": talk(question.format("Two bars.") + "\n<image>", with_texts),
    }
    # without lecture, four spaces are between "Answer:" and "The": one pass leaves two, of which one stays
    answer = f" {without}" if format == "QCM-LEA" else without
    assert made(PLAIN, format, tmp_path) == {"id": "7", "conversations": talk(question.format("N/A"), answer)}


@pytest.mark.parametrize(
    ("key", "text", "asked", "answered"),
    [
        ("question", "a   b    c", "a  b  c", None),  # one pass
        ("question", "Question: a", "a", None),  # every time
        ("hint", "Question: b", "Context: b", None),
        ("solution", "x Answer: y", None, "x y The"),
        ("lecture", r"one\ntwo", None, "one\ntwo"),
        ("question", "{answer} {0} %s", "{answer} {0} %s", None),
    ],
)
def test_quirks_of_the_original_are_kept(
    key: str, text: str, asked: str | None, answered: str | None, tmp_path: Path
) -> None:
    question, answer = (turn["value"] for turn in made(MAGNET | {key: text}, "QCM-LEA", tmp_path)["conversations"])
    assert (asked or "") in question
    assert (answered or "") in answer
    assert "Question: " not in question
    assert "Answer: " not in answer


@pytest.mark.parametrize("given", ["folder", "problems.json"])
@pytest.mark.parametrize("name", ["llava_minival_QCM-LEPA.json", "llava_minival_QCM-LEPA.jsonl", "out.json"])
def test_a_split_is_written_in_its_order(given: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "ScienceQA"
    folder.mkdir()
    write_problems(folder, {str(i): problem(i) for i in range(9)}, {"train": ["1"], "minival": ["6", "2", "6", "5"]})
    options = ["--split", "minival", "--format", "QCM-LEPA"] if name == "out.json" else []
    source = folder if given == "folder" else folder / "problems.json"
    done = run_well("data", "convert", source, tmp_path / name, "--from", "scienceqa", *options)
    assert f"{name}: 3 samples, 2 with pictures" in done.stdout
    text = (tmp_path / name).read_text()
    samples = json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))
    problems = Problems(folder / "problems.json")
    assert samples == [sample(problems[id], "QCM-LEPA") for id in ("6", "2", "5")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["ScienceQA", name])


@pytest.mark.parametrize("format", FORMATS)
def test_the_samples_pass_the_check_of_training_data(format: str, tmp_path: Path) -> None:
    write_problems(tmp_path, {str(i): problem(i) for i in range(9)}, {"test": [str(i) for i in range(9)]})
    out = tmp_path / f"llava_test_{format}.json"
    run_well("data", "convert", tmp_path, out, "--from", "scienceqa")
    images = write_folder(tmp_path / "images", {f"{i}/image.png": picture("image.png") for i in range(9)})
    assert check(out, images, workers=0).clean


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"question": None}, "question is None; expected a text"),
        ({"hint": 3}, "hint is 3"),
        ({"lecture": ["a"]}, "lecture is ['a']"),
        ({"choices": [1, 2]}, "choices is [1, 2]"),
        ({"choices": list("abcdef")}, "has 6 choices; expected at most 5"),
        ({"answer": 3}, "answer is 3; expected the index of a choice, from 0 to 2"),
        ({"image": ""}, "image is ''"),
        ({"image": "../a.png"}, "image is '../a.png'"),
        ({"image": 5}, "image is 5"),
        ({"question": "What is <image>?"}, "contains the mark <image>"),
        ({"question": "\ud800"}, "unpaired surrogate"),
    ],
)
def test_a_malformed_problem_is_refused_in_one_line_that_names_it(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="problem '7'"):
        made(MAGNET | changed, "QCM-LEA", tmp_path)
    write_problems(tmp_path, {"7": MAGNET | changed, "8": MAGNET}, {"train": ["7", "8"]})
    command = ("data", "convert", tmp_path, tmp_path / "llava_train_QCM-LEA.json", "--from", "scienceqa")
    assert_one_line_error(run(*command), "1 of 2 cannot be converted", said)
    assert not command[3].exists()
    report = json.loads(run_well(*command, "--drop", "--json").stdout)
    assert (report["samples"], report["converted"], len(report["lost"])) == (2, 1, 1)


def test_ids_without_a_problem_are_counted_or_left_out(tmp_path: Path) -> None:
    write_problems(tmp_path, {"7": MAGNET}, {"val": ["7", "8", "9"]})
    command = ("data", "convert", tmp_path, tmp_path / "llava_val_QCM-A.json", "--from", "scienceqa")
    assert_one_line_error(run(*command), "2 of 3 cannot be converted (2 missing)", "problem '8'", "add --drop")
    assert "1 sample, 1 with pictures; left out 2: 2 missing" in run_well(*command, "--drop").stdout


def test_files_that_are_missing_or_exist_are_named(tmp_path: Path) -> None:
    out = tmp_path / "llava_val_QCM-A.json"
    command = ("data", "convert", tmp_path, out, "--from", "scienceqa")
    assert_one_line_error(run(*command), "pid_splits.json: cannot be read")
    write_problems(tmp_path, {"7": MAGNET}, {"val": ["7"]})
    (tmp_path / "problems.json").unlink()
    assert_one_line_error(run(*command), "problems.json: cannot be read")
    out.write_text("kept")
    assert_one_line_error(run(*command), "already exists")
    assert out.read_text() == "kept"
