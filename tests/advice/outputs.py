"""Advice about what is written: targets, disks, merges that are interrupted, and results that differ."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from filelock import FileLock

from llava.checkpoint.open import open_checkpoint
from llava.convert import resume
from llava.convert.convert import convert
from llava.convert.verify import check_equal
from llava.tensors import atomic
from tests.advice.table import Run, Steps, World, advice, say


def to_native(w: World, out: object) -> Run:
    return ("convert", w.llava, out)


def merge_lora(w: World, out: object, *more: object) -> Run:
    return ("merge-lora", "--base", w.llama, "--target", out, "--lora", w.lora, *more)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    usage = shutil.disk_usage("/")
    with mock.patch.object(atomic.shutil, "disk_usage", return_value=usage._replace(free=10)):
        yield


@advice("{}: is a folder; specify the path of a file")
def a_folder_in_place_of_a_plot(w: World) -> Steps:
    run = finished_log(w)
    yield ("train", "--plot", run, "--out", w.tmp)
    yield ("train", "--plot", run, "--out", w / "curves.png")


def finished_log(w: World) -> Path:
    (w / "run").mkdir()
    (w / "run" / "log.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in (1, 2)))
    return w / "run"


@advice("{}: is a file; specify the path of a folder")
def a_file_in_place_of_a_folder(w: World) -> Steps:
    (w / "out").write_text("")
    yield to_native(w, w / "out")
    yield to_native(w, w / "folder")


@advice("{}: is a mount point; specify a folder inside it")
def a_mount_point(w: World) -> Steps:
    with mock.patch.object(Path, "is_mount", lambda path: path == w / "disk"):
        yield to_native(w, w / "disk")
        yield to_native(w, w / "disk" / "folder")


@advice("already exists and is not empty; remove it or specify another folder")
def a_folder_that_is_not_empty(w: World) -> Steps:
    (w / "out").mkdir()
    (w / "out" / "notes.txt").write_text("")
    yield to_native(w, w / "out")
    shutil.rmtree(w / "out")


@advice("but the disk has only {}")
def a_full_disk(w: World) -> Steps:
    with full_disk():
        yield to_native(w, w / "out")


# -------------------------------------------------------------------------------------------------------- merging


@advice("but {} is missing; download the {} again; a LoRA also needs non_lora_trainables.bin")
def a_merge_without_the_projector(w: World) -> Steps:
    folder = w.copy("lora")
    (folder / "non_lora_trainables.bin").unlink()
    command = ("merge-lora", "--base", w.llama, "--target", w / "out", "--lora", folder)
    yield command
    shutil.copy(w.lora / "non_lora_trainables.bin", folder)


@advice("pass a {} folder")
def a_projector_that_is_merged(w: World) -> Steps:
    command = ("merge-lora", "--base", w.llama, "--target", w / "out", "--lora")
    yield (*command, w.projector)
    yield (*command, w.lora)


@advice("use {}")
def a_lora_that_is_applied_as_a_delta(w: World) -> Steps:
    said = yield ("apply-delta", "--base", w.llama, "--target", w / "out", "--delta", w.lora)
    assert said.text.strip().endswith("use llava merge-lora")
    yield merge_lora(w, w / "out")


@advice("{}: {} does not match the recomputed tensor; merge again")
def a_merge_that_computed_something_else(w: World) -> Steps:
    with mock.patch.object(resume.torch, "equal", return_value=False):
        yield merge_lora(w, w / "out", "--verify")


@advice("{}: cannot be written ({}); choose another folder")
def a_merge_into_a_file(w: World) -> Steps:
    (w / "file").write_text("")
    yield merge_lora(w, w / "file" / "out")
    yield merge_lora(w, w / "out")


@advice("another process is writing to it; wait for that process or stop it")
def two_merges_at_once(w: World) -> Steps:
    (w / "out.partial").mkdir()
    with FileLock(w / "out.partial" / ".lock"):
        yield merge_lora(w, w / "out")


@advice("complete files are kept in {}; fix the cause and run the same command again")
def a_disk_that_fills_during_a_merge(w: World) -> Steps:
    with mock.patch.object(resume, "stream_safetensors", side_effect=OSError(28, "No space left on device")):
        yield merge_lora(w, w / "out")


@advice("complete files are kept in {}; run the same command again to resume")
def a_merge_that_is_interrupted(w: World) -> Steps:
    with mock.patch.object(resume, "stream_safetensors", side_effect=KeyboardInterrupt):
        yield merge_lora(w, w / "out")


def started(w: World) -> None:
    with mock.patch.object(resume, "stream_safetensors", side_effect=KeyboardInterrupt):
        say(merge_lora(w, w / "out"))


@advice("remove the folder or choose another target")
def a_merge_after_another_that_is_removed(w: World) -> Steps:
    started(w)
    yield merge_lora(w, w / "out", "--precise")
    shutil.rmtree(w / "out.partial")


@advice("remove the folder or choose another target")
def a_merge_after_another_with_its_own_target(w: World) -> Steps:
    started(w)
    yield merge_lora(w, w / "out", "--precise")
    yield merge_lora(w, w / "other", "--precise")


@advice("{}: {} differs from {}; convert again")
def a_conversion_that_was_changed(w: World) -> Steps:
    convert(w.llava, w / "out")
    (file,) = (w / "out").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    yield lambda: check_equal(open_checkpoint(w.llava), open_checkpoint(w / "out"))
    shutil.rmtree(w / "out")
    convert(w.llava, w / "out")


@advice("but the run was killed before it was renamed; rename it, or remove it to start over")
def a_merge_that_was_killed_at_its_end(w: World) -> Steps:
    assert say(merge_lora(w, w / "out")).well
    (w / "out").rename(w / "out.partial")
    yield merge_lora(w, w / "out")
    (w / "out.partial").rename(w / "out")
    yield ("ask", "Hi", "--model", w / "out", "--max-new-tokens", 1)


@advice("but the run was killed before it was renamed; rename it, or remove it to start over")
def a_merge_that_was_killed_at_its_end_and_starts_over(w: World) -> Steps:
    assert say(merge_lora(w, w / "out")).well
    (w / "out").rename(w / "out.partial")
    yield merge_lora(w, w / "out")
    shutil.rmtree(w / "out.partial")
