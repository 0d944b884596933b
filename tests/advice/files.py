"""Advice about weight files and JSON files: what is missing, damaged or left over."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.advice.table import Run, Steps, World, advice

SHARD = "model-00002-of-00003.safetensors"
BIN_SHARD = "pytorch_model-00002-of-00003.bin"
INDEX = "model.safetensors.index.json"


def ask(model: object, *more: object) -> Run:
    """Asks a question, which opens and loads the model."""
    return ("ask", "Hi", "--model", model, "--max-new-tokens", 1, *more)


def restored(w: World, name: str, file: str, damage: Callable[[Path], object]) -> Steps:
    """Damages a file of a model, and puts a fresh copy in its place when told to download it again."""
    folder = w.copy(name)
    damage(folder / file)
    yield ask(folder)
    shutil.copy(w.shared[name] / file, folder / file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@advice("the path is not valid UTF-8; rename the folder")
def a_path_that_is_not_utf8(w: World) -> Steps:
    folder = w.copy("single")
    broken = os.fsdecode(os.fsencode(w / "m") + b"\xff")
    folder.rename(broken)
    yield ask(broken)
    Path(broken).rename(folder)
    yield ask(folder)


@advice("GGUF can be written but not read; use the {} that it was converted from")
def a_gguf_file(w: World) -> Steps:
    (w / "model.gguf").write_bytes(b"GGUF")
    yield ask(w / "model.gguf")
    yield ask(w.llava)


@advice("is an export for {} and cannot be loaded by llava; use the checkpoint that it was converted from")
def a_folder_with_an_export(w: World) -> Steps:
    (w / "export").mkdir()
    (w / "export" / "model.gguf").write_bytes(b"GGUF")
    yield ask(w / "export")
    yield ask(w.llava)


@advice("pass the one to use, such as {}")
def a_trainers_output(w: World) -> Steps:
    for step in (10, 20):
        shutil.copytree(w.single, w / "out" / f"checkpoint-{step}")
    said = yield ask(w / "out")
    yield ask(said.text.strip().rpartition("such as ")[2])


@advice("run the zero_to_fp32.py that DeepSpeed put into the folder")
def only_training_state(w: World) -> Steps:
    folder = w.copy("single")
    (folder / "global_step10").mkdir()
    whole = (folder / "model.safetensors").rename(w / "whole")
    yield ask(folder)
    whole.rename(folder / "model.safetensors")  # what DeepSpeed's script writes


@advice("is missing, but {} is present; download the missing file")
def a_missing_file_of_meta(w: World) -> Steps:
    folder = w.copy("meta") / "7B"
    shard = (folder / "consolidated.00.pth").rename(w / "shard")
    yield ask(folder, "--template", "v1")
    shard.rename(folder / "consolidated.00.pth")


@advice("weight_map is missing or invalid; download the file again")
def an_index_without_a_map(w: World) -> Steps:
    yield from restored(w, "sharded", INDEX, lambda file: file.write_text("{}"))


@advice("is missing; download it ({} maps {} to this shard){}")
def a_missing_shard(w: World) -> Steps:
    yield from restored(w, "sharded", SHARD, Path.unlink)


@advice("is missing; download it (the folder contains {} of {} shards)")
def a_missing_numbered_shard(w: World) -> Steps:
    folder = w.copy("sharded")
    (folder / INDEX).unlink()
    (folder / SHARD).unlink()
    yield ask(folder)
    shutil.copy(w.sharded / SHARD, folder)


@advice("which are {} models; remove all but one")
def two_models_in_a_folder(w: World) -> Steps:
    folder = w.copy("sharded")
    shutil.copy(w.single / "model.safetensors", folder)
    yield ask(folder)
    (folder / "model.safetensors").unlink()


def wrong_index(w: World) -> Path:
    folder = w.copy("sharded")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    tiny.write_json(folder / INDEX, index)
    return folder


@advice("index and shards come from different saves: download them all again, or delete the index to load the shards")
def an_index_of_other_shards_that_is_deleted(w: World) -> Steps:
    folder = wrong_index(w)
    yield ask(folder)
    (folder / INDEX).unlink()


@advice("index and shards come from different saves: download them all again, or delete the index to load the shards")
def an_index_of_other_shards_that_is_downloaded(w: World) -> Steps:
    folder = wrong_index(w)
    yield ask(folder)
    shutil.copytree(w.sharded, folder, dirs_exist_ok=True)


@advice("is also in {}; the files come from different saves: download them all again")
def a_tensor_in_two_shards(w: World) -> Steps:
    def add_norm(file: Path) -> None:
        more = {"model.norm.weight": torch.ones(64, dtype=torch.float16)}
        save_file(load_file(file) | more, file, metadata={"format": "pt"})

    yield from restored(w, "sharded", "model-00001-of-00003.safetensors", add_norm)


@advice("are names of the same tensor in two layouts, so the files are a mixture; download them all again")
def a_tensor_under_two_names(w: World) -> Steps:
    def add(file: Path) -> None:
        tensors = load_file(file)
        (norm,) = (name for name in tensors if name.endswith("language_model.model.norm.weight"))
        save_file(tensors | {"model.language_model.norm.weight": tensors[norm].clone()}, file)

    yield from restored(w, "llava_hf", "model.safetensors", add)


@advice("cannot be read as JSON ({}); download the file again")
def a_damaged_config(w: World) -> Steps:
    yield from restored(w, "single", "config.json", truncate)


@advice("is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
def a_git_lfs_pointer(w: World) -> Steps:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield from restored(w, "single", "model.safetensors", lambda file: file.write_text(pointer))


@advice("the key {} is missing; download the file again")
def a_config_without_a_key(w: World) -> Steps:
    folder = w.copy("meta") / "7B"
    tiny.edit_json(folder / "params.json", n_heads=tiny.ABSENT)
    yield ask(folder, "--template", "v1")
    shutil.copy(w.meta / "7B" / "params.json", folder)


@advice("a value has the wrong type ({}); download the file again")
def a_config_with_a_wrong_type(w: World) -> Steps:
    yield from restored(w, "single", "config.json", lambda file: tiny.edit_json(file, architectures=5))


@advice("is damaged or truncated at {} bytes ({}); download it again")
def a_truncated_safetensors_file(w: World) -> Steps:
    yield from restored(w, "single", "model.safetensors", truncate)


@advice("is truncated at {} bytes; download it again")
def a_truncated_bin_file(w: World) -> Steps:
    yield from restored(w, "llava", BIN_SHARD, truncate)


@advice("is empty or a tar archive; expected a file written by torch.save; download it again")
def a_tar_in_place_of_a_bin_file(w: World) -> Steps:
    def pack(file: Path) -> None:
        with tarfile.open(file, "w") as tar:
            tar.add(w.picture)

    yield from restored(w, "llava", BIN_SHARD, pack)


@advice("is damaged or truncated ({}); download it again")
def a_bin_file_of_noise(w: World) -> Steps:
    def cut_records(file: Path) -> None:
        data = file.read_bytes()
        start = data.rindex(b"PK\x01\x02")  # the last entry of the directory
        file.write_bytes(data[:start] + b"PK\x09\x09" + data[start + 4 :])

    yield from restored(w, "llava", BIN_SHARD, cut_records)


@advice("declares {} bytes of tensors, but is only {} bytes long; download it again")
def a_bin_file_that_declares_too_much(w: World) -> Steps:
    def expand(file: Path) -> None:
        torch.save({"model.norm.weight": torch.zeros(1).expand(10**7)}, file)

    yield from restored(w, "llava", BIN_SHARD, expand)


def with_nan(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})


@advice("contains NaN or Inf ({} of {}); download the file again, or pass")
def nan_in_a_file_that_is_downloaded(w: World) -> Steps:
    yield from restored(w, "single", "model.safetensors", with_nan)


@advice("contains NaN or Inf ({} of {}); download the file again, or pass")
def nan_that_is_forced(w: World) -> Steps:
    folder = w.copy("single")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1] = torch.nan  # of a token that is not in the question
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    yield ask(folder)
    yield ask(folder, "--force")
