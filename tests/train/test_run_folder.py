"""The folder of a run: one recipe, one run at a time."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava.errors import ConfigError, LlavaError
from llava.train.loop import train
from llava.train.recipe import Recipe
from llava.train.run_folder import check_folder
from tests import command
from tests.training import Assets, recipe


def test_a_finished_run_is_reported_and_left_unchanged(finished: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    before = command.files(Path(finished.output_dir))
    assert train(finished, device="cpu") == Path(finished.output_dir) / "model"
    assert "already finished" in caplog.text
    assert command.files(Path(finished.output_dir)) == before


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"lr": 2e-3}, "lr"),
        ({"seed": 1}, "seed"),
        ({"global_batch_size": 3}, "global_batch_size"),
        ({"packing": False}, "packing"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(finished: Recipe, changes: dict[str, Any], key: str) -> None:
    shutil.rmtree(Path(finished.output_dir) / "model")
    with pytest.raises(ConfigError, match=f"differs in {key}; set output_dir="):
        train(replace(finished, **changes), device="cpu")


def test_a_finished_run_of_another_recipe_is_refused(finished: Recipe) -> None:
    with pytest.raises(ConfigError, match="differs in lr; set output_dir="):
        train(replace(finished, lr=3e-3), device="cpu")


def test_a_start_that_failed_does_not_claim_the_folder(assets: Assets, tmp_path: Path) -> None:
    mistaken = recipe(assets, tmp_path / "run", model="no/such/model", lr=5e-3)
    with pytest.raises(LlavaError, match="no/such/model"):
        train(mistaken, device="cpu")
    (tmp_path / "run" / "tokenizer").mkdir()  # as a start with new tokens leaves it
    train(recipe(assets, tmp_path / "run", max_steps=1), device="cpu")
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["model"] == str(assets.llava)
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_changed_data_at_the_same_path_is_refused(assets: Assets, tmp_path: Path) -> None:
    samples = json.loads(assets.data.read_text())
    (tmp_path / "data.json").write_text(json.dumps(samples))
    asked = recipe(assets, tmp_path / "run", data=str(tmp_path / "data.json"))
    train(asked, device="cpu")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "data.json").write_text(json.dumps(samples[:-1]))
    with pytest.raises(
        ConfigError, match=f"started with {len(samples)} samples, but its data files now contain {len(samples) - 1}"
    ):
        train(asked, device="cpu")


def test_a_folder_with_other_files_is_refused_and_not_touched(assets: Assets, tmp_path: Path) -> None:
    thesis = tmp_path / "run" / "model" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    with pytest.raises(ConfigError, match=r"not a run folder; set output_dir="):
        train(recipe(assets, tmp_path / "run"), device="cpu")
    with pytest.raises(ConfigError, match=r"not a run folder; set output_dir="):
        train(recipe(assets, thesis), device="cpu")
    with pytest.raises(LlavaError, match="cannot be written"):
        train(recipe(assets, Path("/proc/run")), device="cpu")
    assert command.files(tmp_path / "run") == {"model": thesis.parent.lstat().st_size, "model/thesis.txt": 4}


def test_partial_files_of_killed_runs_are_removed_at_the_start(finished: Recipe) -> None:
    out = Path(finished.output_dir)
    (out / "model").rename(out / ".model.partial-12345")
    (out / "checkpoints" / ".step-00000003.partial").mkdir()
    train(finished, device="cpu")
    assert not [path for path in out.rglob(".*") if "partial" in path.name]


@pytest.mark.parametrize(("changes", "same"), [({}, True), ({"export": "native"}, True), ({"seed": 7}, False)])
def test_a_run_of_an_earlier_version_has_the_defaults_of_keys_that_it_did_not_know(
    finished: Recipe, changes: dict[str, Any], same: bool
) -> None:
    file = Path(finished.output_dir) / "recipe.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in saved.items() if key not in ("export", "order", "eps")}))
    shutil.rmtree(Path(finished.output_dir) / "model")
    if same:
        check_folder(Path(finished.output_dir), replace(finished, **changes))
    else:
        with pytest.raises(ConfigError, match="differs in seed"):
            check_folder(Path(finished.output_dir), replace(finished, **changes))
