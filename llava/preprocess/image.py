"""Converts images to pixel tensors. Bit-exact with LLaVA (mm_utils.py at c121f04) and CLIP's image processor.

Sizes are (width, height) in pixels unless stated otherwise. S: side of a view
"""

import io
import math
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from llava.config import ImageConfig, PictureOptions, TileGrid
from llava.errors import ImageError
from llava.preprocess import jpeg
from llava.preprocess.raster import PictureMemory, Raster, Size, copy_pixels, resized
from llava.preprocess.rgb import RgbPicture, to_rgb

_DEFAULTS = PictureOptions()
_ORIENTATION = ExifTags.Base.Orientation


class Views(NamedTuple):
    """One image, ready for the vision tower."""

    pixels: Tensor  # float32 [views, 3, S, S], normalised
    grid: TileGrid | None  # anyres: arrangement of the tiles; None if the views are simply concatenated
    size: Size  # image size before cropping, padding or resizing


class Preprocessed(NamedTuple):
    """An image whose views have been computed, in another process for example."""

    views: Views
    losses: tuple[str, ...]  # see `RgbPicture`


Picture = str | Path | bytes | BinaryIO | Image.Image | Preprocessed


class Decoded(NamedTuple):
    """An image as 8-bit RGB, in Pillow's memory or in that of the device which resizes it."""

    image: Image.Image | Raster
    losses: tuple[str, ...]  # see `RgbPicture`


def preprocess(
    source: Picture, config: ImageConfig, patches: int, options: PictureOptions, memory: PictureMemory | None = None
) -> Preprocessed:
    """Reads an image and computes its views. Raises ImageError. See `decode` and `to_views`."""
    if isinstance(source, Preprocessed):
        return source
    rgb, losses = decode(source, options, memory)
    return Preprocessed(to_views(rgb, config, patches), losses)


def read_picture(source: Picture, options: PictureOptions = _DEFAULTS) -> RgbPicture:
    """Reads an image in any format that Pillow can read, and converts the first frame to RGB as described in `to_rgb`.

    Each of the `losses` starts with the name of the image. Raises ImageError if the image cannot be read.
    """
    image, losses = decode(source, options)
    assert isinstance(image, Image.Image)
    return RgbPicture(image, losses)


def decode(source: Picture, options: PictureOptions = _DEFAULTS, memory: PictureMemory | None = None) -> Decoded:
    """Like `read_picture`, but puts an image into `memory` if that accepts its size."""
    name = str(source) if isinstance(source, str | Path) else str(getattr(source, "name", None) or "picture")
    try:
        image = _open(source)
        if 0 in image.size:
            raise ImageError("has no pixels")
        memory = memory if memory and memory.accepts(image.size) else None
        pixels = _decode_jpeg(image, source, options, memory) if memory else None
        if memory and pixels is not None:
            return Decoded(memory.upload(pixels), ())
        rgb, losses = to_rgb(image, options.transparency)
        if options.exif:
            rgb.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
            rgb = ImageOps.exif_transpose(rgb)
    except ImageError as error:
        raise ImageError(f"{name:.200}: {error}") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(
            f"{name:.200}: has more than {limit} pixels and may be a decompression bomb; scale the image down"
        ) from None
    except UnidentifiedImageError:  # its own message repeats the name, or shows the address of a buffer
        raise ImageError(f"{name:.200}: is not an image in a known format, or its header is damaged") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # raised by Pillow's decoders
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name:.200}: is damaged, or cannot be read as an image ({reason})") from None
    return Decoded(_upload(rgb, memory) if memory else rgb, tuple(f"{name:.200}: {loss}" for loss in losses))


def _decode_jpeg(
    image: Image.Image, source: Picture, options: PictureOptions, memory: PictureMemory
) -> NDArray[np.uint8] | None:
    """Returns the pixels of an opened JPEG file, or None if Pillow has to decode it."""
    if not isinstance(source, str | Path | bytes) or not jpeg.can_decode(image):
        return None
    if options.exif and image.getexif().get(_ORIENTATION, 1) != 1:
        return None
    contents = source if isinstance(source, bytes) else Path(source).read_bytes()
    return jpeg.decode(contents, image.size, memory.empty)


def _upload(image: Image.Image, memory: PictureMemory) -> Raster:
    pixels = memory.empty(image.size)
    copy_pixels(image, pixels)
    return memory.upload(pixels)


def _open(source: Picture) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str | Path):
        return _open_file(Path(source))
    if isinstance(source, bytes):
        if not source:
            raise ImageError("is empty; expected the contents of an image file")
        return Image.open(io.BytesIO(source))
    if isinstance(source, Preprocessed) or not hasattr(source, "read"):
        raise ImageError(
            f"found {type(source).__name__}; expected a path, bytes, a binary file or a PIL image; "
            "for an array or a tensor, pass PIL.Image.fromarray(array), with array as uint8 [height, width, 3]"
        )
    return Image.open(source)


