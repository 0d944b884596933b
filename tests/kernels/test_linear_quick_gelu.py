"""A linear layer and CLIP's activation in one kernel, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llava.kernels.linear_quick_gelu import (
    eager_linear_quick_gelu,
    linear_quick_gelu,
    tiled_linear_quick_gelu,
    why_not_tiled,
)
from llava.kernels.support import TensorDescriptor, is_interpreted

SIZES = [(5000, 64, 96), (100, 1024, 4096), (1, 16, 8), (129, 200, 264), (0, 64, 64)]  # S, I, O
IN_INTERPRETER = [(100, 64, 96), (1, 16, 8), (33, 40, 72), (0, 64, 64)]

pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(device, dtype, n_rows, n_in, n_out):
    x, bias = torch.randn(n_rows, n_in, device=device), torch.randn(n_out, device=device)
    weight = 2 * torch.randn(n_out, n_in, device=device) / n_in**0.5
    return [tensor.to(dtype) for tensor in (x, weight, bias)]


def exact(x, weight, bias):
    y = F.linear(x.double(), weight.double(), bias.double())
    return y * torch.sigmoid(1.702 * y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_rounds_the_activated_product_once(dtype, device):
    if not is_interpreted() and why_not_tiled(device, 8, 8):
        pytest.skip(f"the kernel cannot run here: {why_not_tiled(device, 8, 8)}")
    if TensorDescriptor is None:
        pytest.skip("needs a Triton with tensor descriptors")
    for sizes in IN_INTERPRETER if is_interpreted() else SIZES:
        x, weight, bias = inputs(device, dtype, *sizes)
        rounding = torch.finfo(dtype).eps / (1 if is_interpreted() else 2)  # the interpreter truncates bfloat16
        y = tiled_linear_quick_gelu(x, weight, bias)
        torch.testing.assert_close(y.double(), exact(x, weight, bias), rtol=1.02 * rounding, atol=2e-5)


@pytest.mark.parametrize("function", [linear_quick_gelu, eager_linear_quick_gelu])
@pytest.mark.parametrize("sizes", [(2, 577, 64, 96), (9, 577, 64, 96), (9, 577, 60, 90)], ids=str)
def test_views_of_any_number_and_layers_of_any_width_get_the_activated_product(sizes, function, device):
    *rows, n_in, n_out = sizes
    x, weight, bias = inputs(device, torch.bfloat16, rows[0] * rows[1], n_in, n_out)
    y = function(x.view(*rows, n_in), weight, bias)
    assert y.shape == (*rows, n_out)
    torch.testing.assert_close(y.flatten(0, 1).double(), exact(x, weight, bias), rtol=0.02, atol=0.02)


def test_rows_beyond_a_tile_do_not_change_the_others(device):
    x, weight, bias = inputs(device, torch.bfloat16, 40, 64, 64)
    if why_not_tiled(device, 64, 64):
        pytest.skip("needs tensor descriptors")
    y = tiled_linear_quick_gelu(x, weight, bias)
    assert torch.equal(y[:33], tiled_linear_quick_gelu(x[:33], weight, bias))
    assert y.isfinite().all()
