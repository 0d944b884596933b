"""Which weight files of a folder are opened when several saves, or an incomplete one, left files in it."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

import llava
from llava.tensors.files import Weights
from llava.tensors.shards import open_weights
from tests import tiny
from tests.checkpoints import assert_same, opened, tensors_of

INDEX = "model.safetensors.index.json"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return tiny.write_llama(tmp_path / "whole", layout="safetensors")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return tiny.write_llama(tmp_path / "shards", layout="safetensors-shards")


def refusal(folder: Path) -> str:
    with pytest.raises(llava.LlavaError) as caught:
        opened(folder)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["safetensors-shards", "bin-shards"])
def test_numbered_shards_load_without_their_index(whole: Path, tmp_path: Path, layout: tiny.Layout) -> None:
    folder = tiny.write_llama(tmp_path / "llama", layout=layout)
    next(folder.glob("*.index.json")).unlink()
    assert_same(tensors_of(opened(folder)), tensors_of(opened(whole)))


def test_a_stale_index_beside_a_whole_file_is_ignored_with_a_warning(
    whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = Weights([whole / "model.safetensors"])
    tiny.write_json(whole / INDEX, {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")})
    with caplog.at_level(logging.WARNING):
        assert list(open_weights(whole)) == list(names)
    assert "model-00001-of-00002.safetensors: is missing" in caplog.text
    assert "model.safetensors is loaded instead" in caplog.text


def test_an_index_of_other_shards_is_ignored_if_one_set_of_shards_is_complete(
    shards: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = json.loads((shards / INDEX).read_text())["weight_map"]
    tiny.write_json(shards / INDEX, {"weight_map": {name: "model-00001-of-00009.safetensors" for name in table}})
    with caplog.at_level(logging.WARNING):
        assert_same(tensors_of(opened(shards)), tensors_of(opened(whole)))
    assert "model-00001-of-00009.safetensors" in caplog.text


def test_a_missing_shard_is_named_together_with_the_files_that_are_present(shards: Path) -> None:
    (shards / "model-00002-of-00003.safetensors").unlink()
    text = refusal(shards)
    assert "model-00002-of-00003.safetensors: is missing; download it" in text
    assert "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in text
    (shards / INDEX).unlink()
    assert "the folder contains 2 of 3 shards" in refusal(shards)


def test_bin_files_replace_incomplete_safetensors(shards: Path, whole: Path, tmp_path: Path) -> None:
    (shards / "model-00002-of-00003.safetensors").unlink()
    other = tiny.write_llama(tmp_path / "other", layout="bin")
    shutil.copy(other / "pytorch_model.bin", shards)
    assert_same(tensors_of(opened(shards)), tensors_of(opened(whole)))


def test_a_whole_file_beside_complete_shards_is_refused_because_their_values_may_differ(
    shards: Path, whole: Path
) -> None:
    shutil.copy(whole / "model.safetensors", shards)
    text = refusal(shards)
    assert "model.safetensors and model-00001-of-00003.safetensors" in text
    assert "remove all but one" in text
    (shards / "model.safetensors").unlink()  # what the message advises
    opened(shards)


def test_deleting_an_index_that_contradicts_its_shards_loads_them(shards: Path, whole: Path) -> None:
    table = json.loads((shards / INDEX).read_text())["weight_map"]
    table["model.norm.weight"] = "model-00001-of-00003.safetensors"
    tiny.write_json(shards / INDEX, {"weight_map": table})
    assert "delete the index" in refusal(shards)
    (shards / INDEX).unlink()  # what the message advises
    assert_same(tensors_of(opened(shards)), tensors_of(opened(whole)))


def test_the_only_checkpoint_in_the_output_of_a_trainer_is_loaded(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run / "checkpoint-20")
    (run / "training_args.bin").write_bytes(b"arguments")
    shutil.copy(whole / "config.json", run)
    with caplog.at_level(logging.WARNING):
        assert_same(tensors_of(opened(run)), tensors_of(opened(whole)))
    assert "checkpoint-20" in caplog.text


def test_several_checkpoints_of_a_trainer_are_named_and_each_of_them_loads(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (20, 100):
        shutil.copytree(whole, run / f"checkpoint-{step}")
    text = refusal(run)
    assert "checkpoint-20, checkpoint-100" in text
    opened(run / "checkpoint-20")


def test_a_model_beside_its_trainer_checkpoints_is_the_model(whole: Path, tmp_path: Path) -> None:
    tiny.write_llama(whole / "checkpoint-20", seed=5)
    tiny.write_llama(whole / "checkpoint-40", seed=6)
    alone = tiny.write_llama(tmp_path / "alone", layout="safetensors")
    assert_same(tensors_of(opened(whole)), tensors_of(opened(alone)))


@pytest.mark.parametrize("name", ["llava.safetensors", "model.fp16.safetensors"])
def test_the_only_safetensors_file_is_loaded_under_any_name(
    whole: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tensors_of(opened(whole))
    (whole / "model.safetensors").rename(whole / name)
    assert_same(tensors_of(opened(whole)), expected)
    assert name in caplog.text


@pytest.mark.parametrize("name", ["weights.pt", "model.msgpack"])
def test_a_folder_without_readable_weights_says_what_it_contains(whole: Path, name: str) -> None:
    (whole / "model.safetensors").rename(whole / name)
    text = refusal(whole)
    assert f"has no weights, but contains {name}" in text
    assert "model*.safetensors" in text


def test_the_state_of_deepspeed_is_not_a_model(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    (whole / "global_step40").mkdir()
    assert "zero_to_fp32.py" in refusal(whole)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "model.fp16.safetensors"])
def test_a_named_pipe_is_not_a_weight_file(shards: Path, name: str) -> None:
    for file in shards.glob("model-*-of-*") if name.startswith("model.fp16") else [shards / name]:
        file.unlink()
    os.mkfifo(shards / name)  # opening it would block
    (shards / INDEX).unlink()
    refusal(shards)


def test_a_git_lfs_pointer_is_named_as_such(whole: Path) -> None:
    for name in ("tokenizer.model", "model.safetensors", "config.json"):
        (whole / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\n")
        assert f"{name}: is a Git LFS pointer" in refusal(whole)
