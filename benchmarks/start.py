"""How long does `llava ask` take from the start of the process to the first byte of a LLaVA-1.5-7B's answer?

The model is a random checkpoint with the real shapes in the native layout (about 14 GB; 31 GB of disk in all, removed
at the end), read once before each run. `python -c "import torch"` is timed too: no answer can be faster.

    python benchmarks/start.py --size tiny
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import random_checkpoint
import typer
from PIL import Image
from processes import LLAVA, Folder, read_files, run_watched, scratch_folder, weight_files
from result import OURS, ROOT, Commit, Out, Result, Save, benchmark_name
from shapes import Layers, Size, llava_config
from timing import Device, DType, Target

SIDE, QUESTION = 336, "What is in the picture?"  # pixels
TEXT, PICTURE, TORCH = f"{OURS} ask, text", f"{OURS} ask, picture", "python starts, import torch"


def first_byte(argv: list[str], reads: Path | None = None) -> float:
    """Seconds from the start of a process to the first byte on its stdout, or to its end if there is none."""
    read_files(weight_files(reads) if reads else [])
    with tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=err, stdin=subprocess.DEVNULL, cwd=ROOT, bufsize=0
        )
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        answer = (first + process.stdout.read()).decode(errors="replace").strip()
        if process.wait() or (reads and not answer):
            err.seek(0)
            raise SystemExit(f"{' '.join(argv)} gave {answer!r} and exit code {process.returncode}\n{err.read()}")
    return seconds


def contestants(folder: Path, target: Target, size: str, layers: int | None) -> dict[str, Callable[[], float]]:
    """Writes the native folder and a picture, and returns the functions to time."""
    source, native, picture = random_checkpoint.write_llava(folder, size, layers), folder / "native", folder / "1.png"
    run_watched([*LLAVA, "convert", str(source), str(native)])
    shutil.rmtree(source)
    Image.effect_noise((SIDE, SIDE), 80).convert("RGB").save(picture)
    options = ["--model", str(native), "--max-new-tokens", "4", "--dtype", target.dtype_name]
    options += ["--device", str(target.device)]
    return {
        TORCH: lambda: first_byte([sys.executable, "-c", "import torch"]),
        TEXT: lambda: first_byte([*LLAVA, "ask", QUESTION, *options], native),
        PICTURE: lambda: first_byte([*LLAVA, "ask", str(picture), QUESTION, *options], native),
    }


def main(
    device: Device = "cpu",
    dtype: DType = "bfloat16",
    layers: Layers = None,
    size: Size = "7b",
    runs: Annotated[int | None, typer.Option("--runs", help="runs per command; default: 5 (tiny: 1)", min=1)] = None,
    picture_runs: Annotated[int, typer.Option("--picture-runs", help="runs with a picture", min=0)] = 1,
    folder: Folder = None,
    out: Out = None,
    save: Save = False,
    commit: Commit = None,
) -> None:
    """Seconds from the start of the process to the first byte of an answer."""
    target = Target.from_options(device, dtype, None)
    runs = runs or (1 if size == "tiny" else 5)
    n_bytes = random_checkpoint.n_bytes(size, layers)
    seconds: dict[str, list[float]] = {}
    with scratch_folder(folder, 2.2 * n_bytes) as scratch:
        for name, run in contestants(scratch, target, size, layers).items():
            for _ in range(picture_runs if name == PICTURE else runs):
                seconds.setdefault(name, []).append(run())
                print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    Result(
        benchmark=benchmark_name("start", layers=layers, size=size),
        question="How long does the first byte of an answer take from the start of the process?",
        device=target.device.type,
        dtype=target.dtype_name,
        settings={
            "size": size, "layers": layers or llava_config(size, None, vision=False).decoder.n_layers,
            "page_cache": "warm: read once before each run", "runs": runs, "picture_runs": picture_runs,
        },
        seconds=seconds,
        pairs=((TORCH, TEXT),),
        commit=commit,
    ).report(out, save)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
