"""How close to the limits of one GPU does llava run, and how close do transformers and gpt-fast?

All cases of the table in docs/performance.md, each with its limit on this card and the figure that it has to reach.
Every contestant runs in a process of its own. A case that fails or takes too long becomes a row with its error, and
the next one follows in a new process.

    python benchmarks/gpu.py --size tiny --device cpu
    python benchmarks/gpu.py --gpt-fast FOLDER --out RESULT.json
    python benchmarks/gpu.py --cases decode-1,clip-64 --skip-peers
    python benchmarks/gpu.py --profile decode-1

FOLDER holds model.py, generate.py, quantize.py and tp.py of gpt-fast, commit 32971d3.
"""

import datetime
import json
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from gpu_aims import Card, Failure, rows
from gpu_inputs import HIDE, hide_simplejpeg
from gpu_setup import CLIP_BATCHES, DECODE_ROWS, INVARIANT_ROWS, Measured, Setup
from gpu_table import print_table
from gpu_worker import Worker, WorkerFailed, python_path
from processes import Folder
from result import OURS, PEER, ROOT, Commit, Out, command, machine
from result import commit as commit_of
from result import versions as versions_of
from shapes import Layers, Size
from timing import Device, DType, Target

GPT_FAST = "gpt-fast"
LLAVA_CASES = ("decode-1", "decode-4000", *DECODE_ROWS, "first-token", "first-token-jpeg", *CLIP_BATCHES,
               "requests-128", "prefix", *INVARIANT_ROWS)  # fmt: skip
PEER_CASES = ("agreement", "decode-1", "decode-4000", *DECODE_ROWS, "first-token", *CLIP_BATCHES, "requests-128")
PLAN = {  # kind of process -> its cases, in the order in which they run
    "llava": ("ceilings", *LLAVA_CASES),
    "pillow": ("first-token-jpeg-pillow",),
    "mpt": ("mpt",),
    "start": ("start",),
    "transformers": PEER_CASES,
    "gpt-fast": ("decode-1", "decode-4000"),
}
CONTESTANTS = {"transformers": PEER, "gpt-fast": GPT_FAST}  # the others are ours
LIMITS_S = {"start": 200.0, "requests-128": 90.0, "prefix": 120.0}  # for one case; others get _LIMIT_S
_LIMIT_S, _FIRST_S, _COMPILE_S = 60.0, 60.0, 150.0  # _FIRST_S: more for the first case of a process
_LEAST_S = 5.0  # a case is not started with less time left


