"""Opens corrupted checkpoint folders. Each must load correctly or fail with one clear error.

    python -m tests.fuzz --n 2000 --seed 0 --out results.json     all kinds of mutations in turn
    python -m tests.fuzz --seed 0 --case 17                       repeats one case, with its traceback

Cases run in worker processes that are forked after torch was imported. A worker that dies or hangs counts as a failure
of its case and is replaced. Opening a folder must not write files, run code or use the network.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import platform
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # before torch is imported

import torch
from PIL import Image

import llava
from llava.checkpoint.inspect import describe
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.errors import LlavaError
from tests import mutate, tiny

TIME_S = 10.0  # limit for opening, loading, describing and answering with one folder
SLACK_BYTES = 64 << 20  # memory that a case may use in addition to the size of its files
ADDRESS_BYTES = 1 << 30  # address space that a worker may add before allocation fails
GOOD = ("same", "loaded", "refused")
Answer = tuple[list[int], list[float]]  # token ids and their log-probabilities


# ------------------------------------------------------------------------------------------------ worlds


def _layouts() -> dict[str, Callable[[], object]]:
    """For each layout, a function that writes `model` and what it needs into the current folder."""
    model, base, clip = Path("model"), Path("base"), Path("clip")

    def llava_of(layout: tiny.Layout, **options: Any) -> object:
        return tiny.write_clip(clip), tiny.write_llava(model, layout=layout, clip=clip, **options)

    def converted(to: str, **options: Any) -> None:
        llava_of("safetensors", **options)
        model.rename("source")
        convert("source", model, to=to, check=False)
        shutil.rmtree("source")

    return {
        "bin-shards": lambda: llava_of("bin-shards", added=("<im_start>", "<im_end>"), mm_use_im_start_end=True),
        "safetensors-shards": lambda: llava_of("safetensors-shards"),
        "bin": lambda: llava_of("bin"),
        "v1.6": lambda: llava_of("safetensors-shards", tower_seed=5, **tiny.ANYRES),
        "llava-hf": lambda: converted("llava-hf"),
        "llava-next-hf": lambda: converted("llava-hf", tower_seed=5, **tiny.ANYRES),
        "native": lambda: converted("native"),
        "llama": lambda: tiny.write_llama(model),
        "lora": lambda: (tiny.write_clip(clip), tiny.write_llama(base), tiny.write_lora(model, clip=clip)),
        "projector": lambda: (
            tiny.write_clip(clip, layout="safetensors"),
            tiny.write_llama(base, layout="bin"),
            tiny.write_projector(model, clip=clip, start_end=True),
        ),
        "delta": lambda: (tiny.write_clip(clip), tiny.write_llama(base, seed=7), tiny.write_delta(model, clip=clip)),
        "mpt": lambda: (tiny.write_clip(clip), tiny.write_mpt(model, clip=clip)),
    }


def write_worlds(folder: Path) -> dict[str, Path]:
    """Writes a small valid checkpoint in every layout and returns the folders by the name of the layout."""
    worlds = {}
    for name, write in _layouts().items():
        worlds[name] = folder / name
        worlds[name].mkdir(parents=True)
        with _chdir(worlds[name]):
            write()
    return worlds


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def answer() -> Answer:
    """The answer of the model in the current folder to a picture, or to text if it takes no pictures."""
    base = Path("base")
    options: dict[str, Any] = {"base": base} if base.is_dir() else {}
    open_checkpoint("model", LoadOptions(**options))
    vlm = llava.load("model", dtype="float32", device="cpu", **options)
    content: Any = "Say hello."
    if vlm.config.vision:
        picture = Image.linear_gradient("L").resize((90, 60))
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    template = vlm.preprocessor.template
    prompt: Any = [{"role": "user", "content": content}] if template else "<s>Say hello."
    reply = vlm.generate(prompt, max_new_tokens=2, temperature=0, logprobs=1)
    assert reply.logprobs is not None
    return reply.token_ids, reply.logprobs


# ------------------------------------------------------------------------------------------------ one case


class Watch:
    """Records writes, processes and connections while `on`. An audit hook cannot be removed, only switched off."""

    EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.system",
              "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "shutil.")  # fmt: skip

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        if event == "open" and args[0] != os.devnull and isinstance(args[2], int) and args[2] & writes:
            self.seen.append(f"open {args[0]}")
        elif event.startswith(self.EVENTS):
            self.seen.append(f"{event} {args[:2]!r:.200}")


def _memory(key: str) -> int:
    """A memory figure of this process in bytes, from /proc."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def _unclear(message: str) -> bool:
    """Whether a message is not a single, printable line of reasonable length, or shows Python internals."""
    plain = message.isprintable() and 20 < len(message) < 1500
    return not plain or "Traceback" in message or "object has no attribute" in message


