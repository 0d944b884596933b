"""How fast does the engine answer 64 requests at once with llava-tiny?

Three workloads: (a) distinct pictures, answers of 5 to 50 tokens; (b) 64 questions about 4 pictures, answers of 4 to
128 tokens; (c) decoding by itself: distinct pictures and the answers of (b), without the time for pictures and prompts.
End tokens are ignored, so that all contestants generate the same number of tokens.

    python benchmarks/engine.py --before CHECKOUT

CHECKOUT is a checkout of commit aec8265, the last one before the engine, whose `generate_batch` computed padded batches
of 32. Without it, only transformers is compared. Each contestant runs in a process of its own; they take turns.
"""

import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from result import ROOT, Commit, Out, Result, Save

if "LLAVA_CHECKOUT" in os.environ:  # after `result`, which puts this checkout first
    sys.path.insert(0, os.environ["LLAVA_CHECKOUT"])

Split = dict[str, float]  # seconds by part of the work
Work = Callable[[Sequence[Any], Sequence[int], bool], Split]  # (messages, lengths, decoding only)
BEFORE, PEER, OURS, INVARIANT = "before", "transformers", "llava", "llava, batch-invariant"
_WARM_UP = 2  # rounds, until all memory of the cache has been written once
PARTS = ("prepare", "vision", "prefill", "decode", "other")
QUESTIONS = (
    "What is in the picture?",
    "How many objects are there?",
    "What colour is the largest object?",
    "Describe the picture.",
    "Is there a cup in the picture?",
)


class Workload(NamedTuple):
    """64 requests."""

    n_pictures: int
    shortest: int  # tokens
    longest: int
    decoding_only: bool = False

    def lengths(self) -> list[int]:
        generator = random.Random(1)
        return [generator.randint(self.shortest, self.longest) for _ in range(64)]

    def messages(self, round: int) -> list[Any]:
        """The conversations; the pictures of every round are new, so that no cache knows them."""
        from llava.assistant import question_about

        pictures = [_picture(i, self, round) for i in range(self.n_pictures)]
        suffixes = ["" if self.n_pictures == 64 else f" ({i})" for i in range(64)]
        return [
            question_about(pictures[i % self.n_pictures], QUESTIONS[i % len(QUESTIONS)] + suffix)
            for i, suffix in enumerate(suffixes)
        ]


WORKLOADS = {
    "a: 64 pictures": Workload(64, 5, 50),
    "b: 4 pictures": Workload(4, 4, 128),
    "c: decoding": Workload(64, 4, 128, decoding_only=True),
}