class Clock:
    """The time that is left for all cases, and for the peers' cases."""

    def __init__(self, total_s: float, peers_s: float):
        self.ends, self.peers_s = time.monotonic() + total_s, peers_s

    def limit(self, kind: str, case: str, is_first: bool) -> float:
        limit = LIMITS_S.get(case, _LIMIT_S) + (_FIRST_S if is_first else 0) + (_COMPILE_S if kind == GPT_FAST else 0)
        left = self.ends - time.monotonic()
        return min(limit, left, self.peers_s if kind in CONTESTANTS else left)

    @contextmanager
    def running(self, kind: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        if kind in CONTESTANTS:
            self.peers_s -= time.monotonic() - started


class Series:
    """Runs the cases of each kind of process and collects what they measure."""

    def __init__(self, setup: Setup, clock: Clock, log: IO[str]):
        self.setup, self.clock, self.log = setup, clock, log
        self.measured: list[Measured] = []
        self.failures: list[Failure] = []

    def run(self, kind: str, cases: Sequence[str]) -> None:
        worker: Worker | None = None
        try:
            for case in cases:
                limit = self.clock.limit(kind, case, worker is None)
                if limit < _LEAST_S:
                    self.fail(kind, case, "no time was left", skipped=True)
                    continue
                with self.clock.running(kind):
                    worker = worker or self.start(kind)
                    if not self.ask(worker, kind, case, limit):
                        worker.end()
                        worker = None
        finally:
            if worker:
                worker.end()

    def start(self, kind: str) -> Worker:
        environment = python_path(ROOT)
        if kind == "pillow":
            folder = Path(self.setup.folder) / "hide"
            hide_simplejpeg(folder)
            environment = python_path(folder, ROOT) | {HIDE: "1"}
        return Worker(kind, self.setup, self.log, environment)

    def ask(self, worker: Worker, kind: str, case: str, limit: float) -> bool:
        """Measures one case. Returns whether the process can continue."""
        started = time.monotonic()
        try:
            answer = worker.ask(case, limit)
        except WorkerFailed as error:
            answer = {"error": str(error), "traceback": self.last_lines()}
        seconds = time.monotonic() - started
        if "skipped" in answer:
            self.fail(kind, case, answer["skipped"], skipped=True)
            return True
        if "error" in answer:
            self.fail(kind, case, answer["error"], skipped=False)
            print("\n".join(f"    {line}" for line in answer["traceback"]), flush=True)
            return False
        found = [Measured.from_dict(one) for one in answer["measured"]]
        self.measured += found
        values = ", ".join(f"{one.contestant} {one.value:.4g} {one.unit}" for one in found)
        print(f"{case}: {values} ({seconds:.0f} s)", flush=True)
        return True

    def fail(self, kind: str, case: str, reason: str, *, skipped: bool) -> None:
        contestant = CONTESTANTS.get(kind, OURS)
        self.failures.append(Failure(case=case, contestant=contestant, reason=reason, skipped=skipped))
        print(f"{case}: {contestant} {'skipped' if skipped else 'FAILED'}: {reason}", flush=True)

    def last_lines(self) -> list[str]:
        lines = Path(self.log.name).read_text(errors="replace").splitlines()
        return [line[:200] for line in lines[-8:]]

    def join(self, earlier: dict[str, Any]) -> None:
        """Adds what an earlier run on the same card measured, except for what this run has measured again."""
        known = {(one.case, one.contestant) for one in [*self.measured, *self.failures]}
        found = [Measured.from_dict(one) for one in earlier["measured"]]
        failed = [Failure(**one) for one in earlier["failures"]]
        self.measured += [one for one in found if (one.case, one.contestant) not in known]
        self.failures += [one for one in failed if (one.case, one.contestant) not in known]

    def result(self, card_name: str, earlier: dict[str, Any] | None) -> dict[str, Any]:
        """The card, the rows and what they are made of, completed by an earlier run."""
        if earlier:
            self.join(earlier)
        speeds = {one.case: one.value * 1e12 for one in self.measured if one.case in ("bandwidth", "product")}
        card = Card(name=card_name, bandwidth=speeds.get("bandwidth"), product=speeds.get("product"))
        return {
            "joined": {key: earlier[key] for key in ("command", "commit", "settings")} if earlier else None,
            "card": asdict(card),
            "rows": rows(self.measured, self.failures, card),
            "measured": [one.to_dict() for one in self.measured],
            "failures": [asdict(one) for one in self.failures],
        }


def chosen(cases: str | None, kinds: Sequence[str]) -> dict[str, list[str]]:
    """The cases to run, by kind of process. Ours start with the ceilings."""
    names = {case for of_kind in PLAN.values() for case in of_kind}
    wanted = set(cases.split(",")) if cases else names
    check_known("--cases", wanted, names)
    check_known("--kinds", kinds, PLAN)
    wanted |= {"ceilings"} | ({"decode-1"} if "mpt" in wanted else set())
    plan = {kind: [case for case in PLAN[kind] if case in wanted] for kind in PLAN if kind in kinds}
    return {kind: found for kind, found in plan.items() if found}


def check_known(option: str, given: Collection[str], names: Collection[str]) -> None:
    if unknown := sorted(set(given) - set(names)):
        raise typer.BadParameter(f"{option} {','.join(unknown)}: expected some of {', '.join(sorted(names))}")


def main(
    device: Device = "auto",
    dtype: DType = "bfloat16",
    layers: Layers = None,
    size: Size = "7b",
    cases: Annotated[str | None, typer.Option("--cases", help="cases to run, with commas; default: all")] = None,
    skip_peers: Annotated[bool, typer.Option("--skip-peers", help="measure only llava")] = False,
    kinds: Annotated[str | None, typer.Option("--kinds", help=f"with commas: {', '.join(PLAN)}")] = None,
    gpt_fast: Annotated[Path | None, typer.Option("--gpt-fast", help="folder with gpt-fast's source")] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="time for all cases")] = 720,
    peer_seconds: Annotated[float, typer.Option("--peer-seconds", help="time for the peers' cases")] = 240,
    join: Annotated[Path | None, typer.Option("--join", help="result of a run on this card, to be completed")] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="one case: list its kernels, time nothing")] = None,
    graphs: Annotated[bool, typer.Option("--graphs/--no-graphs", help="CUDA graphs in our engine")] = True,
    batch_invariant: Annotated[bool, typer.Option("--batch-invariant", help="in our engine, in all cases")] = False,
    folder: Folder = None,
    log: Annotated[Path | None, typer.Option("--log", help="file for what the processes print")] = None,
    out: Out = None,
    save: Annotated[bool, typer.Option("--save", help="write the result to benchmarks/results/")] = False,
    commit: Commit = None,
) -> None:
    """Measures all cases and prints them as a table."""
    target = Target.from_options(device, dtype, None)
    of_kinds = kinds.split(",") if kinds else list(PLAN)
    plan = chosen(profile or cases, [kind for kind in of_kinds if not (skip_peers and kind in CONTESTANTS)])
    if profile:
        plan = {kind: [profile] for kind, found in plan.items() if kind not in CONTESTANTS and profile in found}
    here = machine(str(target.device))
    earlier = read_earlier(join, here) if join else None
    started = time.monotonic()
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llava-benchmark-", dir=folder) as scratch:
        setup = Setup(
            size=size,
            layers=layers,
            device=str(target.device),
            dtype=dtype,
            folder=scratch,
            gpt_fast=str(gpt_fast.resolve()) if gpt_fast else None,
            graphs=graphs,
            batch_invariant=batch_invariant,
            profile=bool(profile),
        )
        with (log or Path(scratch) / "log").open("w") as log_file:
            series = Series(setup, Clock(seconds, peer_seconds), log_file)
            for kind, of_kind in plan.items():
                series.run(kind, of_kind)
    if profile:
        return
    settings = {"size": size, "layers": layers, "device": str(target.device), "dtype": dtype, "graphs": graphs}
    settings |= {"batch_invariant": batch_invariant, "seconds": round(time.monotonic() - started)}
    found = {
        "benchmark": "gpu",
        "date": datetime.date.today().isoformat(),
        "command": command(),
        "commit": commit_of(commit),
        "machine": here,
        "versions": versions(),
        "settings": settings,
        **series.result(here.get("gpu", "CPU"), earlier),
    }
    if save and not out:
        out = ROOT / "benchmarks" / "results" / f"{found['date']}-gpu-{target.device.type}-{dtype}.json"
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=2) + "\n")
    print_table(found)


def read_earlier(file: Path, here: dict[str, Any]) -> dict[str, Any]:
    """Reads the result of a run on this card. Ends the program if it was another card."""
    earlier = json.loads(file.read_text())
    card, mine = (one.get("gpu", "CPU") for one in (earlier["machine"], here))
    if card != mine:
        raise typer.BadParameter(f"--join {file}: was measured on {card}; expected {mine}, as here")
    return earlier


def versions() -> dict[str, str]:
    """Versions of the libraries that the speed depends on, as far as they are installed."""
    found = versions_of()
    for name in ("triton", "simplejpeg", "pillow"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


if __name__ == "__main__":
    typer.run(main)
