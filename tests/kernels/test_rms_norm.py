"""RMSNorm, by kernel and by twin, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava.kernels.rms_norm import eager_rms_norm, rms_norm, rms_norm_kernel
from llava.kernels.support import is_interpreted, launch_options

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def check(found: Tensor, x: Tensor, weight: Tensor) -> None:
    rounding = torch.finfo(x.dtype).eps / (1 if is_interpreted() else 2)  # the interpreter truncates bfloat16
    torch.testing.assert_close(found.double(), expected(x, weight), rtol=1.01 * rounding + 2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (17, 172), (3, 5120), (65, 30), (0, 8)], ids=str)
def test_the_kernel_rounds_the_exact_value_once(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = ((8 * torch.randn(size, device=device)).to(dtype) for size in (shape, shape[1]))
    check(rms_norm(x, weight, EPS), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_rounds_the_exact_value_once(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(size).to(dtype) for size in ((9, 172), 172))
    found, rounding = eager_rms_norm(x, weight, EPS).double(), torch.finfo(dtype).eps / 2
    torch.testing.assert_close(found, expected(x, weight), rtol=1.01 * rounding + 2e-6, atol=1e-7)


def test_only_the_rows_of_the_tensor_are_written(device: torch.device) -> None:
    x, weight = torch.randn(3, 30, device=device), torch.randn(30, device=device)
    out = torch.full((5, 30), torch.nan, device=device)
    rms_norm_kernel[(3,)](x, weight, out, EPS, 30, 32, **launch_options(device, num_warps=1))
    check(out[:3], x, weight)
    assert out[3:].isnan().all()


def test_columns_of_a_wider_tensor_are_normalised_by_themselves(device: torch.device) -> None:
    x, weight = torch.randn(4, 100, device=device), torch.randn(50, device=device)
    check(rms_norm(x[:, 50:], weight, EPS), x[:, 50:], weight)
