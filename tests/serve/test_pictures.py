"""The processes that read the pictures of clients: which files they read, and what happens when they die or hang."""

import asyncio
import io
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import llava
from llava.errors import ImageError
from llava.preprocess import image
from llava.preprocess.image import Preprocessed
from llava.serve.errors import ApiError
from llava.serve.limits import Limits
from llava.serve.pictures import PicturePool, PictureSettings
from tests.hostile import CHAT, Victim, chat, data_url, picture, resized_png, served


@pytest.fixture(scope="module")
def settings() -> PictureSettings:
    """Those of llava-tiny, which sees squares."""
    preprocessor = llava.load(device="cpu").engine.inputs.variant(None).preprocessor
    config, vision = preprocessor.config.image, preprocessor.config.vision
    assert config
    assert vision
    return PictureSettings(config=config, patches=vision.grid, options=preprocessor.pictures)


Pooled = Callable[[Callable[[PicturePool], Coroutine[Any, Any, Any]]], Any]


@contextmanager
def pool_of_one(settings: PictureSettings, limits: Limits) -> Iterator[Pooled]:
    """`pooled(use)` is the result of `use(pool)`. The pool has one process, and an event loop of its own."""
    loop = asyncio.new_event_loop()
    pool = PicturePool(settings, limits, n_processes=1)
    loop.run_until_complete(pool.start())
    try:
        yield lambda use: loop.run_until_complete(asyncio.wait_for(use(pool), 100))
    finally:
        pool.stop()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@pytest.fixture(scope="module")
def pooled(settings: PictureSettings) -> Iterator[Pooled]:
    """A pool that most tests share, as a process takes seconds to start."""
    with pool_of_one(settings, Limits()) as pooled:
        yield pooled


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """llava-tiny, served to all tests of this file."""
    with served(tmp_path_factory.mktemp("pictures") / "log") as victim:
        yield victim


def message_of(reading: asyncio.Future[Preprocessed] | BaseException | Preprocessed) -> str:
    """The message of an error that a client gets."""
    assert isinstance(reading, ImageError | ApiError)
    return str(reading)


async def read_all(pool: PicturePool, files: list[bytes]) -> list[Any]:
    """Views or errors."""
    return list(await asyncio.gather(*map(pool.read, files), return_exceptions=True))


FILES = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "I;16"), ("JPEG", "L"), ("JPEG", "CMYK"), ("GIF", "P"),
         ("WEBP", "RGBA"), ("BMP", "RGB"), ("TIFF", "F"), ("PNG", "1")]  # fmt: skip


def test_pictures_are_read_as_in_python(pooled: Pooled, settings: PictureSettings) -> None:
    files = [picture(kind, (40, 25), mode) for kind, mode in FILES]
    files.append(picture("PNG", (1, 1)))
    for contents, found in zip(files, pooled(lambda pool: read_all(pool, files)), strict=True):
        expected = image.preprocess(contents, settings.config, settings.patches, settings.options)
        assert torch.equal(found.views.pixels, expected.views.pixels)
        assert found.views.size == expected.views.size
        assert found.losses == expected.losses


