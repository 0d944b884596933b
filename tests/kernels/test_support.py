"""Which kernels can run, and why not."""

from __future__ import annotations

import pytest
import torch

from llava.kernels import support
from llava.kernels.support import can_run, has_dependent_launch, is_interpreted, jit, tl, triton, why_not

CPU = torch.device("cpu")


@jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n) + tl.load(y + i, i < n), i < n)


def test_a_kernel_runs_on_the_device(device):
    x, y = torch.randn(2, 1000, device=device)
    out = torch.full_like(x, torch.nan)
    add_kernel[(triton.cdiv(1000, 256),)](x, y, out, 1000, BLOCK=256)
    torch.testing.assert_close(out, x + y, rtol=0, atol=0)
    assert can_run(device)


@pytest.mark.skipif(is_interpreted(), reason="kernels run on the CPU in the interpreter")
def test_kernels_do_not_run_on_a_cpu():
    assert not can_run(CPU)
    assert why_not(CPU) in ("the device is cpu, not cuda", "Triton is not installed, or cannot be imported")


def test_a_cpu_has_no_dependent_launch():
    assert not has_dependent_launch(CPU)


def test_without_triton_a_kernel_is_an_ordinary_function(monkeypatch):
    monkeypatch.setattr(support, "triton", None)
    assert support.jit(print) is print
