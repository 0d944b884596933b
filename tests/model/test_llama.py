"""The Llama block: norm, rotary positions and their scaling."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llava.config import DecoderConfig, RopeScaling
from llava.model.attention import CausalContext
from llava.model.llama import RMSNorm, Rope, rotate

SIZES: dict[str, Any] = {"kind": "llama", "n_layers": 1, "dim": 48, "n_heads": 4, "n_kv_heads": 4, "head_dim": 12}
SIZES |= {"mlp_dim": 96, "vocab_size": 40, "max_seq": 64, "eps": 1e-5, "rope_theta": 10000.0}
DYNAMIC = RopeScaling(kind="dynamic", factor=4.0, original_max_seq=16)
CPU = torch.device("cpu")


def rope(scaling: RopeScaling | None = None) -> Rope:
    return Rope(DecoderConfig(**SIZES, rope_scaling=scaling))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_computed_in_float32_and_rounded_before_the_weight(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = 30 * torch.randn(5, 48, generator=generator), torch.randn(48, generator=generator)
    norm = RMSNorm(48, 1e-5).requires_grad_(False).to(dtype)
    norm.weight.copy_(weight)
    x32 = x.to(dtype).float()
    rounded = (x32 / (x32.square().mean(-1, keepdim=True) + 1e-5).sqrt()).to(dtype)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(norm(x.to(dtype)), rounded * weight.to(dtype), **tolerance)


def test_rotation_turns_each_pair_of_components_by_its_angle() -> None:
    x = torch.randn(1, 7, 2, 12, generator=torch.Generator().manual_seed(0))
    rotation, _ = rope()(CausalContext.of(x), x.dtype)
    angles = torch.arange(7.0)[:, None] / 10000 ** (torch.arange(6) / 6)
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.polar(torch.ones(7, 6), angles)[:, None]
    torch.testing.assert_close(rotate(x, rotation), torch.cat([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-5)


def test_dynamic_scaling_of_a_tensor_of_lengths_is_that_of_each_length() -> None:
    lengths = torch.tensor([[1, 16, 17], [40, 64, 17]])
    together = rope(DYNAMIC).frequencies(lengths, CPU)
    assert together.shape == (2, 3, 6)
    alone = torch.stack([rope(DYNAMIC).frequencies(n, CPU) for n in lengths.flatten().tolist()])
    torch.testing.assert_close(together.flatten(0, 1), alone, rtol=1e-7, atol=0)
    assert torch.equal(together[0, 2], together[1, 2])


@pytest.mark.parametrize("seq_len", [1, 16, 17, 40])
def test_dynamic_scaling_raises_the_base_only_beyond_the_original_context(seq_len: int) -> None:
    theta = 10000 * max(1.0, 4 * seq_len / 16 - 3) ** (12 / 10)
    expected = torch.tensor([theta ** (-i / 6) for i in range(6)])
    torch.testing.assert_close(rope(DYNAMIC).frequencies(seq_len, CPU), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaling", [None, RopeScaling(kind="linear", factor=2.0, original_max_seq=16)], ids=str)
def test_other_scaling_does_not_depend_on_the_length(scaling: RopeScaling | None) -> None:
    lengths: list[int | Tensor] = [3, 40, torch.tensor([3, 40])]
    found = [rope(scaling).frequencies(n, CPU) for n in lengths]
    assert all(torch.equal(one, found[0]) for one in found)
    assert found[0].shape == (6,)
