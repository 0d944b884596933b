"""The vision tower on a CPU."""

import pytest
import torch

from llava.config import VisionConfig
from llava.model.vision import Vision

CONFIG = VisionConfig(dim=64, n_layers=4, n_heads=2, mlp_dim=96, image_size=28, patch_size=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_gives_the_bits_of_training(dtype: torch.dtype) -> None:
    tower = Vision(CONFIG).to(dtype)
    for weight in tower.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    pixels = torch.randn(2, 3, 28, 28).to(dtype)
    expected = tower(pixels)
    with torch.inference_mode():
        assert torch.equal(tower(pixels), expected)
