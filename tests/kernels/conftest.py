"""Where the tests of kernels run: in Triton's interpreter on the CPU, and on a GPU.

A test of a kernel takes the fixture `device` and puts its tensors there. It then exists twice:

- `[interpreter]` runs if TRITON_INTERPRET=1 is set when the process starts, since kernels are decorated when they are
  imported. `test_interpreter.py` starts such a process for each test file here, as a part of an ordinary run.
- `[cuda]` has the mark `gpu`, and runs with `pytest -m gpu`.

Without Triton both are skipped. Tests that need no kernel, such as those of eager twins, do not take `device`.
A file with kernels needs `from __future__ import annotations`: the interpreter does not understand quoted annotations.
"""

from collections.abc import Iterator

import pytest
import torch

from llava.kernels.support import is_interpreted, triton

TARGETS = [
    pytest.param("cpu", id="interpreter"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=TARGETS)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device on which kernels run."""
    if triton is None:
        pytest.skip("needs Triton")
    if request.param == "cpu" and not is_interpreted():
        pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1); test_interpreter.py runs it")
    if request.param == "cuda" and (is_interpreted() or not torch.cuda.is_available()):
        pytest.skip("needs a GPU: pytest -m gpu")
    return torch.device(request.param)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that a kernel's caller allocates contains NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors
    yield
    torch.use_deterministic_algorithms(False)
