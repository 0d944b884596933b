"""Attention among the tokens of a view, against float64."""

import pytest
import torch
import torch.nn.functional as F

from llava.kernels.support import is_interpreted
from llava.kernels.view_attention import eager_view_attention, tiled_view_attention, view_attention

SIZES = [
    (8, 577, 16, 64),
    (3, 257, 16, 64),
    (2, 64, 2, 32),
    (2, 65, 3, 16),
    (1, 1, 1, 128),
]  # V, N, H, E
IN_INTERPRETER = [(2, 49, 2, 64), (1, 32, 1, 32), (3, 17, 2, 16), (1, 1, 1, 128)]

pytestmark = pytest.mark.usefixtures("poisoned")


def exact(qkv, n_heads):
    q, k, v = qkv.double().unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [tiled_view_attention, eager_view_attention])
def test_every_token_attends_to_all_tokens_of_its_view(function, dtype, device):
    for n_views, n, n_heads, head_dim in IN_INTERPRETER if is_interpreted() else SIZES:
        qkv = torch.randn(n_views, n, 3 * n_heads * head_dim, device=device).to(dtype)
        y = function(qkv, n_heads)
        eps = torch.finfo(dtype).eps * (2 if is_interpreted() else 1)  # the interpreter truncates bfloat16
        torch.testing.assert_close(y.double(), exact(qkv, n_heads), rtol=eps, atol=2 * eps)


@pytest.mark.parametrize("size", [1.0, 100.0, 10_000.0])
def test_large_logits_do_not_overflow(size, device):
    qkv = (size * torch.randn(1, 40, 3 * 2 * 16, device=device)).bfloat16()
    assert tiled_view_attention(qkv, 2).isfinite().all()


def test_views_do_not_change_each_other(device):
    qkv = torch.randn(9, 33, 3 * 2 * 16, device=device).bfloat16()
    y = view_attention(qkv, 2)
    for i in (0, 8):
        assert torch.equal(y[i : i + 1], tiled_view_attention(qkv[i : i + 1], 2))


@pytest.mark.parametrize("head_dim", [24, 80])
def test_heads_whose_width_is_no_power_of_two_are_left_to_the_library(head_dim, device):
    qkv = torch.randn(9, 20, 3 * 2 * head_dim, device=device).bfloat16()
    assert torch.equal(view_attention(qkv, 2), eager_view_attention(qkv, 2))
