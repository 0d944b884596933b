"""A linear layer with what is fused with it, by each kernel and by the twin, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.kernels.fused_linear import Norm, eager_fused_linear, fused_linear
from llava.kernels.matvec import halves
from llava.kernels.skinny_matmul import Tile, skinny_matmul
from llava.kernels.support import is_interpreted

EPS = 1e-5
CPU = torch.device("cpu")
FUSIONS: dict[str, tuple[str, ...]] = {
    "product": (),
    "rms norm": ("rms",),
    "layer norm, clip": ("layer", "clip"),
    "rms norm, gated": ("rms", "gate", "silu"),
    "layer norm, gelu": ("layer", "gelu"),
    "silu": ("silu",),
    "residual": ("residual",),
    "all": ("layer", "gate", "gelu", "clip", "residual"),
}
ROWS = [1, 2, 3, 17, 64, 65]  # a vector, a few rows, many rows
# K is one power of two, the sum of two (5120 and 13824 scaled down), or neither; N is no multiple of a tile
SIZES = [(64, 30), (172, 70), (80, 5), (216, 33)]
EVERY_FUSION = pytest.mark.parametrize("parts", FUSIONS.values(), ids=FUSIONS)

pytestmark = pytest.mark.usefixtures("poisoned")


def dtype_on(device: torch.device) -> torch.dtype:
    """The interpreter has no product of bfloat16 matrices."""
    return torch.float32 if is_interpreted() or device.type == "cpu" else torch.bfloat16


def options(parts: tuple[str, ...], n_rows: int, k: int, n: int, like: Tensor) -> dict[str, Any]:
    """The keyword arguments of `fused_linear` for some of its fusions."""
    made: dict[str, Any] = {}
    if kind := {"rms", "layer"}.intersection(parts):
        made["norm"] = Norm(kind.pop(), 1 + 0.3 * torch.randn_like(like[:1].expand(k)), EPS)  # type: ignore[arg-type]
    if "gate" in parts:
        made["gate"] = torch.randn(n, k, device=like.device).to(like.dtype) * k**-0.5
    if activation := {"silu", "gelu"}.intersection(parts):
        made["activation"] = activation.pop()
    if "residual" in parts:
        made["residual"] = torch.randn(n_rows, n, device=like.device).to(like.dtype)
    if "clip" in parts:
        made["clip"] = 0.7
    return made


def expected(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Norm | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """In float64."""
    x = x.double()
    if norm is not None:
        x = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
        x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    y = x @ weight.double().T
    g = y if gate is None else x @ gate.double().T
    g = {"none": lambda x: x, "silu": F.silu, "gelu": F.gelu}[activation](g)
    y = g if gate is None else g * y
    y = y if clip is None else y.clamp(-clip, clip)
    return y if residual is None else y + residual.double()


def inputs(n_rows: int, k: int, n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x has an offset, which a layer norm takes away."""
    x = 1 + torch.randn(n_rows, k, device=device)
    return x.to(dtype), (torch.randn(n, k, device=device) * k**-0.5).to(dtype)


def check_near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    assert (found.double() - wanted).abs().amax() / wanted.abs().amax() < (1e-5 if dtype == torch.float32 else 0.02)


@EVERY_FUSION
@pytest.mark.parametrize("n_rows", ROWS)
def test_every_fusion_is_near_float64(n_rows: int, parts: tuple[str, ...], device: torch.device) -> None:
    dtype = dtype_on(device)
    for k, n in SIZES if n_rows in (1, 17) else SIZES[1:2]:
        x, weight = inputs(n_rows, k, n, device, dtype)
        asked = options(parts, n_rows, k, n, weight[0])
        wanted = expected(x, weight, **asked)
        found = fused_linear(x, weight, **asked)  # may overwrite the residual
        assert found.dtype == dtype
        check_near(found, wanted, dtype)


@EVERY_FUSION
@pytest.mark.parametrize("n_rows", [1, 65])
def test_the_twin_is_near_float64(n_rows: int, parts: tuple[str, ...]) -> None:
    x, weight = inputs(n_rows, 172, 30, CPU, torch.float32)
    asked = options(parts, n_rows, 172, 30, weight[0])
    check_near(eager_fused_linear(x, weight, **asked), expected(x, weight, **asked), torch.float32)


@pytest.mark.parametrize("n_rows", [1, 3, 65])
def test_the_result_goes_into_memory_of_another_type(n_rows: int, device: torch.device) -> None:
    dtype = torch.float16
    x, weight = inputs(n_rows, 96, 50, device, dtype)
    memory = torch.full((n_rows + 1, 50), torch.nan, dtype=torch.float32, device=device)
    norm = options(("rms",), n_rows, 96, 50, weight[0])["norm"]
    found = fused_linear(x, weight, norm=norm, out=memory[:n_rows])
    assert found.data_ptr() == memory.data_ptr()
    check_near(memory[:n_rows], expected(x, weight, norm=norm), dtype)
    assert memory[n_rows:].isnan().all()


@pytest.mark.parametrize("n_rows", [1, 2, 33])
@pytest.mark.parametrize("parts", [(), ("gate", "silu"), ("residual",)], ids=str)
def test_float16_is_accumulated_in_float32(n_rows: int, parts: tuple[str, ...], device: torch.device) -> None:
    x, weight = inputs(n_rows, 300, 20, device, torch.float16)
    asked = options(parts, n_rows, 300, 20, weight[0])
    wanted = expected(x, weight, **asked)
    found = fused_linear(x, weight, **asked)
    assert (found.double() - wanted).abs().amax() / wanted.abs().amax() < 6e-4


@pytest.mark.parametrize("tile", [Tile(16, 32, 2, 2), Tile(64, 64, 3, 4)], ids=str)
def test_every_tile_gives_the_same_products(tile: Tile, device: torch.device) -> None:
    dtype = dtype_on(device)
    for k in (128, 172):
        x, weight = inputs(5, k, 37, device, dtype)
        out = torch.full((5, 37), torch.nan, device=device, dtype=dtype)
        check_near(skinny_matmul(x, weight, out, tile=tile), expected(x, weight), dtype)


@pytest.mark.parametrize("k", [1, 3, 172, 1024, 4096, 5120, 6144, 8192, 11008, 13824, 14336, 16384])
def test_two_powers_of_two_cover_the_columns_with_little_waste(k: int) -> None:
    a, b = halves(k)
    assert all(one & (one - 1) == 0 for one in (a, b))
    assert k <= a + b < 1.5 * k + 2
    assert b == 0 or a < k


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")
@pytest.mark.parametrize("n_rows", [1, 8, 64, 128])
@pytest.mark.parametrize("sizes", [(4096, 4096), (5120, 13824), (13824, 5120), (4096, 32003)], ids=str)
def test_at_the_sizes_of_large_models(sizes: tuple[int, int], n_rows: int) -> None:
    x, weight = inputs(n_rows, *sizes, torch.device("cuda"), torch.bfloat16)
    for parts in ((), ("rms", "gate", "silu"), ("residual",)):
        asked = options(parts, n_rows, *sizes, weight[0])
        wanted = expected(x, weight, **asked)
        check_near(fused_linear(x, weight, **asked), wanted, torch.bfloat16)
