"""The perceptual hash of pictures: what counts as the same picture, and what does not."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.tiny.glyphs import Glyphs
from examples.tiny.world import draw
from llava.data.picture_hash import DEFAULT_DISTANCE, N_BITS, near, picture_hash
from llava.errors import ImageError
from tests.conftest import PROJECT

Copy = Callable[[Image.Image], bytes]


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def scaled(image: Image.Image, factor: float) -> Image.Image:
    width, height = image.size
    return image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    """Scenes of llava-tiny's world: different things of the same few kinds, on backgrounds of one colour and others."""
    pack = Glyphs.load(PROJECT / "tests" / "examples" / "glyphs")
    return [draw(seed, pack, pack.styles).image.convert("RGB") for seed in range(100)]


@pytest.fixture(scope="module")
def photos(shared: Path) -> list[Image.Image]:
    names = ("waterview.jpg", "extreme_ironing.jpg")
    return [Image.open(shared / "data" / name).convert("RGB") for name in names]


def distance(one: bytes, other: bytes) -> int:
    first, second = picture_hash(one), picture_hash(other)
    assert first is not None
    assert second is not None
    return int(np.unpackbits((first ^ second).view(np.uint8)).sum())


COPIES: dict[str, Copy] = {
    "jpeg": lambda image: encoded(image, "JPEG", quality=90),
    "jpeg of low quality": lambda image: encoded(image, "JPEG", quality=30),
    "half the size": lambda image: encoded(scaled(image, 0.5)),
    "twice the size": lambda image: encoded(scaled(image, 2), "JPEG"),
    "336 x 336": lambda image: encoded(image.resize((336, 336)), "JPEG"),
    "webp": lambda image: encoded(image, "WEBP", quality=60),
    "gif": lambda image: encoded(image, "GIF"),
    "bmp": lambda image: encoded(image, "BMP"),
    "palette": lambda image: encoded(image.quantize(64)),
    "grey": lambda image: encoded(image.convert("L")),
    "cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG", quality=90),
    "opaque alpha": lambda image: encoded(image.convert("RGBA")),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_copy_has_nearly_the_same_hash(copy: Copy, scenes: list[Image.Image], photos: list[Image.Image]) -> None:
    distances = sorted(distance(encoded(image), copy(image)) for image in [*photos, *scenes[:25]])
    assert distances[-2] <= DEFAULT_DISTANCE
    assert distances[-1] <= 1.5 * DEFAULT_DISTANCE


def test_different_pictures_of_one_world_are_far_apart(scenes: list[Image.Image], photos: list[Image.Image]) -> None:
    hashes = np.array([picture_hash(encoded(image)) for image in [*scenes, *photos]])
    assert list(near(hashes, hashes, 3 * DEFAULT_DISTANCE)) == [(i, i, 0) for i in range(len(hashes))]


@pytest.mark.parametrize("change", [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90])
def test_a_mirrored_or_rotated_picture_is_another(change: Image.Transpose, photos: list[Image.Image]) -> None:
    for photo in photos:
        assert distance(encoded(photo), encoded(photo.transpose(change))) > 3 * DEFAULT_DISTANCE


PLAIN = {
    "one colour": Image.new("RGB", (300, 200), "steelblue"),
    "black": Image.new("L", (1, 1)),
    "gradient": Image.linear_gradient("L"),
    "two halves": Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 100, axis=1).repeat(90, axis=0)),
    "faint noise": Image.fromarray(np.random.default_rng(0).integers(127, 129, (400, 400), np.uint8)),
}


@pytest.mark.parametrize("image", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_plain_picture_has_no_hash(image: Image.Image, format: str) -> None:
    assert picture_hash(encoded(image, format)) is None


def test_a_broken_picture_is_an_error(photos: list[Image.Image]) -> None:
    whole = encoded(photos[0], "JPEG")
    for data in (b"", b"no picture", b"\xff\xd8\xff", whole[: len(whole) // 2]):
        with pytest.raises(ImageError):
            picture_hash(data)


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (4100, 40), (40, 4100)])
def test_near_finds_the_pairs_that_counting_bits_finds(n: int, m: int) -> None:
    random = np.random.default_rng(n)
    ones, others = (random.integers(0, 2**64, (size, 4), np.uint64) for size in (n, m))
    if n and m:
        ones[n // 2 :: 7] = others[m // 2]  # more than a block away from the start
        ones[n - 1] ^= np.array([0, 0b1011, 0, 1 << 63], np.uint64)
    bits = np.unpackbits((ones[:, None] ^ others[None]).view(np.uint8).reshape(n, m, 32), axis=-1).sum(-1)
    for limit in (0, 4, 100, N_BITS // 2):
        expected = {(int(i), int(j), int(bits[i, j])) for i, j in np.argwhere(bits <= limit)}
        assert set(near(ones, others, limit)) == expected