def _attempt(expected: Answer, changes: bool) -> tuple[str, str]:
    """Opens the world in the current folder and returns outcome and details."""
    try:
        base = "base" if Path("base").is_dir() else None
        json.dumps(describe("model", LoadOptions(base=base)).sizes)
    except LlavaError as error:
        if _unclear(str(error)):
            return "unclear", f"describe: {error}"[:2000]
    try:
        given = answer()
    except LlavaError as error:
        return ("unclear" if _unclear(str(error)) else "refused"), str(error)[:2000]
    if repr(given) == repr(expected):
        return "same", ""
    return ("loaded" if changes else "differs"), f"{given} for {expected}"


def run_case(
    seed: int, number: int, worlds: dict[str, Path], expected: dict[str, Answer], watch: Watch
) -> dict[str, Any]:
    """Creates one corrupted folder, opens it and removes it. Exceptions that are not LlavaErrors become outcomes."""
    rng = random.Random(f"{seed}/{number}")
    kinds = list(mutate.MUTATIONS)
    layout = rng.choice(sorted(worlds))
    room = Path(tempfile.mkdtemp(prefix=f"case-{number}-"))
    try:
        world = Path(shutil.copytree(worlds[layout], room / "world"))
        others = [path for name, path in worlds.items() if name != layout]
        done_kinds, done = mutate.mutate(rng, kinds[number % len(kinds)], world, others)
        n_bytes = sum(path.stat().st_size for path in world.rglob("*") if path.is_file() and not path.is_symlink())
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, started = _memory("VmRSS"), time.perf_counter()
        with _chdir(world):
            watch.seen, watch.on = [], True
            try:
                # a projector without a tokenizer uses that of its base, where the tokens around a picture are special
                falls_back = layout == "projector" and "tokenizer.model" in done.what
                outcome, detail = _attempt(expected[layout], done.changes or falls_back)
            except Exception as error:
                outcome = f"foreign: {type(error).__name__}"
                detail = "".join(traceback.format_exception(error)[-4:])[-2500:]
            finally:
                watch.on = False
        took, used = time.perf_counter() - started, _memory("VmHWM") - before
        if took > TIME_S:
            outcome = "slow"
        if used > n_bytes + SLACK_BYTES:
            outcome = "memory"
        if watch.seen:
            outcome, detail = "wrote", "; ".join(watch.seen[:5])
        if (room / mutate.MARKER).exists():
            outcome = "ran code"
        return {"case": number, "layout": layout, "kinds": done_kinds, "what": done.what, "outcome": outcome,
                "detail": detail, "seconds": round(took, 3), "bytes": used, "file_bytes": n_bytes}  # fmt: skip
    finally:
        shutil.rmtree(room, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ many cases


def _work(pipe: Connection, run: Callable[[int], dict[str, Any]]) -> None:
    """The loop of a worker: receives case numbers and sends results."""
    limit = _memory("VmSize") + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.send(run(pipe.recv()))


class Worker:
    """A worker process, its current case and the time when it started."""

    def __init__(self, run: Callable[[int], dict[str, Any]]):
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, run), daemon=True)
        self.process.start()
        theirs.close()
        self.case, self.started = -1, 0.0

    def give(self, case: int) -> None:
        self.case, self.started = case, time.monotonic()
        self.pipe.send(case)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_all(n: int, n_workers: int, run: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the results of all cases as they arrive."""
    numbers = iter(range(n))
    workers = [Worker(run) for _ in range(min(n, n_workers))]
    for worker in workers:
        worker.give(next(numbers))
    while workers:
        ready = wait([worker.pipe for worker in workers], timeout=0.5)
        for worker in list(workers):
            late = time.monotonic() - worker.started > 2 * TIME_S
            if worker.pipe not in ready and not late:
                continue
            try:
                if worker.pipe not in ready:
                    raise TimeoutError("no result in time")
                yield worker.pipe.recv()
            except (EOFError, ConnectionError, TimeoutError) as error:
                worker.end()
                code = f"hangs: {error}" if late else f"worker died, code {worker.process.exitcode}"
                yield {"case": worker.case, "layout": "", "kinds": [], "what": "", "outcome": "crash", "detail": code,
                       "seconds": time.monotonic() - worker.started, "bytes": 0, "file_bytes": 0}  # fmt: skip
                workers[workers.index(worker)] = worker = Worker(run)
            if (number := next(numbers, None)) is None:
                worker.end()
                workers.remove(worker)
            else:
                worker.give(number)


def summary(results: list[dict[str, Any]], seed: int, took: float) -> dict[str, Any]:
    """The figures of a run for the result file."""
    outcomes = Counter(result["outcome"] for result in results)
    kinds: dict[str, Counter[str]] = {}
    for result in results:
        for kind in result["kinds"][:1] or ["?"]:
            kinds.setdefault(kind, Counter())[result["outcome"]] += 1
    layouts = Counter(result["layout"] for result in results)
    slowest = max(results, key=lambda result: result["seconds"])
    largest = max(results, key=lambda result: result["bytes"] - result["file_bytes"])
    shown = ("case", "layout", "kinds", "what", "seconds", "bytes", "file_bytes")
    return {
        "cases": len(results),
        "seed": seed,
        "seconds": round(took, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "llava": llava.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "limits": {"seconds": TIME_S, "bytes_beside_the_files": SLACK_BYTES, "address_space": ADDRESS_BYTES},
        "outcomes": dict(outcomes.most_common()),
        "kinds": {kind: dict(kinds[kind].most_common()) for kind in sorted(kinds)},
        "layouts": dict(sorted(layouts.items())),
        "slowest": {key: slowest[key] for key in shown},
        "most_memory": {key: largest[key] for key in shown},
        "failures": [result for result in results if result["outcome"] not in GOOD],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="JSON file for the counts and failures")
    parser.add_argument("--details", type=Path, help="JSON file for every case")
    parser.add_argument("--case", type=int, help="run only this case and show its details")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        os.environ["HF_HUB_CACHE"] = str(Path(scratch) / "hub")
        tempfile.tempdir = scratch
        worlds = write_worlds(Path(scratch) / "worlds")
        expected = {}
        for name, world in worlds.items():
            with _chdir(world):
                expected[name] = answer()
        watch = Watch()

        def run(number: int) -> dict[str, Any]:
            return run_case(options.seed, number, worlds, expected, watch)

        if options.case is not None:
            print(json.dumps(run(options.case), indent=1).replace("\\n", "\n"))
            return 0
        started, results = time.perf_counter(), []
        for result in run_all(options.n, options.workers, run):
            results.append(result)
            if result["outcome"] not in GOOD:
                print(
                    f"{result['case']} {result['layout']} {result['what']}\n  {result['outcome']}: {result['detail']}"
                )
    results.sort(key=lambda result: result["case"])
    report = summary(results, options.seed, time.perf_counter() - started)
    for file, value in ((options.out, report), (options.details, results)):
        if file:
            file.write_text(json.dumps(value, indent=1) + "\n")
    print(json.dumps(report["outcomes"]))
    return int(bool(report["failures"]))


if __name__ == "__main__":
    sys.exit(main())
