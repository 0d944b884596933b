"""The vision tower computes the same with the kernels for its norms, sums and activation as without."""

import copy

import pytest
import torch

from llava.config import VisionConfig
from llava.kernels.support import is_interpreted
from llava.model.vision import Vision, uses_kernels

CONFIG = VisionConfig(dim=64, n_layers=4, n_heads=2, mlp_dim=96, image_size=28, patch_size=7)


@pytest.fixture
def tower() -> Vision:
    torch.manual_seed(0)
    tower = Vision(CONFIG)
    for name, weight in tower.named_parameters():
        torch.nn.init.normal_(weight, std=0.2)
        if name.endswith("norm.weight"):
            weight.data += 1
    return tower.requires_grad_(False)


def exact(tower: Vision, pixels: torch.Tensor) -> torch.Tensor:
    """The features in float64, with the same weights."""
    return copy.deepcopy(tower).cpu().double()(pixels.cpu().double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_kernels_are_as_close_to_float64_as_separate_operations(dtype, tower, device):
    tower = tower.to(device, dtype)
    pixels = torch.randn(3, 3, 28, 28, device=device).to(dtype)
    plain = tower(pixels)
    with torch.inference_mode():
        assert uses_kernels(pixels)
        fused = tower(pixels)
    expected = exact(tower, pixels)
    errors = [(features.cpu().double() - expected).norm() / expected.norm() for features in (plain, fused)]
    bound = 3 if is_interpreted() and dtype == torch.bfloat16 else 1.2  # the interpreter truncates bfloat16
    assert errors[1] < max(bound * errors[0], torch.finfo(dtype).eps)
    assert fused.shape == (3, 16, 64)


def test_training_uses_separate_operations(tower, device):
    pixels = torch.randn(1, 3, 28, 28, device=device).bfloat16()
    assert not uses_kernels(pixels)
    with torch.no_grad():  # a frozen tower, whose blocks FSDP gathers when they are called
        assert not uses_kernels(pixels)
    with torch.inference_mode():
        assert not uses_kernels(pixels.float())
