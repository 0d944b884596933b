"""Advice about runs of an evaluation that are compared or shown."""

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

from tests.advice.table import Run, Steps, World, advice, say
from tests.eval.answered import pope_questions, right, write_run
from tests.eval.pope import write_pope


def ask(w: World) -> Run:
    """Asks llava-tiny three questions of POPE."""
    if not (w / "data").exists():
        write_pope(w / "data", per_split=1)
    return ("eval", "run", "pope", "--data", w / "data", "--out", w / "run", "--device", "cpu")


def compare(w: World, *more: object) -> Run:
    return ("eval", "compare", w / "run", other(w), *more)


def other(w: World) -> Path:
    return w / "other" if (w / "other").exists() else a_run(w, "other")


def a_run(w: World, name: str) -> Path:
    return write_run(w / name, {"pope": (pope_questions(w.tmp, 30), right)})


@advice("charts need matplotlib, which cannot be imported ({}); install it with pip install 'llava-native[eval]'")
def a_report_without_matplotlib(w: World) -> Steps:
    with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
        yield ask(w)
    shutil.rmtree(w / "run")


@advice("{}: contains no run; expected a folder that llava eval run wrote, with {} in it")
def a_folder_without_runs(w: World) -> Steps:
    (w / "run").mkdir()
    yield compare(w)
    a_run(w, "run")


@advice("found {} ({}); give the folders of two runs or more")
def one_run_to_compare(w: World) -> Steps:
    yield ("eval", "compare", a_run(w, "run"))
    yield compare(w)


@advice("{}: cannot be written ({}); choose another folder with --out")
def a_comparison_below_a_file(w: World) -> Steps:
    (w / "file").write_text("")
    a_run(w, "run")
    yield compare(w, "--out", w / "file" / "out")
    yield compare(w, "--out", w / "out")


@advice("{}: has no scores yet; finish it with the same llava eval run command")
def a_run_without_scores(w: World) -> Steps:
    say(ask(w))
    (w / "run" / "pope" / "scores.json").unlink()
    yield compare(w)
    say(ask(w))


@advice("{}: its items do not give the value {}; remove this file, and {}")
def scores_that_do_not_follow(w: World) -> Steps:
    say(ask(w))
    scores = w / "run" / "pope" / "scores.json"
    scores.write_text(json.dumps(json.loads(scores.read_text()) | {"value": 3.0}))
    yield compare(w)
    scores.unlink()
    say(ask(w))


@advice("run the llava eval run command of this folder again, which writes it")
def a_run_without_its_questions(w: World) -> Steps:
    say(ask(w))
    (w / "run" / "pope" / "questions.jsonl").unlink()
    yield ("eval", "show", w / "run")
    say(ask(w))


@advice("{} left out of the page; set pictures= (--pictures) to more megabytes")
def more_pictures_than_the_page_may_have(w: World) -> Steps:
    yield ("eval", "show", a_run(w, "run"), "--pictures", 0)
    yield ("eval", "show", w / "run", "--pictures", 1)


@advice("{}: --split is {}; expected a name or null")
def a_split_that_is_no_text(w: World) -> Steps:
    settings = a_run(w, "run") / "pope" / "settings.json"
    before = settings.read_text()
    settings.write_text(json.dumps(json.loads(before) | {"--split": 3}))
    yield ("zoo", "--runs", w / "run")
    settings.write_text(json.dumps(json.loads(before) | {"--split": None}))
