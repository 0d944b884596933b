"""Large pictures that are resized as tensors give the pixels of Pillow."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from llava.config import ImageConfig, PictureOptions
from llava.engine.picture_memory import GpuPictureMemory
from llava.errors import ImageError
from llava.preprocess import raster
from llava.preprocess.image import decode, to_views
from llava.preprocess.raster import Raster, Size, copy_pixels

CANVASES = ((56, 28), (28, 56), (56, 56))
NORMAL: dict[str, Any] = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
CONFIGS = [
    ImageConfig(size=28, aspect="square", **NORMAL),
    ImageConfig(size=28, aspect="pad", **NORMAL),
    ImageConfig(size=28, aspect="anyres", pinpoints=CANVASES, merge="spatial_unpad", **NORMAL),
]
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")]


class Memory:
    """Accepts every picture, in the memory of the CPU."""

    def accepts(self, size: Size) -> bool:
        return True

    def empty(self, size: Size) -> NDArray[np.uint8]:
        return np.full((size[1], size[0], 3), 7, np.uint8)

    def upload(self, pixels: NDArray[np.uint8]) -> Raster:
        return Raster(torch.from_numpy(pixels))


class GpuMemory(GpuPictureMemory):
    """Accepts every picture, in the memory of the GPU."""

    def accepts(self, size: Size) -> bool:
        return True


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def memory(request: pytest.FixtureRequest) -> Memory | GpuMemory:
    return Memory() if request.param == "cpu" else GpuMemory(torch.device("cuda"))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.aspect)
@pytest.mark.parametrize("size", [(200, 150), (150, 200), (60, 190), (28, 28), (20, 31), (700, 2), (1, 300), (33, 33)])
def test_views_equal_those_of_pillow(size: Size, config: ImageConfig, memory: Memory) -> None:
    picture = noise(*size)
    decoded = decode(picture, memory=memory).image
    assert isinstance(decoded, Raster)
    found, expected = to_views(decoded, config, 4), to_views(picture, config, 4)
    assert torch.equal(found.pixels, expected.pixels)
    assert found[1:] == expected[1:]


def test_golden_pictures_equal_those_of_pillow(golden: Path, memory: Memory) -> None:
    for path in sorted((golden / "images").glob("*.*g")):
        for config in CONFIGS:
            expected = to_views(decode(path).image, config, 4).pixels
            assert torch.equal(to_views(decode(path, memory=memory).image, config, 4).pixels, expected), path.name


def test_transparency_and_orientation_are_applied_before_the_upload(memory: Memory) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    noise(40, 30).save(file, "JPEG", exif=exif)
    logo = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    options = PictureOptions(exif=True, transparency="white")
    for source in (file.getvalue(), logo):
        found, expected = decode(source, options, memory).image, decode(source, options).image
        assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_a_picture_that_is_too_small_stays_in_pillow() -> None:
    memory = GpuPictureMemory(torch.device("cuda"))
    assert isinstance(decode(noise(50, 50), memory=memory).image, Image.Image)
    assert [memory.accepts(size) for size in [(640, 480), (4000, 3000)]] == [False, True]


def test_a_broken_picture_has_the_same_message(memory: Memory) -> None:
    with pytest.raises(ImageError, match="picture: is not an image in a known format"):
        decode(b"words", memory=memory)


@pytest.mark.parametrize("height", [1, 63, 64, 65, 1000])
def test_all_rows_are_copied(height: int) -> None:
    picture = noise(5, height)
    target = np.zeros((height, 5, 3), np.uint8)
    copy_pixels(picture, target)
    assert np.array_equal(target, np.asarray(picture))


@pytest.mark.skipif(int(PIL.__version__.partition(".")[0]) < 13, reason="needs Pillow 13, whose pixels are compared")
def test_pictures_are_resized_by_older_versions_as_by_pillow_13(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(13)
    monkeypatch.setattr(raster, "_PILLOW_CHOOSES", False)
    height_first = 0
    for i in range(500):
        width, height, *size = rng.integers(1, 120, 4).tolist()
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        left, top = rng.uniform(0, width - 0.5), rng.uniform(0, height - 0.5)
        box = (left, top, rng.uniform(left + 0.4, width), rng.uniform(top + 0.4, height)) if i % 2 else None
        expected = image.resize(tuple(size), Image.Resampling.BICUBIC, box)
        assert np.array_equal(raster.resized(image, tuple(size), box), expected), (width, height, size, box)
        height_first += raster.resizes_height_first(image.size, tuple(size))
    assert height_first > 50
