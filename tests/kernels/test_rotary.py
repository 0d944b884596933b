"""Rotation of new tokens and their way into the pages of a cache, by kernel and by twin, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava.kernels.paged_attention import Positions
from llava.kernels.rotary import eager_rotate_and_store_, rotate_and_store_
from llava.kernels.support import is_interpreted

MAX_SEQ = 60
SHAPES = [(4, 4, 32), (4, 1, 80), (7, 1, 128), (3, 3, 6)]  # query heads, key/value heads, head_dim
BOTH = pytest.mark.parametrize("function", [rotate_and_store_, eager_rotate_and_store_])


def positions(head_dim: int, device: torch.device) -> Positions:
    angles = torch.arange(MAX_SEQ)[:, None] * 100 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    return Positions(cos=angles.cos().to(device), sin=angles.sin().to(device))


def rotated(x: Tensor, at: Tensor, how: Positions) -> Tensor:
    """x [S, H, E] -> [S, H, E] float64"""
    if how.cos is None or how.sin is None:
        return x.double()
    turn = torch.complex(how.cos[at].double(), how.sin[at].double())[:, None]
    y = torch.complex(*x.double().chunk(2, -1)) * turn
    return torch.cat([y.real, y.imag], -1)


@BOTH
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no rope"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_are_rotated_in_place_and_stored_in_their_slots_only(shape, rope, dtype, function, device):
    n_heads, n_kv_heads, head_dim = shape
    how = positions(head_dim, device) if rope else Positions()
    slots, at = torch.tensor([[14, -1, 0, 7, 29, -1], [3, 4, 59, 0, 17, 5]], device=device)
    heads = n_heads + 2 * n_kv_heads
    before = torch.randn(6, heads * head_dim, device=device).to(dtype)
    memory = torch.cat([before, torch.full_like(before, torch.nan)])  # behind the tokens: nothing is touched
    caches = [torch.full((6, 5, n_kv_heads, head_dim), torch.nan, device=device, dtype=dtype) for _ in range(2)]
    function(memory[:6], *caches, slots, at, how, n_heads=n_heads)
    found, x = memory[:6].view(6, heads, head_dim), before.view(6, heads, head_dim)
    tolerance = max(torch.finfo(dtype).eps, 1e-6) * (1 if is_interpreted() else 0.51)
    wanted = rotated(x[:, : n_heads + n_kv_heads], at, how)
    torch.testing.assert_close(found[:, : n_heads + n_kv_heads].double(), wanted, rtol=tolerance, atol=1e-6)
    assert torch.equal(found[:, n_heads + n_kv_heads :], x[:, n_heads + n_kv_heads :])
    assert memory[6:].isnan().all()
    stored, free = slots >= 0, torch.ones(30, dtype=torch.bool, device=device)
    free[slots[stored]] = False
    for cache, parts in zip(caches, (found[:, n_heads : n_heads + n_kv_heads], found[:, -n_kv_heads:]), strict=True):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[slots[stored]], parts[stored])
        assert flat[free].isnan().all()
