"""Pictures of every Pillow mode become 8-bit RGB with the right values, or report what is lost."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from llava.errors import ImageError
from llava.preprocess.rgb import RgbPicture, to_rgb

GREYS = [0, 128, 129, 256, 257, 4660, 65535]  # of 16 bits
IN_8_BITS = [0, 0, 1, 1, 1, 18, 255]  # divided by 257, rounded to the nearest value


def converted(image: Image.Image, transparency: Any = "drop") -> RgbPicture:
    result = to_rgb(image, transparency)
    assert result.image.mode == "RGB"
    assert result.image.size == image.size
    return result


def reds(image: Image.Image) -> list[int]:
    """The first channel of the first row. The tests use it for greys, whose channels are the same."""
    pixels = np.asarray(image)
    return pixels[0, :, 0].tolist()


def saved(image: Image.Image, format: str, **options: Any) -> Image.Image:
    """The picture, written to a file and opened again."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(file)


def tiff(values: list[int], bits: int, data: bytes, *, photometric: int = 1, sample_format: int = 1) -> Image.Image:
    """A little-endian TIFF with one row of greys. photometric: 1 black is zero, 0 white is zero."""
    tags = [(256, 4, len(values)), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, 1), (279, 4, len(data)), (339, 3, sample_format)]
    data += bytes(len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return Image.open(io.BytesIO(head + data + struct.pack("<H", len(tags)) + entries + bytes(4)))


def png(width: int, depth: int, colour_type: int, row: bytes, transparent: bytes = b"") -> Image.Image:
    """A PNG with one row. colour_type: 0 grey, 2 RGB, 4 grey with alpha. transparent: contents of the tRNS chunk."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    trns = chunk(b"tRNS", transparent) if transparent else b""
    body = chunk(b"IHDR", head) + trns + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + body))


# ------------------------------------------------------------------------------------------------ wide values


def greys(dtype: Any = np.uint16) -> NDArray[Any]:
    return np.array([GREYS], dtype)


WIDE: dict[str, Callable[[], Image.Image]] = {
    "array": lambda: Image.fromarray(greys()),
    "png": lambda: png(len(GREYS), 16, 0, greys(">u2").tobytes()),
    "tiff": lambda: tiff(GREYS, 16, greys("<u2").tobytes()),
    "big-endian": lambda: Image.frombytes("I;16B", (len(GREYS), 1), greys(">u2").tobytes()),
    "little-endian": lambda: Image.frombytes("I;16L", (len(GREYS), 1), greys("<u2").tobytes()),
    "pgm": lambda: Image.open(io.BytesIO(b"P5 %d 1 65535\n" % len(GREYS) + greys(">u2").tobytes())),
}


@pytest.mark.parametrize("form", WIDE)
def test_greys_of_16_bits_are_scaled_and_rounded_to_the_nearest_value(form: str) -> None:
    image, losses = converted(WIDE[form]())
    assert reds(image) == IN_8_BITS
    assert not losses


def test_a_pgm_of_10_bits_is_scaled_by_its_own_largest_value() -> None:
    file = io.BytesIO(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023))
    assert reds(converted(Image.open(file)).image) == [0, 128, 255]


@pytest.mark.parametrize("form", ["png", "array"])
def test_8_bit_greys_widened_to_16_bits_come_back_unchanged(form: str) -> None:
    wide = (np.arange(256) * 257)[None]
    image = png(256, 16, 0, wide.astype(">u2").tobytes()) if form == "png" else Image.fromarray(wide.astype(np.uint16))
    assert reds(converted(image).image) == list(range(256))


def test_greys_of_12_bits_are_scaled_by_their_own_largest_value() -> None:
    values = [0, 16, 2048, 4095]
    packed = b"".join((a << 12 | b).to_bytes(3, "big") for a, b in zip(values[::2], values[1::2], strict=True))
    assert reds(converted(tiff(values, 12, packed)).image) == [0, 1, 128, 255]


def test_white_is_zero_is_respected_in_16_bits() -> None:
    image = tiff(GREYS, 16, greys("<u2").tobytes(), photometric=0)
    assert reds(converted(image).image) == [255 - value for value in IN_8_BITS]


@pytest.mark.parametrize(("values", "warned"), [([0, 4094], True), ([0, 4096], False), ([0, 0], False)])
def test_greys_that_use_little_of_their_16_bits_are_reported(values: list[int], warned: bool) -> None:
    _, losses = converted(Image.fromarray(np.array([values], np.uint16)))
    assert [("4094 of 65535" in loss) for loss in losses] == [True] * warned


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)], ids=["RGB", "LA", "RGBA"])
@pytest.mark.parametrize(("highest", "warned"), [(255, True), (4094, True), (4096, False)])
def test_colours_that_use_little_of_their_16_bits_are_reported(
    colour_type: int, channels: int, highest: int, warned: bool
) -> None:
    values = np.full((2, channels), highest)
    values[0] = 0
    if colour_type != 2:
        values[:, -1] = 65535  # opaque
    _, losses = converted(png(2, 16, colour_type, values.astype(">u2").tobytes()))
    assert [" of 65535, so few shades are left" in loss for loss in losses] == [True] * warned


def test_the_channels_of_16_bit_colours_and_alpha_are_reduced_to_8_bits() -> None:
    image = png(2, 16, 2, struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 65535, 0, 65535))
    assert np.asarray(converted(image).image).tolist() == [[[0x12, 0x56, 0x9A], [255, 0, 255]]]
    with_alpha = png(2, 16, 4, struct.pack(">4H", 0x4000, 0, 0x4000, 65535))
    assert reds(converted(with_alpha, "white").image) == [255, 0x40]


INTEGERS = {
    "signed 32 bits": ([-1000, 0, 1000], "<i4", 32, 2, [0, 128, 255]),
    "unsigned 32 bits": ([0, 2**31, 2**32 - 1], "<u4", 32, 1, [0, 128, 255]),
    "signed 16 bits": ([-32768, 0, 32767], "<i2", 16, 2, [0, 128, 255]),
    "a narrow range": ([700, 740, 800], "<i4", 32, 2, [0, 102, 255]),
    "one value": ([700, 700], "<i4", 32, 2, [0, 0]),
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_an_unknown_range_are_stretched_and_reported(kind: str) -> None:
    values, dtype, bits, sample_format, wanted = INTEGERS[kind]
    image, losses = converted(tiff(values, bits, np.array(values, dtype).tobytes(), sample_format=sample_format))
    assert reds(image) == wanted
    assert len(losses) == 1
    assert f"from the range {min(values):.6g} to {max(values):.6g}" in losses[0]


def test_integers_that_fit_8_bits_are_kept() -> None:
    image, losses = converted(Image.fromarray(np.array([[0, 7, 255]], np.int32)))
    assert reds(image) == [0, 7, 255]
    assert not losses


@pytest.mark.parametrize(
    ("values", "wanted", "range"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255], "0 to 1"),
        ([0.25, 0.5], [64, 128], "0 to 1"),
        ([-1.0, 0.0, 1.0], [0, 128, 255], "-1 to 1"),
        ([0.0, 5.0, 10.0], [0, 128, 255], "0 to 10"),
        ([0.0, 1e30], [0, 255], "0 to 1e+30"),
    ],
)
@pytest.mark.parametrize("file", [False, True])
def test_floats_are_scaled_and_reported(values: list[float], wanted: list[int], range: str, file: bool) -> None:
    picture = Image.fromarray(np.array([values], np.float32))
    image, losses = converted(saved(picture, "TIFF") if file else picture)
    assert reds(image) == wanted
    assert len(losses) == 1
    assert range in losses[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(value: float) -> None:
    with pytest.raises(ImageError, match="NaN or infinity"):
        to_rgb(Image.fromarray(np.array([[0, value, 1]], np.float32)), "drop")


# ------------------------------------------------------------------------------------------------ colour models


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX", "P", "LAB"])
def test_colours_of_other_models_are_converted_without_a_report(mode: str) -> None:
    colours = [(200, 100, 50), (10, 200, 30), (0, 0, 0), (255, 255, 255)]
    rgb = Image.new("RGB", (4, 1))
    rgb.putdata(colours)
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        picture = ImageCms.applyTransform(rgb, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
        picture = saved(picture, "TIFF")
    else:
        picture = rgb.quantize(4) if mode == "P" else rgb.convert(mode)
    image, losses = converted(picture)
    assert np.abs(np.asarray(image)[0].astype(int) - colours).max() <= (9 if mode == "LAB" else 4)
    assert not losses


@pytest.mark.parametrize("mode", ["1", "L"])
def test_black_and_white_stay_black_and_white(mode: str) -> None:
    picture = Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    assert reds(converted(saved(picture, "PNG")).image) == [0, 255]


def test_a_cmyk_jpeg_with_inverted_values_as_adobe_writes_it_has_its_colours() -> None:
    red = saved(Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK"), "JPEG", quality=95)
    assert red.mode == "CMYK"
    assert np.abs(np.asarray(converted(red).image).astype(int) - (200, 30, 40)).max() <= 4


# ------------------------------------------------------------------------------------------------ transparency

GREY = 90


def half_transparent(mode: str) -> Image.Image:
    """Eight pixels of grey 90, of which the first four are transparent."""
    grey = Image.new("L", (8, 1), GREY)
    alpha = Image.fromarray(np.array([[0] * 4 + [255] * 4], np.uint8))
    if mode in ("LA", "RGBA"):
        image = grey.convert(mode)
        image.putalpha(alpha)
        return image
    if mode in ("La", "RGBa"):
        return half_transparent(mode.upper()).convert(mode)
    if mode == "PA":
        return half_transparent("P alphas").convert("PA")
    two = Image.fromarray(np.array([[0] * 4 + [1] * 4], np.uint8), "P" if mode.startswith("P") else None)
    two.putpalette([GREY] * 6)
    return saved(two, "PNG", transparency=bytes([0, 255]) if mode == "P alphas" else 0)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "La", "RGBa", "PA", "P", "P alphas"])
def test_every_kind_of_alpha_is_found(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pillow's, for the mode of fromarray
        picture = half_transparent(mode)
    assert picture.mode == mode.split(maxsplit=1)[0]
    image, losses = converted(picture)
    assert reds(image)[4:] == [GREY] * 4
    premultiplied = mode in ("La", "RGBa")  # their transparent pixels are black, from which the grey stands out
    assert [loss[:3] for loss in losses] == ["50%"] * (not premultiplied)
    for background, value in (("white", 255), ("black", 0)):
        image, losses = converted(picture, background)
        assert reds(image) == [value] * 4 + [GREY] * 4
        assert not losses


KEYED: dict[str, Callable[[], Image.Image]] = {  # one transparent colour, without an alpha channel
    "grey": lambda: png(2, 8, 0, bytes([10, 90]), struct.pack(">H", 10)),
    "four bits": lambda: png(2, 4, 0, bytes([0x36]), struct.pack(">H", 3)),
    "two bits": lambda: png(2, 2, 0, bytes([0b01100000]), struct.pack(">H", 1)),
    "one bit": lambda: png(2, 1, 0, bytes([0b01000000]), struct.pack(">H", 0)),
    "16 bits": lambda: png(2, 16, 0, struct.pack(">2H", 2571, 23130), struct.pack(">H", 2571)),
    "rgb": lambda: png(2, 8, 2, bytes([10, 10, 10, 90, 90, 90]), struct.pack(">3H", 10, 10, 10)),
    "rgb of 16 bits": lambda: png(2, 16, 2, struct.pack(">6H", *[2571] * 3, *[23130] * 3), bytes([10, 11] * 3)),
}


@pytest.mark.parametrize("form", KEYED)
def test_a_transparent_colour_is_found(form: str) -> None:
    first, second = {"four bits": (51, 102), "two bits": (85, 170), "one bit": (0, 255)}.get(form, (10, 90))
    image, losses = converted(KEYED[form]())
    assert reds(image) == [first, second]
    assert [loss[:3] for loss in losses] == ["50%"] * (form != "one bit")  # white on a hidden black can be seen
    assert reds(converted(KEYED[form](), "white").image) == [255, second]


@pytest.mark.parametrize(("transparent", "warned"), [(10, False), (11, True)])
def test_more_than_a_tenth_of_transparent_pixels_is_reported(transparent: int, warned: bool) -> None:
    alpha = np.full((10, 10), 128, np.uint8)
    alpha.flat[:transparent] = 127
    picture = Image.new("RGBA", (10, 10), "red")
    picture.putalpha(Image.fromarray(alpha))
    assert len(converted(picture).losses) == warned


@pytest.mark.parametrize(
    ("hidden", "shown", "warned"),
    [
        ((255, 255, 255), (210, 30, 40), False),  # as a viewer shows it
        ((250, 255, 248), (0, 0, 0), False),
        ((0, 0, 0), (210, 30, 40), False),  # as on black
        ((0, 0, 0), (0, 0, 0), True),  # nothing can be seen
        ((255, 255, 255), (255, 255, 255), True),
        ((90, 140, 220), (210, 30, 40), True),  # as on no usual background
    ],
)
def test_transparency_is_reported_unless_the_picture_looks_as_on_white_or_black(
    hidden: tuple[int, int, int], shown: tuple[int, int, int], warned: bool
) -> None:
    picture = Image.new("RGBA", (20, 20), (*hidden, 0))
    picture.paste((*shown, 255), (5, 5, 15, 15))
    _, losses = converted(picture)
    assert [loss[:3] for loss in losses] == ["75%"] * warned


def test_dropping_alpha_keeps_the_hidden_colours_of_the_original() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    picture = Image.fromarray(noise)
    assert np.array_equal(np.asarray(converted(picture).image), noise[..., :3])


def test_half_transparent_pixels_are_blended_with_the_background() -> None:
    picture = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert reds(converted(picture, "white").image) == [127]
    assert reds(converted(picture, "black").image) == [0]


def test_a_stray_transparency_entry_in_a_picture_made_in_python_is_ignored() -> None:
    picture = Image.new("RGB", (2, 1), (1, 2, 3))
    picture.info["transparency"] = 7  # left over from a palette
    assert converted(picture, "white").image.tobytes() == picture.tobytes()
