"""The resize equals Pillow's bit for bit, on the CPU and on a GPU."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from llava.kernels.resize import resize
from llava.preprocess.raster import resized, resizes_height_first

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def place(request) -> torch.device:
    """Where the resize runs; unlike a kernel, it needs no Triton."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: pytest -m gpu")
    return torch.device(request.param)


def picture(rng, width, height):
    """Noise, sharp edges or a gradient: values at both ends of the range, and in between."""
    kind = rng.integers(3)
    if kind == 0:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == 1:
        return 255 * rng.integers(0, 2, (height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return ramp.astype(np.uint8)


def differing(pixels, size, box, device):
    """Number of values that differ from Pillow's."""
    expected = np.asarray(resized(Image.fromarray(pixels), size, box))
    height_first = resizes_height_first((pixels.shape[1], pixels.shape[0]), size)
    found = resize(torch.from_numpy(pixels).to(device), size, box, height_first=height_first).cpu().numpy()
    assert found.shape == expected.shape
    return int((found != expected).sum())


def test_a_thousand_random_sizes_equal_pillow(place):
    rng = np.random.default_rng(20261128)
    for i in range(1000):
        largest = 900 if i % 50 == 0 else 90
        (width, height), size = rng.integers(1, largest, 2).tolist(), tuple(rng.integers(1, largest, 2).tolist())
        box = None
        if i % 3 == 0:
            left, top = rng.uniform(0, width - 0.5), rng.uniform(0, height - 0.5)
            box = (left, top, rng.uniform(left + 0.4, width), rng.uniform(top + 0.4, height))
        assert differing(picture(rng, width, height), size, box, place) == 0, (width, height, size, box)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((4000, 3000), (448, 336)),
        ((3000, 4000), (336, 448)),
        ((1, 700), (336, 5000)),
        ((5000, 3), (400, 336)),
        ((336, 336), (336, 336)),
        ((400, 1200), (336, 1008)),
        ((336, 900), (336, 336)),
        ((900, 336), (336, 336)),
    ],
)
def test_large_thin_and_unchanged_sizes_equal_pillow(shape, size, place):
    assert differing(picture(np.random.default_rng(1), *shape), size, None, place) == 0


def test_the_golden_pictures_equal_pillow(shared, place):
    paths = [*sorted((shared / "golden" / "images").glob("*.*g")), *(shared / "data").glob("*.jpg")]
    assert len(paths) > 2
    for path, side in product(paths, (224, 336)):
        pixels = np.array(Image.open(path).convert("RGB"))
        for size in [(side, side), (side * 2, side), (side, int(side * 1.37))]:
            assert differing(pixels, size, None, place) == 0, (path.name, size)


def test_a_picture_that_is_not_contiguous_equals_its_copy(place):
    pixels = picture(np.random.default_rng(2), 50, 40)
    turned = torch.from_numpy(pixels).to(place).transpose(0, 1)
    assert torch.equal(resize(turned, (20, 30)), resize(turned.contiguous(), (20, 30)))
