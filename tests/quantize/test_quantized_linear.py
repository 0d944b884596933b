"""The contract of a quantized linear layer. A new method needs one line in METHODS."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava.errors import ConfigError
from llava.quantize.nf4 import NF4Linear
from llava.quantize.quantized_linear import QuantizedLinear

O, I = 96, 128  # noqa: E741 (output and input features)


class Method(NamedTuple):
    """A way to quantize, and what it promises."""

    layer: Any  # a class that is a QuantizedLinear and an nn.Module
    error: float  # bound on the relative error of normally distributed weights
    bits: float  # stored per weight


METHODS = {"nf4": Method(NF4Linear, error=0.12, bits=4.5)}


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


@pytest.fixture
def linear() -> nn.Linear:
    made = nn.Linear(I, O, bias=False)
    with torch.no_grad():
        made.weight.copy_(0.02 * torch.randn(O, I, generator=torch.Generator().manual_seed(0)))
    return made


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_weight_and_product_stay_within_the_error_bound_of_float64(method: Method, linear: nn.Linear) -> None:
    layer: QuantizedLinear = method.layer.from_linear(linear)
    exact = linear.weight.detach().double()
    x = torch.randn(7, I, generator=torch.Generator().manual_seed(1))
    assert (layer.in_features, layer.out_features) == (I, O)
    assert relative_error(layer.dequantize(torch.float32), exact) < method.error
    assert relative_error(layer.forward(x).detach(), x.double() @ exact.T) < method.error


def test_forward_multiplies_by_the_dequantized_weight(method: Method, linear: nn.Linear) -> None:
    layer = method.layer.from_linear(linear)
    x = torch.randn(3, 5, I, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer(x)
    expected = x @ layer.dequantize(torch.float32).T
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    (ours,), (theirs,) = (torch.autograd.grad((one * weight).sum(), x) for one in (y, expected))
    torch.testing.assert_close(ours, theirs)


def test_the_size_is_what_the_method_promises(method: Method, linear: nn.Linear) -> None:
    layer = method.layer.from_linear(linear)
    assert layer.nbytes == method.bits * O * I / 8
    assert layer.nbytes == sum(tensor.nbytes for tensor in layer.state_dict().values())


def test_saving_and_loading_keeps_every_bit(method: Method, linear: nn.Linear, tmp_path: Path) -> None:
    layer = method.layer.from_linear(linear)
    save_file(layer.state, tmp_path / "layer.safetensors")
    loaded = method.layer(I, O)
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
    assert torch.equal(loaded.dequantize(torch.float32), layer.dequantize(torch.float32))


def test_a_layer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="99 weights, which is not a multiple of the block size 64"):
        NF4Linear.from_linear(nn.Linear(9, 11, bias=False))
    with pytest.raises(ConfigError, match="has a bias"):
        NF4Linear.from_linear(nn.Linear(8, 8))
