"""Pictures to pixels, as the LLaVA code (mm_utils.py at c121f04) and CLIP's image processor do it, bit for bit.

W, H: width and height of a picture in pixels. Sizes are (w, h) unless they say otherwise.
"""

import io
import math
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from llava.config import ImageConfig, TileGrid
from llava.errors import ImageError

Picture = str | Path | bytes | BinaryIO | Image.Image
Size = tuple[int, int]


class Views(NamedTuple):
    """One picture, ready for the vision tower."""

    pixels: Tensor  # float32 [views, 3, S, S], normalised
    grid: TileGrid | None  # anyres with tiles: how they are put together
    size: Size  # of the picture as opened


def open_picture(source: Picture, *, exif: bool = False) -> Image.Image:
    """Any still picture that Pillow reads, as RGB; of an animated one the first frame. Transparency is dropped.

    `exif`: turn the picture as its EXIF orientation says; LLaVA does not. Raises ImageError.
    """
    name = str(source) if isinstance(source, str | Path) else str(getattr(source, "name", "picture"))
    if not isinstance(source, str | Path | bytes | Image.Image) and not hasattr(source, "read"):
        raise ImageError(f"{source!r:.60} is no picture: give a path, bytes or a PIL.Image")
    try:
        if isinstance(source, str | Path) and not Path(source).is_file():
            raise ImageError(f"{name:.200}: no such picture")
        image = source if isinstance(source, Image.Image) else Image.open(_stream(source))
        if exif:
            image = ImageOps.exif_transpose(image)
        return image.convert("RGB")
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(f"{name}: more than {limit} pixels, refused as a decompression bomb; shrink it") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow's readers raise
        raise ImageError(f"{name:.200}: not a picture that Pillow can read, or a damaged one ({error})") from None


def _stream(source: str | Path | bytes | BinaryIO) -> str | Path | BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def to_views(image: Image.Image, config: ImageConfig, patches: int) -> Views:
    """Views of an RGB picture: one if it is cropped or padded, else (anyres) the whole picture and its tiles.

    `patches`: how many the vision tower sees along a side of a view.
    """
    grid = None
    if config.aspect == "anyres":
        canvas = choose_canvas(image.size, config)
        grid = tile_grid(image.size, canvas, config, patches)
        views = [image.resize((config.size, config.size)), *_tiles(image, canvas, config)]
    elif config.aspect == "pad" and config.mode == "original":
        views = [_pad_to_square(image, config)]
    else:
        views = [image]
    return Views(torch.cat([normalise(_crop(view, config.size), config) for view in views]), grid, image.size)


def normalise(image: Image.Image, config: ImageConfig) -> Tensor:
    """[1, 3, S, S] float32: (uint8 / 255 - mean) / std, with CLIP's order of rounding."""
    scaled = (np.asarray(image, dtype=np.uint8) * (1 / 255)).astype(np.float32)
    pixels = (scaled - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).unsqueeze(0)


def _crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest edge resized to `size`, then the middle square."""
    along = 1 if image.width <= image.height else 0  # the axis of the long edge
    short, long = image.size[1 - along], image.size[along]
    long_after = int(size * long / short)
    start, stop = (long_after - size) // 2, (long_after - size) // 2 + size
    margin = 0
    if long_after > 64 * size:
        # A 1 x 4000 picture would grow to 336 x 1,344,000: only the square is computed, and what its filter reaches.
        margin = math.ceil(3 * long_after / long)
    low, high = (max(start - margin, 0), min(stop + margin, long_after)) if margin else (0, long_after)
    a, b, seen = low * long / long_after, high * long / long_after, high - low
    if along:
        resized = image.resize((size, seen), Image.Resampling.BICUBIC, box=(0, a, image.width, b))
        return resized.crop((0, start - low, size, stop - low))
    resized = image.resize((seen, size), Image.Resampling.BICUBIC, box=(a, 0, b, image.height))
    return resized.crop((start - low, 0, stop - low, size))


def _pad_to_square(image: Image.Image, config: ImageConfig) -> Image.Image:
    side = max(image.size)
    if image.width == image.height:
        return image
    r, g, b = (int(255 * channel) for channel in config.mean)
    canvas = Image.new("RGB", (side, side), (r, g, b))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def choose_canvas(size: Size, config: ImageConfig) -> Size:
    """The canvas (w, h) that shows most of the picture, then the one that wastes least; the first wins a tie."""
    w, h = size
    best: tuple[float, float] = (-1, -math.inf)
    chosen: Size = config.pinpoints[0]
    for canvas in config.pinpoints:
        scale = min(canvas[0] / w, canvas[1] / h)
        shown = min(int(w * scale) * int(h * scale), w * h)
        if (shown, shown - canvas[0] * canvas[1]) > best:
            best, chosen = (shown, shown - canvas[0] * canvas[1]), canvas
    return chosen


def _fitted(size: Size, canvas: Size) -> Size:
    """Largest size of the picture's shape within the canvas."""
    scale_w, scale_h = canvas[0] / size[0], canvas[1] / size[1]
    if scale_w < scale_h:
        return canvas[0], min(math.ceil(size[1] * scale_w), canvas[1])
    return min(math.ceil(size[0] * scale_h), canvas[0]), canvas[1]


def _tiles(image: Image.Image, canvas: Size, config: ImageConfig) -> list[Image.Image]:
    fitted = _fitted(image.size, canvas)
    whole = Image.new("RGB", canvas, (0, 0, 0))
    whole.paste(image.resize(fitted), ((canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2))
    s = config.size
    corners = [(x, y) for y in range(0, canvas[1], s) for x in range(0, canvas[0], s)]
    return [whole.crop((x, y, x + s, y + s)) for x, y in corners]


def tile_grid(size: Size, canvas: Size, config: ImageConfig, patches: int) -> TileGrid | None:
    """Which patches of the tiles are kept, `patches` a side in each; None where all views are simply strung together.

    The original cuts the padding off on the grid of patches with a rounding of its own, which may keep a row too many
    and of a very thin picture nothing at all.
    """
    if config.merge == "flat":
        return None
    cols, rows = canvas[0] // config.size, canvas[1] // config.size
    height, width = rows * patches, cols * patches
    top = left = 0
    if config.merge == "spatial_unpad":
        w, h = size
        if w / h > width / height:
            top = (height - _whole(h * (width / w), config)) // 2
        else:
            left = (width - _whole(w * (height / h), config)) // 2
    newline = config.merge == "spatial_unpad"
    return TileGrid(rows=rows, cols=cols, top=top, bottom=height - top, left=left, right=width - left, newline=newline)


def _whole(x: float, config: ImageConfig) -> int:
    return int(x) if config.mode == "original" else int(round(x, 7))
