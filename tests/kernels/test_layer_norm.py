"""LayerNorm and the residual sum before it, by kernel and by twin, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llava.kernels.layer_norm import add_layer_norm, eager_add_layer_norm, layer_norm, layer_norm_kernel
from llava.kernels.support import is_interpreted, launch_options

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 17, 1024), (5, 64), (2, 100), (1, 1280), (0, 64)]


def inputs(shape, dtype, device):
    """x, y, weight and bias; x has an offset, and a few large values as CLIP's residual stream has."""
    x, y = torch.randn(2, *shape, device=device)
    x = x + 3
    x[..., 7] += 50
    weight, bias = torch.randn(2, shape[-1], device=device)
    return [tensor.to(dtype) for tensor in (x, y, weight, bias)]


def exact(x, weight, bias):
    return F.layer_norm(x.double(), x.shape[-1:], weight.double(), bias.double(), EPS)


def close(y, expected, dtype):
    # In float32 the mean, the variance and its root each add their own rounding to the last one.
    tolerance = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=max(tolerance / 50, 3e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_normalises_like_float64(shape, dtype, device):
    x, _, weight, bias = inputs(shape, dtype, device)
    close(layer_norm(x, weight, bias, EPS), exact(x, weight, bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [add_layer_norm, eager_add_layer_norm])
def test_the_sum_is_rounded_and_then_normalised(function, shape, dtype, device):
    x, y, weight, bias = inputs(shape, dtype, device)
    total, out = function(x, y, weight, bias, EPS)
    rounding = torch.finfo(dtype).eps if is_interpreted() else 0  # the interpreter truncates bfloat16
    torch.testing.assert_close(total, x + y, rtol=rounding, atol=0)
    close(out, exact(total, weight, bias), dtype)


@pytest.mark.parametrize("add", [False, True])
def test_only_the_rows_of_the_tensor_are_written(add, device):
    x, y, weight, bias = inputs((3, 100), torch.float32, device)
    total, out = torch.full((2, 5, 100), torch.nan, device=device)
    layer_norm_kernel[(3,)](x, y, weight, bias, total, out, EPS, 100, 128, add, **launch_options(device, num_warps=1))
    close(out[:3], exact(x + y if add else x, weight, bias), torch.float32)
    assert out[3:].isnan().all()
    assert total[3 if add else 0 :].isnan().all()


def test_rows_in_another_layout_give_the_same_values(device):
    x, y, weight, bias = inputs((4, 6, 64), torch.bfloat16, device)
    turned = add_layer_norm(x.transpose(0, 1), y.transpose(0, 1), weight, bias, EPS)
    for one, other in zip(turned, add_layer_norm(x, y, weight, bias, EPS), strict=True):
        assert torch.equal(one, other.transpose(0, 1))