def _open_file(path: Path) -> Image.Image:
    if path.is_dir():
        raise ImageError("is a folder; expected an image file")
    if not path.exists():
        raise ImageError("no such image file")
    if not path.is_file():  # opening a named pipe could wait forever
        raise ImageError("is not a regular file; expected an image file")
    if not path.stat().st_size:
        raise ImageError("is empty; expected an image file")
    return Image.open(path)


def to_views(image: Image.Image | Raster, config: ImageConfig, patches: int) -> Views:
    """Returns the views of an RGB image: the cropped or padded image or, with anyres, the whole image and its tiles.

    patches: number of vision tower patches along one side of a view.
    """
    grid = None
    if config.aspect == "anyres":
        canvas = choose_canvas(image.size, config)
        grid = tile_grid(image.size, canvas, config, patches)
        views = [resized(image, (config.size, config.size)), *_tiles(image, canvas, config)]
    elif config.aspect == "pad" and config.mode == "original":
        views = [_pad_to_square(image, config)]
    else:
        views = [image]
    return Views(torch.cat([normalise(_crop(view, config.size), config) for view in views]), grid, image.size)


def normalise(image: Image.Image | Raster, config: ImageConfig) -> Tensor:
    """Returns (uint8 / 255 - mean) / std, float32 [1, 3, S, S], with the same rounding as CLIP's image processor."""
    scaled = (np.asarray(image, dtype=np.uint8) * (1 / 255)).astype(np.float32)
    pixels = (scaled - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).unsqueeze(0)


def _crop(image: Image.Image | Raster, size: int) -> Image.Image | Raster:
    """Resizes the shorter edge to `size`, then crops the centre."""
    axis = 1 if image.width <= image.height else 0  # axis of the longer edge; 0: width, 1: height
    short, long = image.size[1 - axis], image.size[axis]
    long_after = int(size * long / short)
    start, stop = (long_after - size) // 2, (long_after - size) // 2 + size
    margin = 0
    if long_after > 64 * size:
        # A 1 x 4000 image would become 336 x 1,344,000: compute only the crop and the margin that the filter reads.
        margin = math.ceil(3 * long_after / long)
    low, high = (max(start - margin, 0), min(stop + margin, long_after)) if margin else (0, long_after)
    a, b, length = low * long / long_after, high * long / long_after, high - low
    if axis:
        return resized(image, (size, length), (0, a, image.width, b)).crop((0, start - low, size, stop - low))
    return resized(image, (length, size), (a, 0, b, image.height)).crop((start - low, 0, stop - low, size))


def _pad_to_square(image: Image.Image | Raster, config: ImageConfig) -> Image.Image | Raster:
    side = max(image.size)
    if image.width == image.height:
        return image
    r, g, b = (int(255 * channel) for channel in config.mean)
    return _on_canvas(image, (side, side), (r, g, b))


def _on_canvas(image: Image.Image | Raster, size: Size, colour: tuple[int, int, int]) -> Image.Image | Raster:
    """Returns a canvas of this size and colour with the image in its centre."""
    corner = ((size[0] - image.width) // 2, (size[1] - image.height) // 2)
    if isinstance(image, Raster):
        return image.on_canvas(size, corner, colour)
    canvas = Image.new("RGB", size, colour)
    canvas.paste(image, corner)
    return canvas


def choose_canvas(size: Size, config: ImageConfig) -> Size:
    """Returns the canvas (w, h) that preserves the most image pixels.

    Ties are broken by the smallest unused area, then by the order in `config.pinpoints`.
    """

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - canvas[0] * canvas[1]

    return max(config.pinpoints, key=merit)


def fitted(size: Size, canvas: Size) -> Size:
    """Returns the largest size within the canvas that keeps the image's aspect ratio."""
    scale_w, scale_h = canvas[0] / size[0], canvas[1] / size[1]
    if scale_w < scale_h:
        return canvas[0], min(math.ceil(size[1] * scale_w), canvas[1])
    return min(math.ceil(size[0] * scale_h), canvas[0]), canvas[1]


def _tiles(image: Image.Image | Raster, canvas: Size, config: ImageConfig) -> list[Image.Image | Raster]:
    padded = _on_canvas(resized(image, fitted(image.size, canvas)), canvas, (0, 0, 0))
    s = config.size
    corners = [(x, y) for y in range(0, canvas[1], s) for x in range(0, canvas[0], s)]
    return [padded.crop((x, y, x + s, y + s)) for x, y in corners]


def tile_grid(size: Size, canvas: Size, config: ImageConfig, patches: int) -> TileGrid | None:
    """Returns the arrangement of the tiles and the range of patches to keep, or None if `config.merge` is "flat".

    patches: number of patches along one side of a tile. As in the original code, padding is removed in whole patches,
    so some padding may remain, and a very thin image may be removed entirely.
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
