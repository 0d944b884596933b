"""`llava zoo --runs`: measured scores stand beside the published ones of the same checkpoint, and of no other."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.eval.published import published, read_measured
from llava.zoo import catalogue
from tests.command import assert_one_line_error, run, run_well
from tests.eval.runs import Figures, write_run, write_scores

V15, V16 = "liuhaotian/llava-v1.5-7b", "liuhaotian/llava-v1.6-vicuna-7b"
V1 = "liuhaotian/llava-v1-0719-336px-lora-vicuna-13b-v1.3"
REEXPORT = "llava-hf/llava-1.5-7b-hf"
BENCH: Figures = {"all": 60.0, "conv": 50.0, "detail": 62.5, "complex": 80.0}
MME: Figures = {"perception": 1500.0, "cognition": 300.0}


@pytest.mark.parametrize(
    ("id", "task", "value", "figures", "split", "expected"),
    [
        (V15, "pope", 85.0, {"random": 88.0}, None, {"POPE": (85.0, 85.9)}),
        (V15, "vqav2", 78.5, {}, "val", {"VQAv2": (78.5, 78.5)}),
        (V15, "gqa", 61.0, {}, None, {"GQA": (61.0, 62.0)}),
        (V15, "vizwiz", 51.0, {}, None, {"VizWiz": (51.0, 50.0)}),
        (V15, "scienceqa", 71.0, {"IMG": 1.0, "image": 67.0}, None, {"SQA": (67.0, 66.8)}),
        (V15, "textvqa", 58.0, {}, None, {"TextVQA": (58.0, 58.2)}),
        (V15, "mm-vet", 31.0, {}, None, {"MM-Vet": (31.0, 31.1)}),
        (V15, "mme", 1500.0, MME, None, {"MME": (1500.0, 1510.7), "MME cognition": (300.0, None)}),
        (V16, "mme", 1500.0, MME, None, {"MME": (1500.0, 1519.0), "MME cognition": (300.0, 332.0)}),
        (V15, "mmbench", 64.0, {}, "dev_20230712", {"MM-Bench": (64.0, 64.3)}),
        (V15, "mmbench", 58.0, {}, "dev_cn_20231003", {"MM-Bench-CN": (58.0, 58.3)}),
        (V16, "seed", 70.0, {"image": 70.0}, "image", {"SEED-IMG": (70.0, 70.2)}),
        (V15, "seed", 58.0, {"image": 66.0, "video": 37.0}, "all", {"SEED-IMG": (66.0, None), "SEED": (58.0, 58.6)}),
        (REEXPORT, "pope", 85.0, {}, None, {"POPE": (85.0, 85.9)}),
        (V15, "perplexity", 5.4, {}, None, {}),
        (V15, "llava-bench-coco", 80.0, {"conv": 80.0}, None, {}),
        (V15, "pope", None, {"random": None}, None, {}),
        (
            *(V15, "llava-bench-wild", 60.0, BENCH, None),
            {"LLaVA-Bench-Wild": (60.0, 65.4), "conv": (50.0, None), "detail": (62.5, None), "complex": (80.0, None)},
        ),
        (
            *(V1, "llava-bench-wild", 60.0, BENCH, None),
            {"overall": (60.0, 70.1), "conv": (50.0, 64.3), "detail": (62.5, 55.9), "complex": (80.0, 81.7)},
        ),
    ],
)
def test_a_score_stands_beside_its_column_of_the_zoo(
    id: str,
    task: str,
    value: float | None,
    figures: Figures,
    split: str | None,
    expected: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "run", [id])
    write_scores(folder, task, value, figures, split=split)
    (found,) = read_measured(folder)
    assert {column: (one.measured, one.published) for column, one in found.scores.items()} == expected
    assert found.entry is not None
    assert (found.entry["id"], found.problem) == (id, "")
    (known,) = found.tasks
    assert (known.task, known.value, known.n, known.split, known.in_zoo) == (task, value, 10, split, bool(expected))


def test_every_published_score_is_a_number_under_its_column() -> None:
    for entry in catalogue.entries():
        given = catalogue.origin(entry).get("scores") or {}
        found = published(entry)
        assert set(found) - {"MME cognition"} == set(given)
        assert all(found[column] == float(score) for column, score in given.items() if not isinstance(score, str))
    assert published(catalogue.find("llava-v1.6-34b"))["MME cognition"] == 397


@pytest.mark.parametrize(
    ("zoo", "problem"),
    [
        ([], "its files are those of no entry"),
        ([V15, REEXPORT], "do not distinguish these 2 entries"),
        (["liuhaotian/llava-v9"], "liuhaotian/llava-v9 is not in this version of the zoo"),
    ],
)
def test_nothing_published_stands_beside_a_checkpoint_that_is_no_single_entry(
    zoo: list[str], problem: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "llava-v1.5-7b", zoo, name="llava-v1.5-7b", path="liuhaotian/llava-v1.5-7b")
    write_scores(folder, "pope", 85.0)
    (found,) = read_measured(folder)
    assert found.entry is None
    assert problem in found.problem
    assert (found.scores["POPE"].measured, found.scores["POPE"].difference) == (85.0, None)


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains no evaluation run; expected run\.json"):
        read_measured(tmp_path)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    first = write_run(tmp_path / "first", [V15])
    write_scores(first, "pope", 85.0, n=8910)
    write_scores(first, "perplexity", 5.4321)
    write_scores(write_run(tmp_path / "second", [V15]), "pope", 86.4)
    write_scores(write_run(tmp_path / "third", []), "gqa", 60.0)
    write_run(tmp_path / "unfinished", [V16])
    return tmp_path


def test_tables_show_each_row_and_its_runs(runs: Path) -> None:
    lines = run_well("zoo", "--runs", runs).stdout.splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    at = names.index(V15)
    assert names[at : at + 3] == [V15, "first", "second"]
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert cells["first"] == ["85.0", "(-0.9)"]
    assert cells["second"] == ["86.4", "(+0.5)"]
    assert "85.9" in cells[V15]
    assert cells["third"] == ["60.0"]
    scored = {entry["id"] for entry in catalogue.entries() if published(entry)}
    assert scored <= set(names)
    text = "\n".join(lines)
    assert f"{runs / 'third'}: mine; its files are those of no entry of the zoo" in text
    assert f"{runs / 'unfinished'}: mine\n  no scores yet" in text
    assert "  perplexity: 5.432, 10 questions, 2 unanswered" in text
    assert "  pope: 8,910 questions, 2 unanswered" in text


def test_json_has_the_published_scores_and_the_runs(runs: Path) -> None:
    value = json.loads(run_well("zoo", "--runs", runs, "--json").stdout)
    assert [entry["id"] for entry in value["entries"]] == [entry["id"] for entry in catalogue.entries()]
    by_id = {entry["id"]: entry["published"] for entry in value["entries"]}
    assert by_id[V15]["POPE"] == 85.9
    first, _, third, unfinished = value["runs"]
    assert (first["entry"], first["scores"]["POPE"]["published"]) == (V15, 85.9)
    assert first["scores"]["POPE"]["difference"] == pytest.approx(-0.9)
    assert (third["entry"], third["candidates"]) == (None, [])
    assert (unfinished["entry"], unfinished["tasks"]) == (V16, [])


def test_filters_that_leave_out_runs_say_so(runs: Path) -> None:
    text = run_well("zoo", "--runs", runs, "--base-llm", "Yi").stdout
    assert "liuhaotian/llava-v1.6-34b" in text
    assert V15 not in text
    assert "3 runs of entries that the filters leave out" in text


def test_a_damaged_run_is_one_line(runs: Path) -> None:
    (runs / "first" / "run.json").write_text("{")
    assert_one_line_error(run("zoo", "--runs", runs), "run.json: not valid JSON")


def test_a_split_that_is_no_name_is_one_line(runs: Path) -> None:
    write_scores(runs / "first", "gqa", 60.0)
    (runs / "first" / "gqa" / "settings.json").write_text('{"--split": 5}')
    assert_one_line_error(run("zoo", "--runs", runs), "settings.json: --split is 5; expected a name or null")
