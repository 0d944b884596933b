"""Matching a folder with the entries of the catalogue."""

import json
from pathlib import Path

from typer.testing import CliRunner

from llava.checkpoint.detect import detect, read_files
from llava.checkpoint.inspect import describe
from llava.cli import app
from llava.zoo import catalogue as zoo
from llava.zoo.match import Matches, match
from tests import rows, tiny
from tests.command import run_well

LORA = "llava-v1-0719-336px-lora-vicuna-13b-v1.3"


def said(*args: object) -> str:
    """Runs `llava ARGS` in this process and returns its stdout."""
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    return done.stdout


def match_files(folder: Path) -> Matches:
    files = read_files(folder)
    return match(files, detect(files))


def test_check_prints_the_row_with_its_evidence_under_any_folder_name(tmp_path: Path) -> None:
    folder = rows.write_headers(tmp_path / "llava-v1.6-34b", zoo.find("llava-v1.5-7b"))
    text = said("zoo", "check", folder)
    assert "liuhaotian/llava-v1.5-7b\n" in text
    assert "tensors: width 4096" in text
    found = json.loads(run_well("zoo", "check", folder, "--json").stdout)
    assert [one["id"] for one in found["candidates"]] == ["liuhaotian/llava-v1.5-7b"]
    assert found["evidence"]["projector"]["value"] == "mlp2x_gelu"


def test_check_lists_all_rows_that_files_do_not_tell_apart(tmp_path: Path) -> None:
    folder = rows.write_headers(tmp_path / "x", zoo.find("llava-pretrain-vicuna-7b-v1.3"))
    tiny.edit_json(folder / "config.json", _name_or_path=tiny.ABSENT)
    names = {one.entry["id"] for one in match_files(folder).candidates}
    assert {"liuhaotian/llava-pretrain-vicuna-7b-v1.3", "liuhaotian/llava-pretrain-llama-2-7b-chat"} <= names


def test_check_says_of_another_folder_which_row_is_nearest_and_what_differs(checkpoint: Path) -> None:
    text = said("zoo", "check", checkpoint)
    assert "is not in the zoo" in text
    assert "liuhaotian/llava-v1.5-7b\n" in text
    assert "tensors: width 64; the entry has 4096" in text


def test_inspect_prints_the_licence_of_the_base(tmp_path: Path) -> None:
    folder = rows.write_headers(tmp_path / "x", zoo.find(LORA))
    assert any("LLaMA, non-commercial" in note for note in describe(folder).licences)
    assert "base LLM licence (LLaMA, non-commercial)" in said("inspect", folder)


def test_an_mpt_without_model_type_is_matched_too(clip: Path, tmp_path: Path) -> None:
    folder = tiny.write_mpt(tmp_path / "mpt", clip=clip)
    tiny.edit_json(folder / "config.json", model_type=tiny.ABSENT)
    assert match_files(folder).fingerprint["architecture"].value == "mpt"
