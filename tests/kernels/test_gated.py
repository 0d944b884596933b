"""silu(gate) * up, by kernel and by twin, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llava.kernels.gated import eager_silu_mul_, silu_mul_, silu_mul_kernel
from llava.kernels.support import is_interpreted, launch_options

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 172), (70, 30), (2, 2048), (1, 4097)], ids=str)
def test_the_kernel_rounds_the_exact_value_once(shape, dtype, device):
    gate, up = (4 * torch.randn(2, *shape, device=device)).to(dtype)
    expected = F.silu(gate.double()) * up.double()
    found = silu_mul_(gate, up)
    assert found is up
    rounding = torch.finfo(dtype).eps / (1 if is_interpreted() else 2)  # the interpreter truncates bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=1.01 * rounding + 2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_rounds_the_exact_value_once(dtype):
    gate, up = (4 * torch.randn(2, 7, 172)).to(dtype)
    expected = F.silu(gate.double()) * up.double()
    found = eager_silu_mul_(gate, up)
    torch.testing.assert_close(found.double(), expected, rtol=0.51 * torch.finfo(dtype).eps + 2e-6, atol=1e-7)


def test_large_values_stay_finite(device):
    gate, up = torch.tensor([-3e38, -100.0, 0.0, 100.0], device=device), torch.full((4,), 2.0, device=device)
    assert silu_mul_(gate, up).tolist() == [0, 0, 0, 200]


def test_only_the_values_of_the_tensor_are_written(device):
    gate, up = torch.randn(50, device=device), torch.full((80,), torch.nan, device=device)
    up[:50] = 1
    silu_mul_kernel[(1,)](gate, up, 50, 2048, **launch_options(device, num_warps=1))
    torch.testing.assert_close(up[:50], F.silu(gate))
    assert up[50:].isnan().all()
