"""How close does `llava serve` come to the engine's own rate, and how soon does a reply begin?

    python benchmarks/serve_gpu.py --save
    python benchmarks/serve_gpu.py --size tiny --layers 2 --device cpu --dtype float32     # a dry run

Two processes, one after the other, hold a random model of the published shapes. The first answers all requests as a
batch; the second serves them to clients that stream the replies. No id ends a reply, so all have their full length.
"""

import asyncio
import copy
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from gpu_inputs import EndlessTokenizer
from gpu_setup import Setup
from result import OURS, Commit, Out, Result, Save
from serve import conversation, free_port, server
from timing import Device, DType

from llava.assistant import Assistant
from llava.serve.bench import Load, bodies, run, summary

_NAME = "random"
_START_S = 400  # compiling kernels included


class Words(EndlessTokenizer):
    """Each id decodes to a word, so that each token of a reply is text which clients see at once."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(f" {id}" for id in ids)

    def piece(self, id: int) -> bytes:
        return f" {id}".encode()

    @property
    def added_texts(self) -> Iterable[str]:
        return self.real.added_texts

    def with_renamed(self, names: Mapping[str, str]) -> "Words":
        renamed = copy.copy(self)
        renamed.real = self.real.with_renamed(names)
        return renamed


def assistant(setup: Setup, clients: int, row_tokens: int) -> Assistant:
    """An assistant with a random model, whose engine runs as many requests at once as there are clients."""
    from gpu_ours import llava

    one = llava(setup).assistant(clients, row_tokens, prefix_cache=True)
    one.preprocessor.tokenizer = Words(one.model.config.decoder.vocab_size)  # type: ignore[assignment]
    return one


def serve(setup: Setup, clients: int, row_tokens: int, port: int) -> None:
    """Serves the random model until SIGTERM."""
    from llava.serve import server
    from llava.serve.access import Access
    from llava.serve.settings import Settings

    settings = Settings(name=_NAME, access=Access(host="127.0.0.1"), port=port)
    server.run(lambda: assistant(setup, clients, row_tokens), settings)


def offline(setup: Setup, clients: int, row_tokens: int, requests: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Answers the requests as a batch. Returns requests per second and the tokens of a prompt."""
    vlm, asked = assistant(setup, clients, row_tokens), [conversation(body) for body in requests]
    n_new = requests[0]["max_tokens"]
    vlm.generate_batch(asked[:clients], max_new_tokens=n_new, batch_size=clients)  # warm up
    started = time.perf_counter()
    replies = vlm.generate_batch(asked[clients:], max_new_tokens=n_new, batch_size=clients)
    seconds = time.perf_counter() - started
    assert all(len(one.token_ids) == n_new for one in replies)
    prompt = sum(one.usage.prompt_tokens for one in replies) / len(replies)
    return {"requests_per_s": len(replies) / seconds, "prompt_tokens": prompt}


def drive(load: Load, requests: Sequence[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """Sends requests, the first ones without measuring them. Returns rates and percentiles."""
    asyncio.run(run(load, requests[:warm_up]))
    found = summary(*asyncio.run(run(load, requests[warm_up:])))
    assert not found["errors"], found["first_error"]
    return found


def main(
    size: Annotated[str, typer.Option("--size", help="7b or tiny")] = "7b",
    layers: Annotated[int | None, typer.Option("--layers", help="fewer layers")] = None,
    device: Device = "auto",
    dtype: DType = "bfloat16",
    clients: Annotated[int, typer.Option("--clients", help="for the rate")] = 128,
    rounds: Annotated[int, typer.Option("--rounds", help="requests of each client, after one to warm up")] = 4,
    few: Annotated[int, typer.Option("--few", help="clients for the time to the first token")] = 8,
    few_rounds: Annotated[int, typer.Option("--few-rounds", help="requests of each of them")] = 25,
    n_new: Annotated[int, typer.Option("--new", help="tokens of each reply")] = 128,
    n_words: Annotated[int, typer.Option("--prompt-words", help="words of each question")] = 1,
    log: Annotated[Path | None, typer.Option("--log", help="for what the processes print")] = None,
    role: Annotated[str | None, typer.Option("--role", hidden=True)] = None,
    port: Annotated[int, typer.Option("--port", hidden=True)] = 0,
    out: Out = None,
    save: Save = False,
    commit: Commit = None,
) -> None:
    setup = Setup(size=size, layers=layers, device=device, dtype=dtype, folder="", gpt_fast=None)
    load = Load(
        url="", model=_NAME, requests=clients * (rounds + 1), concurrency=clients, pictures=1, max_tokens=n_new,
        prompt_words=n_words,
    )  # fmt: skip
    row_tokens = 1024 + 2 * n_new  # more than any prompt and reply
    if role == "server":
        serve(setup, clients, row_tokens, port)
        return
    requests = bodies(load)
    if role == "offline":
        print(json.dumps(offline(setup, clients, row_tokens, requests)))
        return

    command = [sys.executable, *sys.argv]
    with (log or Path(tempfile.gettempdir()) / "serve_gpu.log").open("w") as messages:
        done = subprocess.run([*command, "--role", "offline"], stdout=subprocess.PIPE, stderr=messages, check=True)
        batch = json.loads(done.stdout.splitlines()[-1])
        number = free_port()
        load = replace(load, url=f"http://127.0.0.1:{number}")
        served = [*command, "--role", "server", "--port", str(number)]
        with server(served, load.url, ready="/ready", messages=messages, limit_s=_START_S):
            many = drive(load, requests, clients)
            chance = random.Random(1)
            of_few = bodies(replace(load, requests=few * (few_rounds + 1), seed=1))
            for body in of_few:  # replies of different lengths, so that requests do not arrive all at once
                body["max_tokens"] = chance.randint(n_new // 2, n_new * 3 // 2)
            first = drive(replace(load, concurrency=few), of_few, few)

    target = setup.target
    share = many["requests_per_s"] / batch["requests_per_s"]
    Result(
        benchmark="serve-gpu",
        question=f"{clients} clients of a server with {size} shapes, an image each",
        device=target.device.type,
        dtype=target.dtype_name,
        settings={
            "size": size, "layers": layers, "clients": clients, "requests": clients * rounds, "new": n_new,
            "prompt": batch["prompt_tokens"],
        },
        seconds={OURS: [1 / many["requests_per_s"]], "offline": [1 / batch["requests_per_s"]]},
        unit="requests/s",
        scale=lambda name, value: 1 / value,
        pairs=((OURS, "offline"),),
        figures={
            "share of the offline rate": round(share, 3),
            f"first token at {few} clients, p95 (ms)": first["first_token_ms"]["p95"],
            f"{clients} clients": many,
            f"{few} clients": first,
        },
        commit=commit,
    ).report(out, save)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