def test_only_the_first_frame_of_an_animation_is_read(pooled: Pooled, settings: PictureSettings) -> None:
    frames = [Image.new("RGB", (30, 30), (shade, 0, 0)) for shade in range(0, 200, 2)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    (found,) = pooled(lambda pool: read_all(pool, [file.getvalue()]))
    expected = image.preprocess(frames[0], settings.config, settings.patches, settings.options)
    assert torch.equal(found.views.pixels, expected.views.pixels)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PPM", "PCX", "TGA", "SGI", "DDS", "PDF", "JPEG2000"])
def test_formats_that_are_not_on_the_list_are_refused(pooled: Pooled, kind: str) -> None:
    (error,) = pooled(lambda pool: read_all(pool, [picture(kind)]))
    assert "a format that is not accepted; send PNG, JPEG or WEBP" in message_of(error)


def test_a_program_for_postscript_is_never_run(
    settings: PictureSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pool_of_one(settings, Limits()) as pooled:
        (error,) = pooled(lambda pool: read_all(pool, [picture("EPS")]))
    assert "format" in message_of(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("sides", "problem"),
    [
        ((1, 60_000), "has 1 x 60000 pixels, and the model sees it as a square; expected sides of at most 14142"),
        ((14_143, 9), "has 14143 x 9 pixels, and the model sees it as a square; expected sides of at most 14142"),
        ((7072, 7072), "has 7072 x 7072 pixels; expected at most 50000000"),
        ((30_000, 30_000), "far too many pixels"),
        ((2**31 - 1, 2**31 - 1), "far too many pixels"),
    ],
)
def test_sizes_are_checked_before_pixels_are_decoded(pooled: Pooled, sides: tuple[int, int], problem: str) -> None:
    async def use(pool: PicturePool) -> tuple[Any, list[int], list[int]]:
        before = pool.pids
        return (await read_all(pool, [resized_png(picture(), *sides)]))[0], before, pool.pids

    error, before, after = pooled(use)
    assert problem in message_of(error)
    assert before == after


def test_the_largest_pictures_are_read(pooled: Pooled) -> None:
    long = Image.new("L", (14_142, 8))
    large = Image.new("1", (7071, 7071))
    files = []
    for one in (long, large):
        file = io.BytesIO()
        one.save(file, "PNG")
        files.append(file.getvalue())
    assert [found.views.size for found in pooled(lambda pool: read_all(pool, files))] == [long.size, large.size]


def test_a_process_that_was_killed_between_pictures_is_replaced(pooled: Pooled) -> None:
    async def use(pool: PicturePool) -> tuple[Any, Any, list[int], list[int]]:
        first, before = await pool.read(picture()), pool.pids
        os.kill(before[0], signal.SIGKILL)
        return first, await pool.read(picture()), before, pool.pids

    first, second, before, after = pooled(use)
    assert torch.equal(first.views.pixels, second.views.pixels)
    assert before != after


@pytest.fixture(scope="module")
def slow() -> bytes:
    """A picture that takes seconds and 300 MiB to read."""
    file = io.BytesIO()
    Image.new("RGBA", (7000, 7000)).save(file, "PNG", compress_level=1)
    return file.getvalue()


async def kill_while_it_reads(pool: PicturePool, before: int) -> int:
    """Kills the process once it decodes the slow picture. before: the process that was killed last. Returns its id."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pid = pool.pids[0]
        if pid not in (0, before) and resident(pid) > 350 * 2**20:
            os.kill(pid, signal.SIGKILL)
            return pid
        await asyncio.sleep(0.01)
    raise AssertionError("the process does not read the picture")


def resident(pid: int) -> int:
    """The memory of a process, in bytes."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


@pytest.mark.parametrize("times", [1, 2])
def test_a_picture_whose_process_is_killed_is_tried_once_more(pooled: Pooled, slow: bytes, times: int) -> None:
    async def use(pool: PicturePool) -> tuple[Any, Any]:
        reading, pid = asyncio.ensure_future(pool.read(slow)), 0
        for _ in range(times):
            pid = await kill_while_it_reads(pool, pid)
        found = await asyncio.gather(reading, return_exceptions=True)
        return found[0], await pool.read(picture())

    found, other = pooled(use)
    assert other.views.size == (48, 32)
    if times == 1:
        assert found.views.size == (7000, 7000)
    else:
        assert (found.status, str(found)) == (400, "a picture could not be read: its decoder failed")


def test_a_picture_that_takes_too_long_is_given_up(settings: PictureSettings, slow: bytes) -> None:
    async def use(pool: PicturePool) -> tuple[Any, Any, list[int], list[int]]:
        before = pool.pids
        (found,) = await asyncio.gather(pool.read(slow), return_exceptions=True)
        return found, await pool.read(picture()), before, pool.pids

    with pool_of_one(settings, Limits(picture_s=1.0)) as pooled:
        error, other, before, after = pooled(use)
    assert message_of(error) == "a picture took more than 1 s to read; send a smaller one"
    assert other.views.size == (48, 32)
    assert before != after


def test_a_call_that_is_cancelled_gives_its_process_back(pooled: Pooled, slow: bytes) -> None:
    async def use(pool: PicturePool) -> Any:
        for _ in range(3):
            reading = asyncio.ensure_future(pool.read(slow))
            await asyncio.sleep(0.05)
            reading.cancel()
        return await pool.read(picture())

    assert pooled(use).views.size == (48, 32)


def test_no_picture_of_the_server_is_lost_when_its_processes_are_killed(server: Victim, slow: bytes) -> None:
    expected, before = server.honest(), server.children
    content = [{"type": "image_url", "image_url": {"url": data_url(slow)}}]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.post, CHAT, chat(content)) for _ in range(2)]
        time.sleep(0.5)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert server.get("/health").status == 200
        assert server.honest() == expected
        assert [one.result().status for one in answers] == [200, 200]
    assert not set(before) & set(server.children)
    server.assert_unharmed()


def test_a_pool_that_is_stopped_while_it_reads_starts_no_process(settings: PictureSettings, slow: bytes) -> None:
    async def use(pool: PicturePool) -> tuple[Any, list[int], list[int]]:
        reading = asyncio.ensure_future(pool.read(slow))
        await asyncio.sleep(0.2)
        before = pool.pids
        pool.stop()
        (found,) = await asyncio.gather(reading, return_exceptions=True)
        return found, before, [one.pid or 0 for one in multiprocessing.active_children()]

    others = {one.pid for one in multiprocessing.active_children()}
    with pool_of_one(settings, Limits()) as pooled:
        error, before, after = pooled(use)
    assert (error.status, error.code) == (503, "pictures_unavailable")
    assert before[0] not in after
    assert set(after) <= others
