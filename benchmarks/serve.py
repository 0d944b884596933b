"""How many requests does `llava serve` answer on a CPU, and is each answer right?

    python benchmarks/serve.py --seconds 600 --clients 200 --save

Clients stream answers of llava-tiny about pictures, each client one after the other. Every answer has to equal the one
that the model gives offline; both run with batch_invariant. The memory of the server is watched. Afterwards, a plain
server of transformers and FastAPI (benchmarks/serve_peer.py) gets the same requests.
"""

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated, Any

import httpx
import typer
from result import OURS, PEER, ROOT, Commit, Out, Result, Save

from llava.config import EngineOptions
from llava.serve.bench import Load, Sample, bodies, request, summary

_N_BODIES = 96  # different requests


def offline(requests: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the answer to each request, computed in this process."""
    import llava

    vlm = llava.load(device="cpu", engine=EngineOptions(batch_invariant=True))
    asked = [conversation(body) for body in requests]
    return [reply.text for reply in vlm.generate_batch(asked, max_new_tokens=requests[0]["max_tokens"])]


def conversation(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages of a request as an `Assistant` takes them."""
    *pictures, text = body["messages"][0]["content"]
    contents = [base64.b64decode(one["image_url"]["url"].split(",")[1]) for one in pictures]
    return [{"role": "user", "content": [*({"type": "image", "image": one} for one in contents), text]}]


async def drive(load: Load, requests: Sequence[dict[str, Any]], clients: int, seconds: float) -> list[Sample]:
    """Lets clients send requests until the time is up. Returns all samples."""
    samples: list[Sample] = []
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=load.url, timeout=600, limits=limits) as client:

        async def one(number: int) -> None:
            i = number * 7
            while time.monotonic() < end:
                samples.append(await request(client, requests[i % len(requests)]))
                i += 1

        await asyncio.gather(*map(one, range(clients)))
    return samples


class Memory:
    """Watches the resident memory of a process and its children, in MiB."""

    def __init__(self, pid: int):
        self.pid, self.values = pid, list[float]()

    async def watch(self) -> None:
        while True:
            self.values.append(round(_resident(self.pid) / 2**20, 1))
            await asyncio.sleep(2)


def _resident(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = [int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in [str(pid), *children]]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def server(
    command: Sequence[str], url: str, *, ready: str, messages: IO[str] | int = subprocess.DEVNULL, limit_s: float = 180
) -> Iterator[int]:
    """Runs a server, and yields its process id once GET `ready` succeeds. messages: where it may print."""
    process = subprocess.Popen(command, stdout=messages, stderr=messages, cwd=ROOT)
    try:
        end = time.monotonic() + limit_s
        while True:
            try:
                if httpx.get(url + ready).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert time.monotonic() < end, "the server does not start"
            assert process.poll() is None, "the server has ended"
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def watched(pid: int, load: Load, requests: Sequence[dict[str, Any]], clients: int, seconds: float) -> Any:
    memory = Memory(pid)
    watch = asyncio.ensure_future(memory.watch())
    started = time.perf_counter()
    samples = await drive(load, requests, clients, seconds)
    took = time.perf_counter() - started
    watch.cancel()
    return samples, took, memory.values


def main(
    seconds: Annotated[float, typer.Option("--seconds", help="for which our server is driven")] = 60.0,
    peer_seconds: Annotated[float, typer.Option("--peer-seconds", help="for the peer")] = 60.0,
    clients: Annotated[int, typer.Option("--clients", help="streams at the same time")] = 200,
    out: Out = None,
    save: Save = False,
    commit: Commit = None,
) -> None:
    load = Load(url="", model="llava-tiny", requests=_N_BODIES, pictures=1, picture_size=224, max_tokens=24)
    requests = bodies(load)
    expected = {json.dumps(body): text for body, text in zip(requests, offline(requests), strict=True)}

    ours = replace(load, url=f"http://127.0.0.1:{free_port()}")
    port = ours.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "llava.cli", "serve", "--port", port, "--batch-invariant", "--device", "cpu"]
    with server(command, ours.url, ready="/ready") as pid:
        asyncio.run(drive(ours, requests, 16, 5))  # warm up
        samples, took, memory = asyncio.run(watched(pid, ours, requests, clients, seconds))
    wrong = [one for one in samples if not one.error and one.text != expected[json.dumps(one.body)]]
    found = summary(samples, took)

    with tempfile.TemporaryDirectory() as folder:
        from llava.assistant import LLAVA_TINY
        from llava.convert.convert import convert

        convert(LLAVA_TINY, Path(folder) / "hf", to="llava-hf")
        theirs = replace(load, url=f"http://127.0.0.1:{free_port()}")
        script = str(ROOT / "benchmarks" / "serve_peer.py")
        peer_port = theirs.url.rsplit(":", 1)[1]
        with server([sys.executable, script, str(Path(folder) / "hf"), peer_port], theirs.url, ready="/health"):
            asyncio.run(drive(theirs, requests, 2, 5))
            started = time.perf_counter()
            peer_samples = asyncio.run(drive(theirs, requests, min(clients, 32), peer_seconds))
            peer_found = summary(peer_samples, time.perf_counter() - started)

    half = memory[len(memory) // 2 :]
    Result(
        benchmark="serve",
        question=f"{clients} clients stream answers of llava-tiny for {seconds:g} s",
        device="cpu",
        dtype="float32",
        settings={"seconds": seconds, "clients": clients, "max_tokens": load.max_tokens, "pictures": load.pictures},
        seconds={OURS: [1 / found["requests_per_s"]], PEER: [1 / peer_found["requests_per_s"]]},
        unit="requests/s",
        scale=lambda name, value: 1 / value,
        figures={
            "answers": len(samples),
            "errors": found["errors"],
            "first error": found["first_error"],
            "wrong answers": len(wrong),
            "memory at the start, in the middle, at the end (MiB)": [memory[0], memory[len(memory) // 2], memory[-1]],
            "growth of memory in the second half (MiB)": round(half[-1] - half[0], 1),
            OURS: found,
            PEER: peer_found,
        },
        commit=commit,
    ).report(out, save)
    if wrong:
        print(f"wrong: {wrong[0].text!r}, expected {expected[json.dumps(wrong[0].body)]!r}", file=sys.stderr)
    if wrong or found["errors"]:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
