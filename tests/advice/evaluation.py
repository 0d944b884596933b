"""Advice about runs of evaluations."""

import json
import shutil
from unittest import mock

from llava.eval.task_run import TaskRun
from tests.advice.table import Run, Steps, World, advice, say
from tests.eval.benchmarks import SEED_ALL, TEXTVQA, VQAV2_VAL
from tests.eval.pope import write_pope


def evaluate(w: World, *more: object, data: str = "data", out: str = "run") -> Run:
    return ("eval", "run", "pope", "--data", w / data, "--out", w / out, "--device", "cpu", *more)


def pope(w: World) -> None:
    write_pope(w / "data", per_split=1)


@advice("there is no task {}; choose from {}")
def a_task_with_a_typing_error(w: World) -> Steps:
    pope(w)
    said = yield ("eval", "run", "popes", "--data", w / "data", "--out", w / "run")
    assert "choose from" in said.text
    assert "pope" in said.text.split("choose from")[1]
    yield evaluate(w)


@advice("--data {}; expected the folder with the files that llava eval tasks lists")
def a_folder_of_data_that_does_not_exist(w: World) -> Steps:
    yield evaluate(w)
    assert "llava_pope_test.jsonl" in say(("eval", "tasks")).text
    pope(w)
    yield evaluate(w)


@advice("{}: not found; expected {}; llava eval tasks lists the files of each task")
def a_folder_without_the_files_of_the_task(w: World) -> Steps:
    pope(w)
    yield evaluate(w, data="data/pope/val2014")
    assert "llava_pope_test.jsonl" in say(("eval", "tasks")).text
    yield evaluate(w)


@advice("{} of {} not found ({}); set images= (--images) to the folder that has them")
def pictures_in_another_folder(w: World) -> Steps:
    pope(w)
    (w / "data" / "pope" / "val2014").rename(w / "pictures")
    yield evaluate(w)
    yield evaluate(w, "--images", w / "pictures")


@advice("choose one of {}")
def a_split_that_the_task_has_not(w: World) -> Steps:
    VQAV2_VAL.write(w / "data")
    run = ("eval", "run", "vqav2", "--data", w / "data", "--out", w / "run", "--device", "cpu", "--split")
    said = yield (*run, "validation")
    assert "choose one of test-dev, val" in said.text
    yield (*run, "val")


@advice("it has none, omit --split")
def a_split_of_a_task_without_splits(w: World) -> Steps:
    pope(w)
    yield evaluate(w, "--split", "random")
    yield evaluate(w)


@advice("seed: {} about videos left out; --split all asks them, too")
def questions_about_videos(w: World) -> Steps:
    SEED_ALL.write(w / "data")
    run = ("eval", "run", "seed", "--data", w / "data", "--device", "cpu", "--out")
    yield (*run, w / "images")
    yield (*run, w / "all", "--split", "all")


OTHER_SETTINGS = (
    "{}: has answers of a run with {}; this run has {}; choose another folder with --out, or remove this one"
)


@advice(OTHER_SETTINGS)
def a_run_with_other_settings(w: World) -> Steps:
    pope(w)
    assert say(evaluate(w)).well
    yield evaluate(w, "--num-beams", "2")
    yield evaluate(w, "--num-beams", "2", out="beams")


@advice(OTHER_SETTINGS)
def a_run_with_other_settings_that_is_removed(w: World) -> Steps:
    pope(w)
    assert say(evaluate(w)).well
    yield evaluate(w, "--num-beams", "2")
    shutil.rmtree(w / "run")
    yield evaluate(w, "--num-beams", "2")


@advice("{}: cannot be written ({}); choose another folder with --out")
def a_file_in_place_of_a_run(w: World) -> Steps:
    pope(w)
    (w / "run").write_text("mine")
    yield evaluate(w)
    yield evaluate(w, out="other")


@advice("{}: cannot be written ({}); fix the cause and run the same command again")
def a_disk_that_fills_during_a_run(w: World) -> Steps:
    pope(w)
    with mock.patch.object(TaskRun, "add", side_effect=OSError(28, "No space left on device")):
        yield evaluate(w)


@advice("{}: its line {} is not {}; remove that line")
def an_answer_that_somebody_has_edited(w: World) -> Steps:
    pope(w)
    assert say(evaluate(w)).well
    answers = w / "run" / "pope" / "answers.jsonl"
    _, *rest = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(["{}\n", *rest]))
    yield evaluate(w)
    answers.write_text("".join(rest))
    yield evaluate(w)


@advice("{}, question {}: has half of a pair of surrogates, which no file can contain; correct the benchmark's file")
def a_label_that_is_no_text(w: World) -> Steps:
    data = TEXTVQA.write(w / "data")
    file = data.folder / "TextVQA_0.5.1_val.json"
    before = file.read_text()
    answers = json.loads(before)
    answers["data"][0]["answers"][0] = "\ud800"
    file.write_text(json.dumps(answers))
    command = ("eval", "run", "textvqa", "--data", data.folder, "--out", w / "run", "--device", "cpu", "--limit", 1)
    yield command
    file.write_text(before)
