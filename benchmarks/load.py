"""How much time and memory does loading a LLaVA-1.5-7B from disk take? Compared with transformers.

Writes a random checkpoint with the real shapes in bfloat16 (about 14 GB; 31 GB of disk in all, removed at the end) and
runs each job in a separate process. `peak_anon_gb` is the most private memory the process held (RssAnon, sampled,
including torch's import), `peak_file_gb` the most mapped file memory (RssFile). Timing starts after the imports.

Files are read once before each timed job to fill the page cache; `cached` is the fraction of them that it holds.
--cold adds runs with an empty page cache.

    python benchmarks/load.py --size tiny
"""

import os
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import random_checkpoint
import typer
from processes import DROP_CACHES, LLAVA, Folder, Series, job, run_watched, scratch_folder
from result import OURS, PEER, Commit, Out, Result, Save, benchmark_name
from shapes import Layers, Size, llava_config
from timing import Device, DType, Target, Threads

PAIRS = (
    (f"{OURS} load LLaVA", "read LLaVA"),
    (f"{OURS} load Llama", "read Llama"),
    (f"{OURS} load Llama", f"{PEER} load Llama"),
)


def measure(
    folder: Path, target: Target, threads: int | None, size: str, layers: int | None, runs: int, cold: bool
) -> Series:
    """Loads a LLaVA with its tower, then its language model as a plain Llama. The LLaVA is removed in between."""
    series = Series()
    started = time.perf_counter()
    source = random_checkpoint.write_llava(folder, size, layers)
    print(f"random checkpoint written in {time.perf_counter() - started:.0f} s", flush=True)
    clip, llama = folder / "clip", folder / "llama"

    def run(jobs: dict[str, str], source: Path, *reads: Path) -> None:
        tasks = [job(name, entry, source, target, threads, reads=reads) for name, entry in jobs.items()]
        for is_cold in (False, True) if cold else (False,):
            series.run(tasks, runs, cold=is_cold)

    run({"read LLaVA": "read", f"{OURS} load LLaVA": "load"}, source, source, clip)
    run_watched([*LLAVA, "convert", str(source), str(llama), "--to", "llama"])
    shutil.rmtree(source)
    run({"read Llama": "read", f"{OURS} load Llama": "load-text", f"{PEER} load Llama": "load-peer"}, llama)
    return series


def load(
    device: Device = "cpu",
    dtype: DType = "bfloat16",
    layers: Layers = None,
    size: Size = "7b",
    runs: Annotated[int | None, typer.Option("--runs", help="runs of each job; default: 5 (tiny: 1)", min=1)] = None,
    threads: Threads = None,
    folder: Folder = None,
    cold: Annotated[bool, typer.Option("--cold", help="also run with an empty page cache; needs root")] = False,
    out: Out = None,
    save: Save = False,
    commit: Commit = None,
) -> None:
    """Time and memory of loading, compared with transformers."""
    target = Target.from_options(device, dtype, threads)
    runs = runs or (1 if size == "tiny" else 5)
    if cold and not os.access(DROP_CACHES, os.W_OK):
        raise typer.BadParameter("--cold: the page cache cannot be emptied here (needs root)")
    n_bytes = random_checkpoint.n_bytes(size, layers)
    with scratch_folder(folder, 2.2 * n_bytes) as scratch:
        series = measure(scratch, target, threads, size, layers, runs, cold)
    seconds = series.seconds
    pairs = tuple((a + end, b + end) for a, b in PAIRS for end in ("", ", cold") if a + end in seconds)
    Result(
        benchmark=benchmark_name("load", layers=layers, size=size),
        question="How long does loading take, and how much memory?",
        device=target.device.type,
        dtype=target.dtype_name,
        settings={
            "size": size, "layers": layers or llava_config(size, None, vision=False).decoder.n_layers,
            "page_cache": "warm: read once before each run", "cold_too": cold, "gb_on_disk": n_bytes / 1e9,
            "runs": runs,
        },
        seconds=seconds,
        more=series.memory(),
        figures={f"{name}, GB/s": n_bytes / 1e9 / median(seconds[name]) for name in ("read LLaVA", "llava load LLaVA")},
        pairs=pairs,
        commit=commit,
    ).report(out, save)  # fmt: skip


if __name__ == "__main__":
    typer.run(load)
