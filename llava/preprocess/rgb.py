"""Converts a picture of any Pillow mode to 8-bit RGB, and reports what the conversion loses.

8-bit modes are converted as in the original LLaVA code (Pillow's `convert("RGB")`). Pillow itself clips wider values:
every grey of a 16-bit picture above 255 would become white. Here, they are scaled to 8 bits.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llava.config import Transparency
from llava.errors import ImageError

_MAX_HIDDEN = 0.1  # fraction of transparent pixels above which dropping the alpha channel is reported
_FEW_SHADES = 16  # a wider picture with fewer shades than this in 8 bits is reported
_MIN_SHOWN = 0.1  # fraction of the visible pixels that must differ from a background, for the picture to be seen
_UNNOTICED = 8  # difference in an 8-bit value that is not noticed
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO, _UNSIGNED = 0, 1  # values of the last two
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # greys of fewer bits, which Pillow scales to 8, but not the transparent one
_AS_8_BITS = (
    "scaled from the range {:.6g} to {:.6g}; to use another range, save the image with 8 bits per channel beforehand"
)


class RgbPicture(NamedTuple):
    """A picture as 8-bit RGB."""

    image: Image.Image
    losses: tuple[str, ...]  # values or transparency that the conversion lost, one line each


def to_rgb(image: Image.Image, transparency: Transparency) -> RgbPicture:
    """Converts a picture to RGB. `transparency` decides what happens to an alpha channel or a transparent colour.

    Greys of 16 bits (12 in some TIFFs) are scaled so that their largest possible value becomes 255, rounded to the
    nearest value. The range of 32-bit integers and floats is unknown: floats from 0 to 1 and integers from 0 to 255
    keep their meaning, and other values are stretched so that the smallest becomes 0 and the largest 255.

    Raises ImageError if the values include NaN or infinity.
    """
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    is_wide = _has_16_bit_channels(image)
    alpha = _alpha(image)
    image, lost = _to_8_bits(image)
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # a copy of 12 megapixels takes 9 ms
    rgb.load()
    lost += _too_dark(rgb) if is_wide else ()
    if alpha is None:
        return RgbPicture(rgb, lost)
    if transparency == "drop":
        return RgbPicture(rgb, lost + _hidden(rgb, alpha))
    background = Image.new("RGB", rgb.size, transparency)
    background.paste(rgb, mask=alpha)
    return RgbPicture(background, lost)


def _hidden(rgb: Image.Image, alpha: Image.Image) -> tuple[str, ...]:
    """Reports transparent pixels, unless `rgb` shows the picture as a white or a black background would."""
    hidden = np.asarray(alpha) < 128  # bool [height, width]; alpha below one half: mostly transparent
    if hidden.mean() <= _MAX_HIDDEN:
        return ()
    colours = np.asarray(rgb)
    for background in (colours.min(-1) >= 255 - _UNNOTICED, colours.max(-1) <= _UNNOTICED):
        shown = ~hidden & ~background  # a logo whose own colour is also the hidden one cannot be seen
        if (hidden & ~background).mean() <= _MAX_HIDDEN and shown.sum() > _MIN_SHOWN * (~hidden).sum():
            return ()
    return (
        f"{hidden.mean():.0%} of its pixels are transparent, and the colours stored under them are used; to place it "
        "on a background instead, white or black, set transparency=white (--transparency white)",
    )


def _alpha(image: Image.Image) -> Image.Image | None:
    """Returns the alpha channel (mode L), also that of a palette or of a single transparent colour, or None."""
    if image.mode in ("LA", "PA", "RGBA"):
        return image.getchannel("A")
    if image.mode == "P" and image.has_transparency_data:
        return image.convert("RGBA").getchannel("A")
    colour = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(colour, tuple):  # of a 16-bit PNG, Pillow keeps the high bytes
        colour = tuple(value >> 8 for value in colour) if max(colour) > 255 else colour
        opaque = (np.asarray(image) != np.array(colour)).any(-1)
    elif image.mode in ("1", "L", "I") or image.mode.startswith("I;16"):
        if not isinstance(colour, int):
            return None
        if tile := getattr(image, "tile", None):  # of a file that is not decoded yet; (decoder, box, offset, raw mode)
            colour *= _GREY_STEPS.get(tile[0][3], 1)
        opaque = np.asarray(image.convert("L") if image.mode == "1" else image) != colour
    else:
        return None
    return Image.fromarray(np.where(opaque, np.uint8(255), np.uint8(0)))


def _has_16_bit_channels(image: Image.Image) -> bool:
    """Returns whether a file that is not decoded yet has 16-bit values of which Pillow keeps only the high bytes."""
    if image.mode not in ("RGB", "RGBA", "LA") or not (tile := getattr(image, "tile", None)):
        return False
    raw_mode = tile[0][3] if isinstance(tile[0][3], str) else tile[0][3][0]
    return str(raw_mode).endswith((";16B", ";16L", ";16N"))


def _too_dark(rgb: Image.Image) -> tuple[str, ...]:
    high = max(high for _, high in rgb.getextrema())  # type: ignore[misc]  # (min, max) per band
    if high >= _FEW_SHADES:
        return ()
    return (_dark(f"below {(high + 1) * 256}", 65535),)


def _dark(end: str, max_value: int) -> str:
    return f"its values end {end} of {max_value}, so few shades are left in 8 bits; scale its values up beforehand"


def _to_8_bits(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Returns a picture with 16-bit, 32-bit or float values in mode L, and any other picture as it is."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image, ()
    tags: Any = getattr(image, "tag_v2", {})  # only TIFFs have it
    values = np.asarray(image)  # [height, width]
    if image.mode == "I" and tags and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
        values = values.view(np.uint32)  # which Pillow stores as int32
    # Older versions of Pillow open 16-bit PNGs in mode I. PGMs with more than 8 bits are scaled to 16 bits by Pillow.
    if image.mode in ("I", "F") and not (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey, lost = _stretched(values)
    else:
        grey, lost = _scaled(values, max_value=(1 << tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts only 8-bit pictures of this kind
        grey = 255 - grey
    return Image.fromarray(grey), lost


def _scaled(values: NDArray[Any], max_value: int) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Scales values from 0 to `max_value` to the range from 0 to 255, rounded to the nearest value."""
    table = ((np.arange(max_value + 1) * 255 + max_value // 2) // max_value).astype(np.uint8)
    highest = int(values.max())
    if not 0 < highest < max_value // _FEW_SHADES:
        return table[values], ()
    return table[values], (_dark(f"at {highest}", max_value),)


def _stretched(values: NDArray[Any]) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Scales integers or floats of an unknown range to the range from 0 to 255. Raises ImageError for NaN and Inf."""
    low, high = values.min().item(), values.max().item()
    if not np.isfinite((low, high)).all():  # min and max of an array with NaN are NaN
        raise ImageError("its values include NaN or infinity; replace them, and save the image with 8 bits per channel")
    if isinstance(low, int) and low >= 0 and high <= 255:
        return values.astype(np.uint8), ()
    if isinstance(low, float) and low >= 0 and high <= 1:
        return np.rint(values * 255).astype(np.uint8), (f"its values are floats; they are {_AS_8_BITS.format(0, 1)}",)
    scaled = np.rint((values - np.float64(low)) * (255 / ((high - low) or 1))).astype(np.uint8)
    return scaled, (f"its values do not fit 8 bits; they are {_AS_8_BITS.format(low, high)}",)
