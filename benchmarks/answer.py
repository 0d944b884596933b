"""How much longer does one answer of llava-tiny take than importing torch?

Each run is a separate process: `python -c "import torch"`, and `llava ask PICTURE QUESTION` without a model. The
target is at most 1.0 s more (median of 5 runs) on 2 CPU cores.

    python benchmarks/answer.py
"""

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import typer
from result import ROOT, Commit, Out, Result, Save
from timing import Runs, alternate

PICTURE, QUESTION = ROOT / "examples" / "pictures" / "kitchen.png", "What is in the picture?"


def process(*words: str) -> Callable[[], float]:
    """Returns a function that runs `python WORDS` and returns how many seconds that took."""

    def run() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        return time.perf_counter() - started

    return run


def main(runs: Runs = 5, out: Out = None, save: Save = False, commit: Commit = None) -> None:
    contestants = {
        "llava ask": process("-m", "llava.cli", "ask", str(PICTURE), QUESTION),
        "import torch": process("-c", "import torch"),
    }
    seconds = alternate(contestants, runs)
    Result(
        benchmark="answer-llava-tiny",
        question="How much longer does one answer of llava-tiny take than importing torch?",
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
