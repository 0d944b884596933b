"""What does one answer of llava-tiny cost, beside importing torch?

Each run is a process of its own: `python -c "import torch"`, and `llava ask PICTURE QUESTION` without a model. Aim: at
most 1.0 s more, median of 5, on 2 CPU cores.

    python benchmarks/answer.py
"""

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import bench
import typer

PICTURE, QUESTION = bench.ROOT / "examples" / "pictures" / "kitchen.png", "What is in the picture?"


def process(*words: str) -> Callable[[], float]:
    """A command whose seconds are counted from its start to its end."""

    def run() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        return time.perf_counter() - began

    return run


def main(runs: bench.Runs = 5, out: bench.Out = None, save: bench.Save = False, commit: bench.Commit = None) -> None:
    contestants = {
        "llava ask": process("-m", "llava.cli", "ask", str(PICTURE), QUESTION),
        "import torch": process("-c", "import torch"),
    }
    seconds = bench.alternate(contestants, runs)
    bench.Result(
        benchmark="answer-llava-tiny",
        question="One answer of llava-tiny as a process, beside one that only imports torch",
        device="cpu",
        dtype="float32",
        settings={"question": QUESTION, "runs": runs},
        seconds=seconds,
        pairs=(("import torch", "llava ask"),),
        figures={"more than import torch (s)": median(seconds["llava ask"]) - median(seconds["import torch"])},
        commit=commit,
    ).report(out, save)


if __name__ == "__main__":
    typer.run(main)
