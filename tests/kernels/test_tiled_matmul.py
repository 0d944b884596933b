"""The product whose rows do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llava.kernels.support import is_interpreted
from llava.kernels.tiled_matmul import eager_tiled_matmul, tiled_matmul

CPU = torch.device("cpu")
# of results, relative to the largest one; 16-bit ones are rounded once, where Triton's interpreter truncates bfloat16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.0079 if is_interpreted() else 0.0040, torch.float16: 0.0005}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
Product = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(device: torch.device, dtype: torch.dtype, *sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [S, I], weight [O, I] and bias [O] for the sizes S, I, O."""
    n_rows, n_in, n_out = sizes
    shapes = ((n_rows, n_in), (n_out, n_in), (n_out,))
    x, weight, bias = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    return x, weight, bias


def check_near_float64(product: Product, device: torch.device, dtype: torch.dtype, *sizes: int) -> None:
    x, weight, bias = inputs(device, dtype, *sizes)
    for more in ((), (bias,)):
        expected = torch.nn.functional.linear(x.double(), weight.double(), *(b.double() for b in more))
        found = product(x, weight, *more)
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        error = (found.double() - expected).abs().amax() / expected.abs().amax()
        assert error < TOLERANCE[dtype], error


def check_rows_by_themselves(product: Product, device: torch.device, dtype: torch.dtype, *sizes: int) -> None:
    """A row alone has the bits that it has at any index among others, even if these contain NaN."""
    x, weight, bias = inputs(device, dtype, *sizes)
    alone = torch.cat([product(row, weight, bias) for row in x.split(1)])
    for n in (*range(1, 18), len(x)):
        assert torch.equal(product(x[:n], weight, bias), alone[:n])
        assert torch.equal(product(x[-n:], weight, bias), alone[-n:])
    order = torch.randperm(len(x), device=device)
    assert torch.equal(product(x[order], weight, bias), alone[order])
    x[1::2] = torch.nan
    assert torch.equal(product(x, weight, bias)[::2], alone[::2])


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 64, 64), (17, 172, 100), (64, 4, 256), (130, 300, 5), (3, 1, 1)], ids=str)
def test_products_are_near_those_in_float64(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    check_near_float64(tiled_matmul, device, dtype, *sizes)


@DTYPES
def test_the_twins_products_are_near_those_in_float64(dtype: torch.dtype) -> None:
    check_near_float64(eager_tiled_matmul, CPU, dtype, 70, 172, 100)


@DTYPES
def test_a_row_does_not_depend_on_other_rows(device: torch.device, dtype: torch.dtype) -> None:
    check_rows_by_themselves(tiled_matmul, device, dtype, 70, 172, 100)


@DTYPES
def test_a_row_of_the_twin_does_not_depend_on_other_rows(dtype: torch.dtype) -> None:
    check_rows_by_themselves(eager_tiled_matmul, CPU, dtype, 70, 172, 100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")
@DTYPES
@pytest.mark.parametrize("sizes", [(200, 4096, 4096), (200, 11008, 4096), (130, 4096, 32003)], ids=str)
def test_at_the_sizes_of_a_7b_model(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    check_near_float64(tiled_matmul, torch.device("cuda"), dtype, *sizes)
    check_rows_by_themselves(tiled_matmul, torch.device("cuda"), dtype, *sizes)


def test_transposed_weights_and_rows_at_any_address_give_the_same_bits(device: torch.device) -> None:
    x, weight, _ = inputs(device, torch.float32, 9, 33, 20)
    expected = tiled_matmul(x, weight)
    assert torch.equal(tiled_matmul(x[1:], weight), expected[1:])
    assert torch.equal(tiled_matmul(x.T.contiguous().T, weight), expected)
    assert torch.equal(tiled_matmul(x, weight.T.contiguous().T), expected)
    assert torch.equal(tiled_matmul(x.view(3, 3, 33), weight), expected.view(3, 3, 20))


def test_no_rows_give_no_rows(device: torch.device) -> None:
    x, weight, bias = inputs(device, torch.float32, 0, 8, 5)
    assert tiled_matmul(x, weight, bias).shape == (0, 5)


def test_float64_is_not_rounded_to_float32(device: torch.device) -> None:
    x, weight, bias = inputs(device, torch.float64, 5, 40, 8)
    torch.testing.assert_close(tiled_matmul(x, weight, bias), x @ weight.T + bias, rtol=1e-12, atol=1e-12)
