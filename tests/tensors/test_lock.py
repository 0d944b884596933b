"""Exclusive locks on folders."""

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.tensors.lock import locked
from tests import command

HOLDER = """if True:
    import os, sys, time
    from pathlib import Path
    from llava.errors import ConfigError
    from llava.tensors.lock import locked
    folder = Path(sys.argv[1])
    with locked(folder, folder / ".lock", ConfigError("busy")):
        worker = os.fork() == 0
        os.write(1, b"worker\\n" if worker else b"main\\n")  # by now, the worker has closed its copy of the lock
        time.sleep(60)"""
BUSY = ConfigError("another process is writing here")


def test_a_forked_worker_does_not_keep_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    argv = [command.sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=command.PROJECT, start_new_session=True)
    try:
        assert holder.stdout is not None
        assert {holder.stdout.readline() for _ in range(2)} == {b"main\n", b"worker\n"}
        with pytest.raises(ConfigError, match="is writing here"), locked(tmp_path, tmp_path / ".lock", BUSY):
            pass
        holder.kill()
        holder.wait()
        with locked(tmp_path, tmp_path / ".lock", BUSY):
            os.killpg(holder.pid, 0)  # the forked process is still alive
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_one_warning_and_no_marker(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(handle: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", fail)
    with locked(tmp_path, tmp_path / ".lock", BUSY), locked(tmp_path, tmp_path / ".lock", BUSY):
        pass
    assert [record.message.count("cannot be locked") for record in caplog.records] == [1, 1]
    assert not list(tmp_path.iterdir())