def _picture(i: int, workload: Workload, round: int) -> Any:
    from PIL import Image

    files = sorted((ROOT / "examples" / "pictures").glob("*.png"))
    picture = Image.open(files[i % len(files)]).convert("RGB")
    colour = random.Random(repr((i, workload, round))).randbytes(3)
    picture.paste(tuple(colour), (0, 0, picture.width // 3, picture.height // 3))
    return picture


def ours(**more: bool) -> Work:
    import llava

    def engine(**options: Any) -> Any:
        made = llava.load(engine=llava.EngineOptions(**options, **more)).engine
        original = made.inputs.sequence

        def without_end(*args: Any, **more: Any) -> Any:
            sequence = original(*args, **more)
            sequence.stop_ids = frozenset()
            return sequence

        made.inputs.sequence = without_end
        return made

    engines = {False: engine(), True: engine(chunk_tokens=2**14)}  # the latter computes all prompts before it decodes

    def work(messages: Sequence[Any], lengths: Sequence[int], decoding_only: bool) -> Split:
        chosen = engines[decoding_only]
        chosen.runner.seconds.clear()
        replies = chosen.generate(messages, [llava.SamplingParams(max_new_tokens=n) for n in lengths])
        assert [len(reply.token_ids) for reply in replies] == list(lengths)
        return dict(chosen.runner.seconds) | {"prepare": sum(reply.timings.prepare_s for reply in replies)}

    return work


def before() -> Work:
    """The engine of the checkout, which comes first in this process's path."""
    import llava
    from llava.engine.sampling import SamplingParams  # where it was in that commit

    vlm = llava.load()
    engine: Any = vlm.engine
    seconds: Split = {}
    for part, name in (("vision", "encode"), ("prefill", "_run_prefill"), ("decode", "_run_step")):
        setattr(engine, name, _timed(getattr(engine, name), seconds, part))

    def work(messages: Sequence[Any], lengths: Sequence[int], decoding_only: bool) -> Split:
        seconds.clear()
        prepare_s = 0.0
        for start in range(0, len(messages), 32):  # as `generate_batch` did
            started = time.perf_counter()
            inputs = [vlm.prepare(one) for one in messages[start : start + 32]]
            prepare_s += time.perf_counter() - started
            params = [SamplingParams(max_new_tokens=n) for n in lengths[start : start + 32]]
            sequences = [engine.start(*pair) for pair in zip(inputs, params, strict=True)]
            for sequence in sequences:
                sequence.stop_ids = frozenset()
            for _ in engine.run(sequences, params[0]):
                pass
            assert [one.n_generated for one in sequences] == list(lengths[start : start + 32])
        return seconds | {"prefill": seconds["prefill"] - seconds["vision"], "prepare": prepare_s}

    return work


def _timed(function: Callable[..., Any], seconds: Split, part: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **options)
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started
        return result

    return timed


def transformers() -> Work:
    """`generate` on padded batches of 32, with our preparation of the inputs."""
    import torch
    from transformers import LlavaForConditionalGeneration, StoppingCriteria

    import llava
    from llava.convert.convert import convert

    vlm = llava.load()
    with tempfile.TemporaryDirectory() as folder:
        convert(llava.assistant.LLAVA_TINY, Path(folder) / "hf", to="llava-hf")
        model = LlavaForConditionalGeneration.from_pretrained(Path(folder) / "hf", dtype=torch.float32).eval()
    image_id = model.config.image_token_id
    model.generation_config.eos_token_id = None
    seconds: Split = {}
    tower = model.model.vision_tower
    tower.forward = _timed(tower.forward, seconds, "vision")

    class Lengths(StoppingCriteria):
        def __init__(self, lengths: Sequence[int], n_prompt: int):
            self.ends = torch.tensor(lengths) + n_prompt

        def __call__(self, ids: Any, scores: Any, **more: Any) -> Any:
            return self.ends <= ids.shape[1]

    def work(messages: Sequence[Any], lengths: Sequence[int], decoding_only: bool) -> Split:
        seconds.clear()
        prepare_s = prefill_s = decode_s = 0.0
        for start in range(0, len(messages), 32):
            started = time.perf_counter()
            inputs = [vlm.prepare(one) for one in messages[start : start + 32]]
            n = max(len(one.ids) for one in inputs)
            ids, mask = torch.zeros(len(inputs), n, dtype=torch.int64), torch.zeros(len(inputs), n, dtype=torch.int64)
            for i, one in enumerate(inputs):
                ids[i, n - len(one.ids) :] = torch.where(one.ids < 0, image_id, one.ids)
                mask[i, n - len(one.ids) :] = 1
            batch = {
                "input_ids": ids,
                "attention_mask": mask,
                "pixel_values": torch.cat([one.pixels for one in inputs]),
            }
            prepared = time.perf_counter()
            if decoding_only:
                with torch.inference_mode():
                    model.generate(**batch, do_sample=False, max_new_tokens=1, pad_token_id=0)
            prefilled = time.perf_counter()
            ends = Lengths(lengths[start : start + 32], n)
            with torch.inference_mode():
                model.generate(**batch, do_sample=False, max_new_tokens=128, pad_token_id=0, stopping_criteria=[ends])
            prepare_s += prepared - started
            prefill_s += prefilled - prepared
            decode_s += time.perf_counter() - prefilled - (prefilled - prepared)
        vision_s = seconds.get("vision", 0.0)
        if decoding_only:  # pictures and prompts are computed twice, and the first time is measured
            return {"prepare": prepare_s, "vision": vision_s, "prefill": 2 * prefill_s - vision_s, "decode": decode_s}
        return {"prepare": prepare_s, "vision": vision_s, "decode": decode_s - vision_s}  # with the prompts

    return work


class Worker:
    """A contestant in a process of its own, so that it can have its own version of llava."""

    def __init__(self, name: str, checkout: Path, threads: int):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads), "LLAVA_CHECKOUT": str(checkout)},
        )

    def run(self, workload: str, round: int) -> Split:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([workload, round]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the contestant ended with exit code {self.process.wait()}")
        return json.loads(line)


def serve(name: str) -> None:
    """Runs the workloads that arrive on the standard input, one JSON line each."""
    contestants = {OURS: ours, INVARIANT: lambda: ours(batch_invariant=True), BEFORE: before, PEER: transformers}
    work = contestants[name]()
    for line in sys.stdin:
        workload, round = json.loads(line)
        chosen = WORKLOADS[workload]
        messages, lengths = chosen.messages(round), chosen.lengths()
        started = time.perf_counter()
        split = work(messages, lengths, chosen.decoding_only)
        split["other"] = time.perf_counter() - started - sum(split.values())
        split["total"] = split["decode"] + split["other"] if chosen.decoding_only else sum(split.values())
        print(json.dumps(split), flush=True)


def main(
    runs: Annotated[int, typer.Option("--runs", help="timed runs of each contestant and workload", min=1)] = 5,
    before: Annotated[Path | None, typer.Option("--before", help="checkout of commit aec8265")] = None,
    threads: Annotated[int, typer.Option("--threads", help="CPU threads of each contestant")] = 2,
    peer: Annotated[bool, typer.Option("--peer/--no-peer", help="compare transformers")] = True,
    worker: Annotated[str | None, typer.Option("--worker", hidden=True)] = None,
    out: Out = None,
    save: Save = False,
    commit: Commit = None,
) -> None:
    if worker:
        serve(worker)
        return
    workers = {name: Worker(name, ROOT, threads) for name in (OURS, INVARIANT)}
    if before:
        workers[BEFORE] = Worker(BEFORE, before.resolve(), threads)
    if peer:
        workers[PEER] = Worker(PEER, ROOT, threads)
    splits: dict[str, list[Split]] = {}
    for round in range(_WARM_UP + runs):
        for workload in WORKLOADS:
            names = list(workers) if round % 2 else list(reversed(workers))
            for name in names:
                split = workers[name].run(workload, round)
                if round >= _WARM_UP:
                    splits.setdefault(f"{workload}, {name}", []).append(split)
    for one in workers.values():
        one.process.stdin.close()
    pairs = [
        (f"{workload}, {OURS}", f"{workload}, {name}") for workload in WORKLOADS for name in workers if name != OURS
    ]
    Result(
        benchmark="engine-llava-tiny",
        question="How fast does the engine answer 64 requests at once?",
        device="cpu",
        dtype="float32",
        settings={"runs": runs, "threads": threads, "before": "aec8265" if before else None},
        seconds={name: [split["total"] for split in of_runs] for name, of_runs in splits.items()},
        more={
            name: {part: sorted(split.get(part, 0.0) for split in of_runs)[len(of_runs) // 2] for part in PARTS}
            for name, of_runs in splits.items()
        },
        pairs=tuple(pairs),
        commit=commit,
    ).report(out, save)


if __name__ == "__main__":
    typer.run(main)
