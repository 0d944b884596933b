"""How much time and memory does converting a LLaVA-1.5-7B take? Compared with a copy of its files.

Writes a random checkpoint with the real shapes in bfloat16 (about 14 GB; 45 GB of disk in all, removed at the end) and
runs each job in a separate process. Memory is measured and the page cache filled as in load.py. "copy" and
transformers are timed after their imports, conversions from the start of the process.

    python benchmarks/convert.py --size tiny
"""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import random_checkpoint
import torch
import typer
from processes import LLAVA, Folder, Series, Task, job, run_watched, scratch_folder
from result import OURS, PEER, ROOT, Commit, Out, Result, Save, benchmark_name
from shapes import Layers, Size, llava_config
from timing import Target

TARGET = Target(device=torch.device("cpu"), dtype=torch.bfloat16)
PAIRS = tuple((name, "copy LLaVA") for name in (f"{OURS} convert to native", f"{OURS} convert to llama", "model.pth"))


def measure(folder: Path, size: str, layers: int | None, runs: int) -> Series:
    """Times converting a LLaVA to three layouts, then loading and saving its plain Llama with transformers."""
    series = Series()
    source = random_checkpoint.write_llava(folder, size, layers)
    clip, native, llama = folder / "clip", folder / "native", folder / "llama"
    convert = [*LLAVA, "convert", str(source)]
    script = [sys.executable, str(ROOT / "scripts" / "convert_hf_checkpoint.py"), "--checkpoint_dir", str(source)]
    to_llama = [*convert, str(llama), "--to", "llama"]
    tasks = [
        job("copy LLaVA", "copy", source, TARGET, makes=folder / "copied"),
        Task("model.pth", script, [source], False, source / "model.pth"),
        Task(f"{OURS} convert to llama", to_llama, [source], False, llama),
        Task(f"{OURS} convert to native", [*convert, str(native)], [source, clip], False, native),
    ]
    series.run(tasks, runs)
    run_watched(to_llama)
    shutil.rmtree(source)
    saved = job(f"{PEER} load and save Llama", "save-peer", llama, TARGET, makes=folder / "saved")
    series.run([saved], runs)
    return series


def main(
    layers: Layers = None,
    size: Size = "7b",
    runs: Annotated[int | None, typer.Option("--runs", help="runs of each job; default: 3 (tiny: 1)", min=1)] = None,
    folder: Folder = None,
    out: Out = None,
    save: Save = False,
    commit: Commit = None,
) -> None:
    """Time and memory of conversions."""
    runs = runs or (1 if size == "tiny" else 3)
    n_bytes = random_checkpoint.n_bytes(size, layers)
    with scratch_folder(folder, 3.2 * n_bytes) as scratch:
        series = measure(scratch, size, layers, runs)
    Result(
        benchmark=benchmark_name("convert", layers=layers, size=size),
        question="How long do conversions take, and how much memory?",
        device="cpu",
        dtype="bfloat16",
        settings={
            "size": size, "layers": layers or llava_config(size, None, vision=False).decoder.n_layers,
            "page_cache": "warm: read once before each run", "gb_on_disk": n_bytes / 1e9, "runs": runs,
        },
        seconds=series.seconds,
        more=series.memory(),
        pairs=PAIRS,
        commit=commit,
    ).report(out, save)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
