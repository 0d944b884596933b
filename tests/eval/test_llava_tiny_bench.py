"""The guard of quality: the included model keeps its score in the benchmark of drawn scenes.

A change of the package that costs more than a point fails here, although every other test may pass.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageOps

import llava
from llava.eval.run import evaluate
from llava.eval.runs import SCORES
from llava.eval.task import Answered, Data, Question, Scores, scores
from llava.eval.task_run import TaskRun
from llava.eval.tasks import TASKS
from tests.conftest import PROJECT, Share

TASK = TASKS["llava-tiny"]
RECORD = PROJECT / "benchmarks" / "results" / "2026-11-28-llava-tiny-bench.json"
TOLERANCE = 1.0  # points of the headline
SOME = 60  # questions that are enough to see a fault


def ask(folder: Path, questions: list[Question]) -> Scores:
    """Asks the included model as `llava eval run` does."""
    vlm = llava.load(device="cpu", dtype="float32")
    run = TaskRun(task=TASK, questions=questions, folder=folder)
    run.open({})
    result = evaluate(vlm, run, {})
    assert result is not None
    return result


@pytest.fixture(scope="module")
def asked(share: Share) -> TaskRun:
    """All questions with the replies of the included model."""
    questions = TASK.questions(Data.of(TASK, None))
    folder = share("llava-tiny-bench", lambda folder: ask(folder, questions))
    return TaskRun(task=TASK, questions=questions, folder=folder)


def points_lost(value: float | None, recorded: float) -> float:
    assert value is not None
    return recorded - value


def test_the_included_model_is_at_most_a_point_below_its_recorded_score(asked: TaskRun) -> None:
    found = json.loads((asked.folder / SCORES).read_text("utf-8"))
    recorded = json.loads(RECORD.read_text("utf-8"))
    assert (found["n"], found["unanswered"], found["unjudged"]) == (recorded["questions"], 0, 0)
    shown = {name: (round(value, 2), recorded["figures"][name]) for name, value in found["figures"].items()}
    assert points_lost(found["value"], recorded["value"]) <= TOLERANCE, shown


# mistakes in the preprocessing of pictures
FAULTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "red and blue swapped": lambda image: Image.merge("RGB", image.split()[::-1]),
    "mirrored": ImageOps.mirror,
    "squeezed to a square": lambda image: image.resize((160, 160)),
}


def with_fault(questions: list[Question], fault: str, folder: Path) -> list[Question]:
    if fault == "no pictures":
        return [replace(one, images=()) for one in questions]
    if fault == "pictures of other scenes":
        moved = [*questions[10:], *questions[:10]]
        return [replace(one, images=other.images) for one, other in zip(questions, moved, strict=True)]
    for path in {one.images[0] for one in questions}:
        FAULTS[fault](Image.open(path)).save(folder / path.name, quality=95, subsampling=0)
    return [replace(one, images=(folder / one.images[0].name,)) for one in questions]


@pytest.mark.parametrize("fault", ["no pictures", "pictures of other scenes", *FAULTS])
def test_a_fault_costs_more_than_the_guard_allows(asked: TaskRun, tmp_path: Path, fault: str) -> None:
    some, replies = list(asked.questions[:SOME]), asked.answers()
    sound = scores(TASK, [Answered(one, replies[one.id]["text"]) for one in some], n_questions=SOME)
    assert sound.value is not None
    faulty = ask(tmp_path / "run", with_fault(some, fault, tmp_path))
    assert faulty.unanswered == 0
    assert points_lost(faulty.value, sound.value) > TOLERANCE
    if fault not in FAULTS:
        assert points_lost(faulty.value, 35) > 0  # what is guessed without the right picture


def test_the_documented_figures_are_the_recorded_ones() -> None:
    recorded = json.loads(RECORD.read_text("utf-8"))
    page = (PROJECT / "docs" / "evaluation.md").read_text("utf-8")
    for name, value in {"headline": recorded["value"], **recorded["figures"]}.items():
        assert f"| {name} | {value:.1f} |" in page
