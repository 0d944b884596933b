"""simplejpeg decodes JPEG files to Pillow's pixels, or leaves them to Pillow."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from llava.config import PictureOptions
from llava.errors import ImageError
from llava.preprocess import jpeg
from llava.preprocess.image import read_picture

pytest.importorskip("simplejpeg", reason="needs simplejpeg: pip install 'llava-native[fast-jpeg]'")


def noise(mode: str = "RGB", size: tuple[int, int] = (61, 45)) -> Image.Image:
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else size[::-1]
    return Image.fromarray(np.random.default_rng(len(mode)).integers(0, 256, shape, dtype=np.uint8), mode)


def encoded(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def by_pillow(contents: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(contents)).convert("RGB"))


def uses_simplejpeg(contents: bytes) -> bool:
    image = Image.open(io.BytesIO(contents))
    empty = lambda size: np.full((size[1], size[0], 3), 7, np.uint8)  # noqa: E731
    return jpeg.can_decode(image) and jpeg.decode(contents, image.size, empty) is not None


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quality", [5, 50, 85, 100])
def test_pixels_equal_those_of_pillow(
    subsampling: str, quality: int, progressive: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 2**22)  # Pillow's buffer is too small for small noisy pictures
    for size in [(1, 1), (7, 9), (16, 16), (17, 33), (200, 131), (64, 1)]:
        contents = encoded(noise(size=size), quality=quality, subsampling=subsampling, progressive=progressive)
        (tmp_path / "picture.jpg").write_bytes(contents)
        assert uses_simplejpeg(contents)
        for source in (contents, tmp_path / "picture.jpg", str(tmp_path / "picture.jpg")):
            assert np.array_equal(np.asarray(read_picture(source).image), by_pillow(contents))


def test_photos_equal_those_of_pillow(shared: Path) -> None:
    for path in (shared / "data").glob("*.jpg"):
        assert uses_simplejpeg(path.read_bytes())
        assert np.array_equal(np.asarray(read_picture(path).image), by_pillow(path.read_bytes()))


@pytest.mark.parametrize(
    "contents",
    [
        pytest.param(encoded(noise("L")), id="grey"),
        pytest.param(encoded(noise("CMYK")), id="CMYK"),
        pytest.param(encoded(noise(), quality=90)[:-40] + b"\xff\xd9", id="scan that ends early"),
    ],
)
def test_other_kinds_are_left_to_pillow(contents: bytes) -> None:
    assert not uses_simplejpeg(contents)
    assert np.array_equal(np.asarray(read_picture(contents).image), by_pillow(contents))


def test_a_rotated_photo_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = encoded(noise(), exif=exif)
    assert read_picture(contents).image.size == (61, 45)
    assert read_picture(contents, PictureOptions(exif=True)).image.size == (45, 61)


def test_a_truncated_file_has_pillows_message() -> None:
    with pytest.raises(ImageError, match=r"picture: is damaged.*truncated"):
        read_picture(encoded(noise())[:-500])


def test_an_image_that_is_already_open_is_not_decoded_again() -> None:
    image = Image.open(io.BytesIO(encoded(noise())))
    image.load()
    image.putpixel((0, 0), (1, 2, 3))
    assert read_picture(image).image.getpixel((0, 0)) == (1, 2, 3)
