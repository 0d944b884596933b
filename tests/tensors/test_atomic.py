"""Files and folders that appear only when they are complete, and what killed processes leave of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import CheckpointError
from llava.tensors.atomic import check_space, new_file, new_folder, size_text
from tests import command

pytest.importorskip("fcntl")

WRITER = """if True:
    import sys, time
    from pathlib import Path
    from llava.tensors.atomic import new_file, new_folder
    kind, target = sys.argv[1], Path(sys.argv[2])
    with {"file": new_file, "folder": new_folder}[kind](target, 0) as partial:
        (partial if kind == "file" else partial / "a").write_text("half")
        print(partial.name, flush=True)
        time.sleep(60)"""


def begin(kind: str, target: Path) -> tuple[subprocess.Popen[str], Path]:
    """Starts a process that writes `target`, and returns it with its temporary file or folder."""
    argv = [sys.executable, "-c", WRITER, kind, str(target)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=command.PROJECT, text=True)
    assert process.stdout is not None
    return process, target.with_name(process.stdout.readline().strip())


def write(kind: str, target: Path) -> None:
    with (new_file if kind == "file" else new_folder)(target, 0) as partial:
        (partial if kind == "file" else partial / "a").write_text("whole")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_write_of_a_target_removes_what_a_killed_process_left(kind: str, tmp_path: Path) -> None:
    process, partial = begin(kind, tmp_path / "out")
    try:
        write(kind, tmp_path / "other")
        write(kind, tmp_path / "out")
        assert partial.exists()  # its process is alive
    finally:
        process.kill()
        process.communicate()
    write(kind, tmp_path / "another")
    assert partial.exists()  # belongs to another target
    shutil.rmtree(tmp_path / "out") if kind == "folder" else (tmp_path / "out").unlink()
    write(kind, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "other", "out"]


@pytest.mark.parametrize("name", [".out.partial-2", ".out.partial-abcdef-abcdef-12345678", ".out.partial-notes"])
def test_what_may_belong_to_another_host_is_kept(name: str, tmp_path: Path) -> None:
    """Another host's locks may be invisible here; so may those of another version."""
    (tmp_path / name).mkdir()
    write("folder", tmp_path / "out")
    assert (tmp_path / name).is_dir()


def test_two_processes_may_write_one_target_and_the_second_is_told(tmp_path: Path) -> None:
    def both() -> None:
        with new_folder(tmp_path / "out", 0) as mine:
            (mine / "a").write_text("mine")
            write("folder", tmp_path / "out")

    with pytest.raises(CheckpointError, match=r"out: cannot be written \(Directory not empty\)"):
        both()
    assert (tmp_path / "out" / "a").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_about_a_temporary_folder_names_the_target(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, new_folder(tmp_path / "out", 0) as partial:
        raise CheckpointError(f"{partial / 'model.safetensors'}: is broken")
    assert str(caught.value) == f"{tmp_path / 'out' / 'model.safetensors'}: is broken"


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (4096, "4.10 kB"), (2_500_000, "2.50 MB"), (13e9, "13.00 GB")],
)
def test_a_size_has_a_unit_in_which_it_is_not_zero(n_bytes: int, text: str) -> None:
    assert size_text(n_bytes) == text


def test_a_full_disk_is_reported_before_the_write_in_fitting_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=700_000))
    with pytest.raises(CheckpointError, match=r"out: needs 4\.00 MB, but the disk has only 700\.00 kB free"):
        check_space(tmp_path / "not" / "yet", 4_000_000, tmp_path / "out")
