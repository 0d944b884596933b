"""The memory of a GPU, in which large pictures are resized while the CPU prepares the rest of a request."""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llava.preprocess.raster import Raster, Size

_MIN_PIXELS = 2**20  # smaller pictures are resized faster by Pillow than they are copied


class GpuPictureMemory:
    """Uploads pictures to a GPU. All work between `accepts` and the last result belongs into `stream`."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream: Any = None

    def stream(self) -> AbstractContextManager[Any]:
        """Returns a context in which the GPU does not wait for the engine's steps, nor they for it."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self._stream)

    def accepts(self, size: Size) -> bool:
        """Returns whether a picture (width, height) is large enough."""
        return size[0] * size[1] >= _MIN_PIXELS

    def empty(self, size: Size) -> NDArray[np.uint8]:
        """Returns page-locked memory [height, width, 3], from which copies are fast."""
        pixels: NDArray[np.uint8] = torch.empty(size[1], size[0], 3, dtype=torch.uint8, pin_memory=True).numpy()
        return pixels

    def upload(self, pixels: NDArray[np.uint8]) -> Raster:
        """Returns the picture on the GPU. Does not wait for the copy."""
        return Raster(torch.from_numpy(pixels).to(self.device, non_blocking=True))
