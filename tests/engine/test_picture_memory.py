"""Requests with large pictures have the same pixels and replies wherever their pictures are resized."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import llava
from llava.assistant import Assistant
from llava.engine.picture_memory import GpuPictureMemory
from llava.preprocess.raster import Raster, Size

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")]


class CpuPictureMemory(GpuPictureMemory):
    """The same without a GPU: ordinary memory, and no stream."""

    n_uploads = 0

    def stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def empty(self, size: Size) -> NDArray[np.uint8]:
        return np.empty((size[1], size[0], 3), np.uint8)

    def upload(self, pixels: NDArray[np.uint8]) -> Raster:
        self.n_uploads += 1
        return super().upload(pixels)


class FullMemory(CpuPictureMemory):
    """A GPU without free memory."""

    def upload(self, pixels: NDArray[np.uint8]) -> Raster:
        super().upload(pixels)
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def vlm(checkpoint: Path, request: pytest.FixtureRequest) -> Assistant:
    return llava.load(checkpoint, device=request.param, dtype="float32")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two photos above the limit of a megapixel, one of them tall, and a small one."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(8)
    for i, (width, height) in enumerate([(1400, 900), (500, 2200), (90, 60)]):
        small = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8))
        small.resize((width, height)).save(folder / f"{i}.jpg", quality=90)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("kind", [CpuPictureMemory, FullMemory])
def test_pixels_and_replies_equal_those_of_pillow(
    kind: type[CpuPictureMemory], vlm: Assistant, photos: list[Path]
) -> None:
    requests: list[Any] = [("<image> What is it?", [photo]) for photo in photos]
    gpu, vlm.engine.inputs.memory = vlm.engine.inputs.memory, None
    pixels = [vlm.prepare(text, images=images).pixels for text, images in requests]
    ids = [reply.token_ids for reply in vlm.generate_batch(requests, max_new_tokens=6)]
    memory = vlm.engine.inputs.memory = gpu or kind(vlm.device)
    for (text, images), expected in zip(requests, pixels, strict=True):
        found = vlm.prepare(text, images=images).pixels
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
    assert [reply.token_ids for reply in vlm.generate_batch(requests, max_new_tokens=6)] == ids
    if isinstance(memory, CpuPictureMemory):
        assert memory.n_uploads == 4  # of the two large photos, in `prepare` and in `generate_batch`
