"""torch.compile changes only the speed."""

import shutil
from pathlib import Path

import pytest

import llava
from llava.assistant import Assistant

COMPILER = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="torch.compile on a CPU needs a C++ compiler; found none")
def test_compiled_steps_equal_eager_ones_in_two_shapes(checkpoint: Path) -> None:
    eager = llava.load(checkpoint, device="cpu", dtype="float32")
    compiled = Assistant(eager.model, eager.preprocessor, compile=True)
    short = "Once upon a time"
    long = "Look at the left side of the photo, then at the right one, and compare the two. " * 12
    for prompt in (short, long):
        assert (
            compiled.generate(prompt, max_new_tokens=12).token_ids
            == eager.generate(prompt, max_new_tokens=12).token_ids
        )
