"""Random schedules of requests on a GPU give what the plain model gives; see tests/schedules.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.command import PROJECT

TIMEOUT_S = 240


def run_schedules(out: Path, n: int, *options: str) -> dict[str, object]:
    """Runs n schedules. Returns the counts of what happened in them."""
    command = [sys.executable, "-m", "tests.schedules", "--n", str(n), "--seed", "13", "--out", str(out), *options]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, object] = json.loads(out.read_text())
    assert report["outcomes"] == {"equal": n}
    return report


@pytest.mark.slow
def test_processes_that_share_schedules_run_each_of_them(tmp_path: Path) -> None:
    report = run_schedules(tmp_path / "out.json", 3, "--jobs", "2")
    assert sum(report["models"].values()) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")
def test_300_random_schedules_give_what_the_plain_model_gives(tmp_path: Path) -> None:
    """With batch_invariant=True, replies also have the bits that they have alone in the engine."""
    report = run_schedules(tmp_path / "out.json", 300, "--device", "cuda", "--jobs", "12")
    counts = report["counts"]
    assert report["batch_invariant"] > 30
    assert counts["preemptions"] > 50
    assert counts["prefix_hit_tokens"] > 1000
    assert counts.get("ties", 0) < 0.02 * counts["requests"]
