"""Peak memory of conversions and merges."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava.convert.split import make_delta
from tests import tiny

PEAK = """
import os, sys, threading, time
from pathlib import Path
from llava.convert.verify import logits
from llava.convert.merge import apply_delta
from llava.checkpoint.open import open_checkpoint

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) // 1024

before, peak, running = anonymous(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
WORK
running = False; thread.join()
print(peak - before)
"""


def peak(work: str, *arguments: Path) -> int:
    """Runs `work` in a separate process and returns the anonymous memory it needs in MB."""
    command = [sys.executable, "-c", PEAK.replace("WORK", work), *arguments]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux reports RssAnon")
def test_comparing_logits_takes_a_large_vocabulary_in_pieces(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "vocab_size": 200_000, "num_hidden_layers": 1}
    folder = tiny.write_llama(tmp_path / "wide", **sizes)
    found = peak("logits(open_checkpoint(sys.argv[1]), 512)", folder)
    assert found < 330, found  # MB; the head takes 410 in float32, its chunks 67


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux reports RssAnon")
def test_memory_does_not_grow_with_the_number_of_layers(clip: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, **tiny.LLAMA_1}
    peaks = []
    for layers in (2, 16):
        folder = tmp_path / str(layers)
        base = tiny.write_llama(folder / "base", seed=7, num_hidden_layers=layers, **sizes)
        whole = tiny.write_llava(folder / "whole", clip=clip, num_hidden_layers=layers, **sizes)
        make_delta(whole, base, folder / "delta", file_type="bin")
        peaks.append(peak("apply_delta(*map(Path, sys.argv[1:]))", base, folder / "merged", folder / "delta"))
    assert peaks[1] <= peaks[0] + 12, peaks  # MB; 14 more layers hold 75
