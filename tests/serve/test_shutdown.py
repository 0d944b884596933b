"""How a server ends: what is left of it, and how long that takes, whatever its processes and clients do."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.command import PROJECT, start, wait_for_output
from tests.hostile import Victim, data_url, picture, wait_until
from tests.serving import TIMEOUT_S, user

PROGRAM = """
import multiprocessing, threading
import llava
from llava.serve.access import Access
from llava.serve.limits import Limits
from llava.serve.server import run
from llava.serve.settings import Settings

if __name__ == "__main__":
    limits = Limits(picture_s=600)
    settings = Settings(name="llava-tiny", access=Access(host="127.0.0.1"), port=0, limits=limits, drain_s=1, threads=1)
    run(lambda: llava.load(device="cpu"), settings)
    names = [one.name for one in threading.enumerate() if one is not threading.main_thread()]
    print("left:", names, multiprocessing.active_children(), flush=True)
"""
NOTHING = "left: [] []\n"


@contextmanager
def program(folder: Path) -> Iterator[Victim]:
    """A Python program that calls `run`, and prints which threads and processes are left of it."""
    file, log = folder / "program.py", folder / "errors.txt"
    file.write_text(PROGRAM)
    with log.open("wb") as errors:
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        process = subprocess.Popen(
            [sys.executable, str(file)], stdout=subprocess.PIPE, stderr=errors, env=environment, bufsize=0
        )
    with process:
        try:
            yield Victim(0, process, log)
        finally:
            process.kill()


@contextmanager
def stuck(process: subprocess.Popen[bytes], log: Path) -> Iterator[tuple[Future[httpx.Response], list[int]]]:
    """A request whose picture is being read by a process that does not go on, and the ids of all such processes."""
    url = wait_for_output(process, "\n").split()[-1]
    pids = Victim(0, process, log).children
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    content = {"type": "image_url", "image_url": {"url": data_url(picture())}}
    body = {"model": "llava-tiny", "messages": user(content), "max_tokens": 3}
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
        time.sleep(0.5)
        assert not asking.done()
        yield asking, pids


def is_gone(pid: int) -> bool:
    """Whether a process has ended, if nobody has asked for its exit code too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def all_gone(pids: list[int]) -> bool:
    return wait_until(lambda: all(map(is_gone, pids)))


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(tmp_path: Path, kind: signal.Signals) -> None:
    log = tmp_path / "errors.txt"
    with log.open("wb") as errors:
        process = start("serve", "--port", "0", "--device", "cpu", "--threads", "1", stderr=errors)
    with process:
        try:
            with stuck(process, log) as (asking, pids):
                process.send_signal(kind)
                time.sleep(0.5)
                assert process.poll() is None
                process.send_signal(kind)
                started = time.monotonic()
                assert process.wait(TIMEOUT_S) == 130
                assert time.monotonic() - started < 3
                assert isinstance(asking.exception(), httpx.TransportError)
            assert all_gone(pids)
            assert "Traceback" not in log.read_text()
        finally:
            process.kill()


def test_a_request_that_does_not_end_in_time_gets_an_error_and_nothing_is_left_of_the_server(tmp_path: Path) -> None:
    with program(tmp_path) as server, stuck(server.process, server.log) as (asking, pids):
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert wait_for_output(server.process, "\n") == NOTHING
        assert time.monotonic() - started < 30  # seconds; the limit for a picture is 600
        assert server.process.wait(TIMEOUT_S) == 0
        assert asking.result().status_code == 503
        assert all_gone(pids)
    assert "Traceback" not in server.log.read_text()


def test_a_signal_during_the_start_of_its_processes_leaves_none(tmp_path: Path) -> None:
    with program(tmp_path) as server:
        assert wait_until(lambda: bool(server.children))
        pids = server.children
        server.process.send_signal(signal.SIGTERM)
        assert wait_for_output(server.process, "\n") == NOTHING
        assert server.process.wait(TIMEOUT_S) == 0
        assert all_gone(pids)
    assert "Traceback" not in server.log.read_text()
