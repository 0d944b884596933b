"""Resuming merges that were killed, or that met a full disk, a used target or a second process."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava.convert.merge import MergeOptions, apply_delta
from llava.errors import CheckpointError
from tests import tiny
from tests.command import assert_one_line_error, run, run_well
from tests.merged import DOOR, assert_same, originals, stored

SLOW = """
import sys, time
from pathlib import Path
from llava.convert.merge import MergeOptions, apply_delta
base, target, delta = map(Path, sys.argv[1:])
options = MergeOptions(max_shard_bytes=30_000)
apply_delta(base, target, delta, options, progress=lambda done, total: time.sleep(0.02))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_is_resumed(raw: Path, delta: Path, tmp_path: Path, how: signal.Signals) -> None:
    target, partial = tmp_path / "target", tmp_path / "target.partial"
    slow = subprocess.Popen([sys.executable, "-c", SLOW, raw, target, delta], stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while len(list(partial.glob("*.safetensors"))) < 2 and time.monotonic() < end and slow.poll() is None:
        time.sleep(0.01)
    # a second process does not write into the files of the first
    with pytest.raises(CheckpointError, match="another process is writing"):
        apply_delta(raw, target, delta, MergeOptions(max_shard_bytes=30_000))
    slow.send_signal(how)
    slow.communicate(timeout=60)
    assert not target.exists()
    left = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(left) >= 2
    # a run with other inputs or options does not resume it
    with pytest.raises(CheckpointError, match="partial output of another job"):
        apply_delta(raw, target, delta, MergeOptions(max_shard_bytes=40_000))
    done = apply_delta(raw, target, delta, MergeOptions(max_shard_bytes=30_000, verify=True))
    assert done.taken_over >= 2
    assert not partial.exists()
    assert_same(target, originals(raw, delta))
    after = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    whole = [name for name in left if after[name] == left[name]]
    assert len(whole) == done.taken_over
    for line in (target / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("how", ["bit", "cut"])
def test_a_damaged_shard_is_written_again(raw: Path, delta: Path, tmp_path: Path, how: str) -> None:
    target, partial = tmp_path / "target", tmp_path / "target.partial"

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_delta(raw, target, delta, MergeOptions(max_shard_bytes=30_000), progress=stop)
    file = sorted(partial.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data if how == "bit" else data[:-100])
    whole = len(list(partial.glob("*.safetensors"))) - 1
    done = apply_delta(raw, target, delta, MergeOptions(max_shard_bytes=30_000))
    assert done.taken_over == whole
    assert_same(target, originals(raw, delta))


def interrupted(base: Path, target: Path, delta: Path) -> int:
    """Interrupts a merge halfway and returns the number of shards it leaves."""

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_delta(base, target, delta, MergeOptions(max_shard_bytes=30_000), progress=stop)
    return len(list(target.with_name(f"{target.name}.partial").glob("*.safetensors")))


def test_a_rerun_on_a_disk_that_has_filled_up_keeps_what_is_done(
    raw: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = interrupted(raw, tmp_path / "t", delta)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(CheckpointError, match="free up space"):
            apply_delta(raw, tmp_path / "t", delta, MergeOptions(max_shard_bytes=30_000))
        with pytest.raises(CheckpointError, match="free up space"):
            apply_delta(raw, tmp_path / "fresh", delta)
    assert not (tmp_path / "fresh.partial").exists()
    assert apply_delta(raw, tmp_path / "t", delta, MergeOptions(max_shard_bytes=30_000)).taken_over == left


def test_a_target_that_appears_during_the_merge_loses_no_work(raw: Path, delta: Path, tmp_path: Path) -> None:
    target = tmp_path / "t"

    def take(done: int, total: int) -> None:
        if done == total:
            target.mkdir(exist_ok=True)
            (target / "mine").touch()

    with pytest.raises(CheckpointError, match=r"t\.partial; fix the cause and run the same command again"):
        apply_delta(raw, target, delta, MergeOptions(max_shard_bytes=30_000), progress=take)
    (target / "mine").unlink()
    done = apply_delta(raw, target, delta, MergeOptions(max_shard_bytes=30_000))
    assert done.taken_over == len(done.sha256)
    assert_same(target, originals(raw, delta))
    assert not (target / "merge.json").exists()


@pytest.mark.skipif(not Path("/proc").is_mount(), reason="needs a mount point")
def test_a_target_that_cannot_be_replaced_is_refused_before_the_work(raw: Path, delta: Path) -> None:
    told: list[int] = []
    with pytest.raises(CheckpointError, match="/proc: is a mount point"):
        apply_delta(raw, Path("/proc"), delta, progress=lambda done, total: told.append(done))
    assert not told


def test_a_disk_without_locks_is_used_with_a_warning(
    raw: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # what NFS raises for an exclusive lock on a folder

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", no_locks)
    apply_delta(raw, tmp_path / "t", delta)
    assert "cannot be locked" in caplog.text
    assert_same(tmp_path / "t", originals(raw, delta))


def test_shards_of_a_forced_run_are_not_taken_over_without_force(raw: Path, clip: Path, tmp_path: Path) -> None:
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, **tiny.LLAMA_1)
    tensors = stored(delta)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    for file in delta.glob("pytorch_model*"):
        file.unlink()
    torch.save(tensors, delta / "pytorch_model.bin")

    def stop(done: int, total: int) -> None:
        if done > total * 2 // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_delta(raw, tmp_path / "t", delta, MergeOptions(force=True, max_shard_bytes=30_000), progress=stop)
    with pytest.raises(CheckpointError, match="partial output of another job"):
        apply_delta(raw, tmp_path / "t", delta, MergeOptions(max_shard_bytes=30_000))


def test_a_full_disk_is_one_line_and_leaves_no_target(raw: Path, delta: Path, tmp_path: Path) -> None:
    limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "-"]  # KB
    done = run(*DOOR, "--base", raw, "--target", tmp_path / "t", "--delta", delta, command=limited)
    assert_one_line_error(done, "cannot be written", "run the same command again")
    assert not (tmp_path / "t").exists()
    run_well("--base", raw, "--target", tmp_path / "t", "--delta", delta, command=DOOR)
    assert_same(tmp_path / "t", originals(raw, delta))


@pytest.mark.parametrize("renamed", [True, False])
def test_a_kill_around_the_rename_leaves_a_clean_result(
    raw: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool
) -> None:
    target, partial, rename = tmp_path / "t", tmp_path / "t.partial", Path.rename

    def killed(path: Path, to: Path) -> Path:
        if path.suffix != ".partial":
            return rename(path, to)
        if renamed:
            rename(path, to)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            apply_delta(raw, target, delta)
    if not renamed:
        with pytest.raises(CheckpointError, match=r"t\.partial: is a complete result.*rename it"):
            apply_delta(raw, target, delta)
        partial.rename(target)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]  # no lock beside it
    assert not {"merge.json", ".lock"} & {path.name for path in target.iterdir()}
    assert_same(target, originals(raw, delta))


def test_a_killed_merge_leaves_only_its_partial_folder(raw: Path, delta: Path, tmp_path: Path) -> None:
    interrupted(raw, tmp_path / "t", delta)
    assert [path.name for path in tmp_path.iterdir()] == ["t.partial"]


def test_an_error_found_after_the_writing_names_the_target(
    raw: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.convert.resume._sha256", lambda file: "changed")
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/t/model.*: was changed by a disk error"):
        apply_delta(raw, tmp_path / "t", delta, MergeOptions(verify=True))
    assert not list(tmp_path.iterdir())
