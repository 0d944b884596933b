"""The processes of `gpu.py`. One holds one contestant, measures the cases it is asked for, and may fail or hang."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from gpu_setup import Measured, Setup, Skipped

_TRACEBACK_LINES = 8


class WorkerFailed(Exception):
    """A worker ended or did not answer in time."""


class Worker:
    """A child process. Its requests and answers are JSON lines; everything else that it prints goes to the log."""

    def __init__(self, kind: str, setup: Setup, log: IO[str], environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, __file__, kind, json.dumps(setup.to_dict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | environment,
            start_new_session=True,  # so that its own children are ended with it
        )
        self.rest = b""

    def ask(self, case: str, limit_s: float) -> dict[str, Any]:
        """Returns the answer to one case. Raises WorkerFailed."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(case).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(f"the process ended with exit code {self.process.wait()}") from None
        return json.loads(self._line(time.monotonic() + limit_s, limit_s))

    def _line(self, deadline: float, limit_s: float) -> bytes:
        assert self.process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerFailed(f"no result within {limit_s:.0f} s")
                new = os.read(self.process.stdout.fileno(), 2**16)
                if not new:
                    raise WorkerFailed(f"the process ended with exit code {self.process.wait()}")
                self.rest += new
        line, self.rest = self.rest.split(b"\n", 1)
        return line

    def end(self) -> None:
        """Ends the process and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


def contestant(kind: str, setup: Setup) -> Callable[[str], list[Measured]]:
    """Makes a contestant and returns its function that measures a case."""
    if kind in ("llava", "pillow"):
        from gpu_ours import llava

        return llava(setup).measure
    if kind == "mpt":
        from gpu_ours import mpt

        return mpt(setup).measure
    if kind == "start":
        from gpu_start import Starts

        return Starts(setup).measure
    from gpu_peers import GptFast, Transformers

    return {"transformers": Transformers, "gpt-fast": GptFast}[kind](setup).measure


def serve(kind: str, setup: Setup) -> None:
    """Measures the cases that arrive on the standard input, one JSON line each."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print goes to the log
        measure = None
        for line in sys.stdin:
            case = json.loads(line)
            print(f"=== {kind}: {case}", file=sys.stderr, flush=True)
            try:
                measure = measure or contestant(kind, setup)
                answer: dict[str, Any] = {"measured": [one.to_dict() for one in measure(case)]}
            except Skipped as reason:
                answer = {"skipped": str(reason)}
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                text = " ".join(f"{type(error).__name__}: {error}".split())
                lines = traceback.format_exc().strip().splitlines()
                answer = {"error": f"{text:.300}", "traceback": lines[-_TRACEBACK_LINES:]}
            print(json.dumps(answer), file=answers, flush=True)


def python_path(*folders: Path) -> dict[str, str]:
    """The environment in which `folders` come first in Python's path."""
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])}


if __name__ == "__main__":
    serve(sys.argv[1], Setup(**json.loads(sys.argv[2])))
