"""The writer of the benchmark of drawn scenes."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from examples.tiny import bench
from examples.tiny.dataset import TRAINING_SEEDS
from examples.tiny.glyphs import Glyphs
from llava.eval.task import Answered, Data, check_images, scores
from llava.eval.tasks import TASKS

GLYPHS = Path(__file__).parent / "glyphs"
TASK = TASKS["llava-tiny"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "llava-tiny"
    main("--out", folder)
    return folder


def main(*options: object, expected_status: int = 0) -> str:
    app = typer.Typer()
    app.command()(bench.main)
    done = CliRunner().invoke(app, ["--glyphs", str(GLYPHS), "--n", "20", *map(str, options)])
    assert done.exit_code == expected_status, done.output
    return done.output


def test_the_files_depend_only_on_the_seed(written: Path) -> None:
    files = bench.files(Glyphs.load(GLYPHS), 20, 0)
    assert {name: (written / name).read_bytes() for name in files} == files
    assert len(files) == 2 + 20
    assert bench.files(Glyphs.load(GLYPHS), 20, 1)["questions.jsonl"] != files["questions.jsonl"]


def test_the_task_reads_the_files_and_gives_the_reference_answers_all_marks(written: Path) -> None:
    questions = TASK.questions(Data.of(TASK, written))
    check_images(questions)
    assert {group for one in questions for group in one.groups} >= {"conv", "detail", "complex", "counting"}
    result = scores(TASK, [Answered(one, one.answer) for one in questions], n_questions=len(questions))
    assert set(result.figures.values()) == {100}


def test_scenes_have_seeds_that_training_never_uses_and_different_questions(written: Path) -> None:
    lines = [json.loads(line) for line in (written / "questions.jsonl").read_text("utf-8").splitlines()]
    assert min(line["seed"] for line in lines) >= TRAINING_SEEDS
    for image in {line["image"] for line in lines}:
        own = [line for line in lines if line["image"] == image]
        assert len({line["kind"] for line in own}) == len(own)
        assert [line["category"] for line in own].count("detail") == 1


def test_a_folder_that_exists_is_left_alone(written: Path) -> None:
    before = sorted(written.rglob("*"))
    assert main("--out", written, expected_status=2).startswith(f"bench: {written}")
    assert sorted(written.rglob("*")) == before
