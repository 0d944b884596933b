"""Runs commands: in separate processes with real pipes, or in this process."""

import atexit
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.forkserver import fast_llava

PROJECT = Path(__file__).resolve().parent.parent
SCRIPT = Path(sys.executable).parent / "llava"
LLAVA = [str(SCRIPT)] if SCRIPT.is_file() else [sys.executable, "-m", "llava.cli"]
CONVERT_HF = [sys.executable, str(PROJECT / "scripts" / "convert_hf_checkpoint.py")]
TIMEOUT_S = 120


@functools.cache
def forked_llava() -> list[str]:
    """The command of tests/forkserver.py. Its server starts with the first call and ends with this process."""
    stack = ExitStack()
    atexit.register(stack.close)
    return [str(stack.enter_context(fast_llava()) / "llava")]


def run(*args: object, stdin: bytes | None = None, command: Sequence[str] | None = None, **options: Any) -> Any:
    """Runs `llava ARGS` and returns a CompletedProcess with text in stdout and stderr.

    Without `command` it runs in a fork of a process that has imported torch; `command=LLAVA` runs the installed script.
    """
    source = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    default = LLAVA if "preexec_fn" in options else forked_llava()  # a fork does not inherit the limits of its client
    argv = [*(command or default), *map(str, args)]
    done = subprocess.run(argv, capture_output=True, timeout=TIMEOUT_S, check=False, **source, **options)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def run_well(*args: object, **options: Any) -> Any:
    """Like `run`, and asserts that the command succeeds."""
    done = run(*args, **options)
    assert done.returncode == 0, done.stderr
    return done


def start(*args: object, **options: Any) -> subprocess.Popen[bytes]:
    """Starts `llava ARGS` with pipes for stdin, stdout and stderr. Stop it with `interrupt` or `kill`."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*LLAVA, *map(str, args)], bufsize=0, **(pipes | options))


def interrupt(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """Sends Ctrl-C and returns exit code, stdout and stderr."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out.decode(errors="replace"), err.decode()


def wait_for_output(process: subprocess.Popen[bytes], text: str = "") -> str:
    """Waits until stdout holds `text` and something other than white space, and returns the output so far."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    seen, end = "", time.monotonic() + TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        seen += (process.stdout.read(65536) or b"").decode(errors="replace")
        if seen.strip() and text in seen:
            os.set_blocking(process.stdout.fileno(), True)
            return seen
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"{text!r} did not appear; stdout: {seen!r}, stderr: {process.communicate()[1]!r}")


def files(folder: Path) -> dict[str, int]:
    """Path and size of everything below a folder."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in sorted(folder.rglob("*"))}


def assert_one_line_error(done: Any, *mentions: str) -> None:
    """Asserts exit code 2 and a single line on stderr that contains all of `mentions`."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for mention in mentions:
        assert mention in lines[0]


class Said:
    """The output and exit code of a command that ran in this process."""

    def __init__(self, code: int, out: str, err: str, warnings: list[str]) -> None:
        self.code, self.out, self.err, self.warnings = code, out, err, warnings

    @property
    def lines(self) -> list[str]:
        """The lines on stderr that are not empty."""
        return [line for line in self.err.splitlines() if line.strip()]


Command = Callable[..., Said]


def refused(said: Said, *mentions: str) -> str:
    """Asserts exit code 2 and a single line on stderr that contains all of `mentions`, and returns the line."""
    assert said.code == 2
    assert len(said.lines) == 1, said.err
    for mention in mentions:
        assert mention in said.lines[0]
    return said.lines[0]
