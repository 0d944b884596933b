"""LayerNorm, by kernel and by twin, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llava.kernels.layer_norm import eager_layer_norm, layer_norm, layer_norm_kernel
from llava.kernels.support import launch_options

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 17, 1024), (5, 64), (2, 100), (1, 1280), (0, 64)]


def inputs(shape, dtype, device):
    """x, weight, bias and shift; x has an offset, and a few large values as CLIP's residual stream has."""
    x = torch.randn(*shape, device=device) + 3
    x[..., 7] += 50
    weight, bias, shift = torch.randn(3, shape[-1], device=device)
    return [*(tensor.to(dtype) for tensor in (x, weight, bias)), shift]


def exact(x, weight, bias):
    return F.layer_norm(x.double(), x.shape[-1:], weight.double(), bias.double(), EPS)


def close(y, expected, dtype):
    # In float32 the mean, the variance and its root each add their own rounding to the last one.
    tolerance = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=max(tolerance / 50, 3e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [layer_norm, eager_layer_norm])
def test_rows_are_normalised_like_in_float64(function, shape, dtype, device):
    x, weight, bias, shift = inputs(shape, dtype, device)
    close(function(x, weight, bias, EPS), exact(x, weight, bias), dtype)
    close(function(x, weight, bias, EPS, shift), exact(x.double() + shift.double(), weight, bias), dtype)


@pytest.mark.parametrize("shifted", [False, True])
def test_only_the_rows_of_the_tensor_are_written(shifted, device):
    x, weight, bias, shift = inputs((3, 100), torch.float32, device)
    out = torch.full((5, 100), torch.nan, device=device)
    layer_norm_kernel[(3,)](
        x, shift if shifted else None, weight, bias, out, EPS, 100, 128, **launch_options(device, num_warps=1)
    )
    close(out[:3], exact(x + shift if shifted else x, weight, bias), torch.float32)
    assert out[3:].isnan().all()


def test_rows_in_another_layout_give_the_same_values(device):
    x, weight, bias, shift = inputs((4, 6, 64), torch.bfloat16, device)
    turned = layer_norm(x.transpose(0, 1), weight, bias, EPS, shift)
    assert torch.equal(turned, layer_norm(x, weight, bias, EPS, shift).transpose(0, 1))
