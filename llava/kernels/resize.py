"""Pillow's bicubic resize of 8-bit pictures as two matrix products, with the same bits, on any device.

Pillow (src/libImaging/Resample.c) resizes one axis, rounds to 8 bits, and then resizes the other. Its weights are
integers, scaled by 2^22, so that every sum is an integer below 2^53: float64 holds it exactly, in any order of
additions. All operations are PyTorch's own: its matrix product is what a GPU does best.

H height   W width   C channels   N length of an axis   M resized length   T taps of the filter
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SCALE_BITS = 22  # of Pillow's integer weights
_SUPPORT = 2.0  # of the bicubic filter, in source pixels, for a resize that does not shrink
_TILE = 64  # outputs of a matrix product; a tile reads only the source pixels under its filters
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Weights(NamedTuple):
    """How one axis is resized: output i is the sum of `taps[i]` times the source pixels from `starts[i]` on."""

    starts: NDArray[np.int64]  # [M]
    taps: NDArray[np.int64]  # [M, T], scaled by 2^22; zero after the last source pixel of an output

    def source(self, outputs: slice) -> tuple[int, int]:
        """Returns the range of source pixels that some outputs read."""
        ends = self.starts[outputs] + (self.taps[outputs] != 0).cumsum(1).argmax(1) + 1
        return int(self.starts[outputs].min()), int(ends.max())


@lru_cache(maxsize=64)  # pictures of the same size arrive together
def weights(n: int, start: float, end: float, m: int) -> Weights:
    """Returns the weights that resize the range from `start` to `end`, of an axis of n pixels, to m pixels."""
    low, high = np.float32(start), np.float32(end)  # Pillow stores a box in single precision
    scale = float(high - low) / m
    shrink = max(scale, 1.0)
    support = _SUPPORT * shrink
    centres = float(low) + (np.arange(m) + 0.5) * scale
    starts = np.maximum((centres - support + 0.5).astype(np.int64), 0)  # truncated towards zero, as in C
    ends = np.minimum((centres + support + 0.5).astype(np.int64), n)
    i = np.arange(math.ceil(support) * 2 + 1)
    taps = _bicubic(((i + starts[:, None]) - centres[:, None] + 0.5) * (1.0 / shrink))
    taps[i >= (ends - starts)[:, None]] = 0
    total = taps.cumsum(1)[:, -1:]  # from left to right, as Pillow adds; `sum` uses another order
    taps = taps / np.where(total == 0, 1, total) * (1 << _SCALE_BITS)
    return Weights(starts, (taps + np.where(taps < 0, -0.5, 0.5)).astype(np.int64))


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The filter, with Pillow's order of operations."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize(picture: Tensor, size: tuple[int, int], box: Box | None = None, *, height_first: bool = False) -> Tensor:
    """uint8 [H, W, C] -> uint8 [height, width, C], equal to Pillow's bicubic resize.

    size: (width, height). box: the part of the picture to resize, in source pixels; default: all. height_first: which
        axis is resized first; values are rounded in between.
    """
    height, width = picture.shape[:2]
    left, top, right, bottom = box or (0, 0, width, height)
    rows, columns = weights(height, top, bottom, size[1]), weights(width, left, right, size[0])
    if height_first:
        a, b = columns.source(slice(None))
        high = _resize_last(picture[:, a:b].permute(1, 2, 0), rows, 0)  # [b - a, C, height]
        return _resize_last(high.permute(2, 1, 0), columns, a).transpose(1, 2)
    a, b = rows.source(slice(None))
    wide = _resize_last(picture[a:b].transpose(1, 2), columns, 0)  # [b - a, C, width]
    return _resize_last(wide.permute(2, 1, 0), rows, a).permute(2, 0, 1)


def _resize_last(x: Tensor, weights: Weights, first: int) -> Tensor:
    """x uint8 [..., N], of which pixel 0 has the number `first` -> uint8 [..., M]"""
    starts, taps = torch.from_numpy(weights.starts).to(x.device), torch.from_numpy(weights.taps).to(x.device)
    positions = starts[:, None] + torch.arange(taps.shape[1], device=x.device)
    y = x.new_empty(*x.shape[:-1], len(starts))
    for i in range(0, len(starts), _TILE):
        outputs = slice(i, i + _TILE)
        a, b = weights.source(outputs)
        matrix = torch.zeros(len(starts[outputs]), b - a, dtype=torch.float64, device=x.device)
        matrix.scatter_add_(1, (positions[outputs] - a).clamp_(max=b - a - 1), taps[outputs].double())
        pixels = x[..., a - first : b - first].to(torch.float64, memory_format=torch.contiguous_format)
        sums = (pixels @ matrix.T).add_(1 << (_SCALE_BITS - 1))
        y[..., outputs] = sums.mul_(2.0**-_SCALE_BITS).floor_().clamp_(0, 255)
    return y
