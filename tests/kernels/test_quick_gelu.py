"""CLIP's activation, by kernel and by twin, against float64."""

from __future__ import annotations

import pytest
import torch

from llava.kernels.quick_gelu import eager_quick_gelu, quick_gelu, quick_gelu_kernel
from llava.kernels.support import is_interpreted, launch_options

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 577, 8), (4096,), (2, 0, 4), (5, 1000)])
def test_the_kernel_rounds_the_exact_value_once(shape, dtype, device):
    x = (8 * torch.randn(shape, device=device)).to(dtype)
    rounding = torch.finfo(dtype).eps / (1 if is_interpreted() else 2)  # the interpreter truncates bfloat16
    torch.testing.assert_close(quick_gelu(x).double(), exact(x), rtol=1.01 * rounding + 1e-6, atol=1e-7)


def test_values_of_any_size_stay_finite(device):
    x = torch.tensor([-3e38, -100.0, -0.0, 0.0, 100.0, 3e38], device=device)
    assert quick_gelu(x).tolist() == [0, 0, 0, 0, 100, x[-1].item()]


def test_a_tensor_in_another_layout_gives_the_same_values(device):
    x = torch.randn(64, 48, device=device)
    assert torch.equal(quick_gelu(x.T), quick_gelu(x).T)


def test_only_the_values_of_the_tensor_are_written(device):
    x = torch.randn(1000, device=device)
    out = torch.full((2000,), torch.nan, device=device)
    quick_gelu_kernel[(1,)](x, out, 1000, 4096, **launch_options(device, num_warps=8))
    torch.testing.assert_close(out[:1000].double(), exact(x), rtol=1e-6, atol=1e-7)
    assert out[1000:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_is_within_three_roundings(dtype):
    x = (8 * torch.randn(10_000)).to(dtype)
    error = (eager_quick_gelu(x).double() - exact(x)).abs()
    assert (error <= 8 * torch.finfo(dtype).eps * x.abs() + 1e-6).all()
