"""Large pictures as tensors, on the device that resizes them. The device is chosen by whoever passes a `PictureMemory`.

H height   W width
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from llava.kernels import resize

Size = tuple[int, int]  # (width, height)
Box = tuple[float, float, float, float]  # left, top, right, bottom
_PILLOW_CHOOSES = int(PIL.__version__.partition(".")[0]) >= 13  # what to resize first: see `resizes_height_first`
_MAX_THREADS = 8
_STRIP_ROWS = 64  # copied at a time: small enough for a CPU's cache


class PictureMemory(Protocol):
    """Where large pictures are resized."""

    def accepts(self, size: Size) -> bool:
        """Returns whether a picture of this size is resized faster there than by Pillow."""
        ...

    def empty(self, size: Size) -> NDArray[np.uint8]:
        """Returns memory [H, W, 3] for a decoded picture, which can be passed to `upload`."""
        ...

    def upload(self, pixels: NDArray[np.uint8]) -> Raster:
        """Returns a picture [H, W, 3] in this memory."""
        ...


class Raster:
    """An 8-bit RGB picture [H, W, 3], with those methods of Pillow's images that `to_views` needs."""

    def __init__(self, pixels: Tensor):
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]
        self.size = self.width, self.height

    def resize(self, size: Size, resample: int = Image.Resampling.BICUBIC, box: Box | None = None) -> Raster:
        """Returns the picture, or the part in `box`, resized like Pillow's images, always with the bicubic filter."""
        assert resample == Image.Resampling.BICUBIC
        first = resizes_height_first(self.size, size)
        return Raster(resize.resize(self.pixels, size, box, height_first=first))

    def crop(self, box: tuple[int, int, int, int]) -> Raster:
        """Returns the part of the picture in `box`, which must not exceed it."""
        left, top, right, bottom = box
        return Raster(self.pixels[top:bottom, left:right])

    def on_canvas(self, size: Size, corner: tuple[int, int], colour: tuple[int, int, int]) -> Raster:
        """Returns a canvas of this size and colour with the picture on it. corner: (left, top) of the picture."""
        values = torch.tensor(colour, dtype=torch.uint8, device=self.pixels.device)
        canvas = values.expand(size[1], size[0], 3).contiguous()
        (left, top), (width, height) = corner, self.size
        canvas[top : top + height, left : left + width] = self.pixels
        return Raster(canvas)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.pixels.cpu().numpy(), dtype=dtype)


def resized(image: Image.Image | Raster, size: Size, box: Box | None = None) -> Image.Image | Raster:
    """Returns an RGB image, or the part in `box`, resized by the bicubic filter, to the pixels of Pillow 13.

    Earlier versions always resize the width first, which rounds other values.
    """
    if isinstance(image, Raster) or _PILLOW_CHOOSES or not resizes_height_first(image.size, size):
        return image.resize(size, Image.Resampling.BICUBIC, box)
    left, top, right, bottom = box or (0, 0, *image.size)
    narrow = image.resize((image.width, size[1]), Image.Resampling.BICUBIC, (0, top, image.width, bottom))
    return narrow.resize(size, Image.Resampling.BICUBIC, (left, 0, right, size[1]))


def resizes_height_first(size: Size, new_size: Size) -> bool:
    """Returns whether the height of a picture is resized before its width, as by Pillow 13.

    It is if the height loses more than twice as many pixels as the width, which takes less time.
    """
    lost_width, lost_height = size[0] - new_size[0], size[1] - new_size[1]
    return lost_height > max(0, 2 * lost_width)


def copy_pixels(image: Image.Image, target: NDArray[np.uint8]) -> None:
    """Copies the pixels of an RGB image to `target` [H, W, 3], in several threads.

    For 12 megapixels, `numpy.asarray(image)` needs 30 to 55 ms, and two threads 15 ms.
    """

    def copy(top: int) -> None:
        bottom = min(top + _STRIP_ROWS, image.height)
        target[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        list(threads.map(copy, range(0, image.height, _STRIP_ROWS)))
