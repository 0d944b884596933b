"""Compiled kernels are kept where no other user can write."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.cli.kernel_cache import chosen_folders, folders, open_private, private_folder, use_private_folder

VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME", "XDG_CACHE_HOME")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no variables that name others. What a test sets is restored."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "llava" / "kernels"


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def foreign(folder: Path) -> Path:
    """A folder of another user."""
    if os.getuid():
        return Path("/usr")  # belongs to root
    folder.mkdir(parents=True)
    os.chown(folder, 65534, -1)
    return folder


def test_a_new_folder_is_private(cache: Path, caplog: pytest.LogCaptureFixture):
    assert open_private(private_folder()) == cache
    assert mode(cache) == 0o700
    assert not caplog.records


def test_a_folder_that_others_can_read_becomes_private_and_keeps_its_kernels(cache: Path):
    cache.mkdir(parents=True, mode=0o755)
    (cache / "kernel").touch()
    assert open_private(cache) == cache
    assert mode(cache) == 0o700
    assert (cache / "kernel").is_file()


@pytest.mark.parametrize("permissions", [0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(
    cache: Path, permissions: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(permissions)
    used = open_private(cache)
    assert not used.is_relative_to(cache.parent)
    assert mode(used) == 0o700
    assert f"is writable by other users (mode {permissions:o})" in caplog.text
    assert mode(cache) == permissions


def test_a_folder_of_another_user_is_not_used(cache: Path, caplog: pytest.LogCaptureFixture):
    folder = foreign(cache)
    assert open_private(folder) != folder
    assert f"belongs to user {folder.stat().st_uid}, not to user {os.getuid()}" in caplog.text


def test_a_folder_that_cannot_be_created_is_replaced(cache: Path, caplog: pytest.LogCaptureFixture):
    cache.parent.write_text("a file")
    assert mode(open_private(cache)) == 0o700
    assert "cannot be used (Not a directory)" in caplog.text


def test_following_the_advice_ends_the_warning(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    open_private(private_folder())
    assert "Remove it, or set XDG_CACHE_HOME to a folder of your own" in caplog.text
    caplog.clear()
    with monkeypatch.context() as changed:
        changed.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
        open_private(private_folder())
    cache.rmdir()
    open_private(private_folder())
    assert not caplog.records


def test_folders_that_variables_name_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch):
    assert chosen_folders() == {}
    assert folders() == {"triton": cache / "triton", "inductor": cache / "inductor"}
    monkeypatch.setenv("TRITON_HOME", "/home-of-triton")
    assert chosen_folders() == {"triton": Path("/home-of-triton/.triton/cache")}
    monkeypatch.setenv("TRITON_CACHE_DIR", "/triton")
    assert folders() == {"triton": Path("/triton"), "inductor": cache / "inductor"}


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert private_folder() == Path.home() / ".cache/llava/kernels"


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_no_folder_is_made(cache: Path, device: str):
    use_private_folder(device)
    assert not cache.exists()
    assert chosen_folders() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")
def test_on_a_gpu_triton_and_inductor_use_the_folder(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/own")
    use_private_folder("auto")
    assert chosen_folders() == {"triton": cache / "triton", "inductor": Path("/own")}
    assert mode(cache) == 0o700


def test_a_temporary_folder_is_removed_when_the_process_ends(tmp_path: Path):
    code = "import sys; from llava.cli.kernel_cache import *; print(open_private(Path(sys.argv[1])))"
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "file"], capture_output=True, text=True, check=True)
    assert "cannot be used" in done.stderr
    assert not Path(done.stdout.strip()).exists()
