"""Runs of `llava eval run` are read back, and damaged ones are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.eval.runs import read_run, read_runs, read_settings
from tests.eval.runs import write_run, write_scores


def test_a_run_is_read_back(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a/b"], name="tiny")
    write_scores(folder, "mmbench", 61.5, {"all": 61.5, "LR": None}, split="dev_20230712", n=7)
    write_scores(folder, "mm-vet", None)
    run = read_run(folder)
    assert (run.folder, run.name, run.model["zoo"], run.versions) == (folder, "tiny", ["a/b"], {"llava": "1"})
    assert list(run.scores) == ["mm-vet", "mmbench"]
    scores = run.scores["mmbench"]
    assert (scores.value, scores.n, scores.unanswered, scores.metric) == (61.5, 7, 2, "share (%)")
    assert scores.figures == {"all": 61.5, "LR": None}
    assert run.scores["mm-vet"].value is None
    assert read_settings(run, "mmbench") == {"--split": "dev_20230712"}
    assert read_settings(run, "mm-vet") == {}


def test_a_folder_is_a_run_or_contains_runs(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, []) for name in ("b", "a")]
    (tmp_path / "other").mkdir()
    assert [run.folder for run in read_runs(tmp_path)] == sorted(folders)
    assert [run.folder for run in read_runs(folders[0])] == [folders[0]]
    assert read_runs(tmp_path / "other") == []
    with pytest.raises(DataError, match="is not a folder"):
        read_runs(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("run.json", {"schema": "llava-eval-run/2"}, "expected 'llava-eval-run/1'"),
        ("run.json", {"model": ["x"]}, "model is"),
        ("run.json", {"model": {"name": 3}}, "name of the model is 3"),
        ("run.json", {"model": {"name": "m", "zoo": "liuhaotian/llava-v1.5-7b"}}, "expected a list of ids"),
        ("run.json", None, "not valid JSON"),
        ("pope/scores.json", {"task": "mme"}, "task is 'mme'; expected 'pope'"),
        ("pope/scores.json", {"value": "86.1"}, "value is '86.1'"),
        ("pope/scores.json", {"value": float("nan")}, "value is nan"),
        ("pope/scores.json", {"value": True}, "value is True"),
        ("pope/scores.json", {"figures": {"random": float("inf")}}, "random is inf"),
        ("pope/scores.json", {"figures": [1]}, "figures is"),
        ("pope/scores.json", {"n": -1}, "n is -1"),
        ("pope/scores.json", None, "not valid JSON"),
    ],
)
def test_a_damaged_run_is_an_error_that_names_the_file(
    file: str, change: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", [])
    write_scores(folder, "pope", 86.0)
    text = (folder / file).read_text()
    (folder / file).write_text(text[:-9] if change is None else json.dumps(json.loads(text) | change))
    with pytest.raises(DataError, match=message) as error:
        read_runs(folder)
    assert str(folder / file) in str(error.value)
