"""Decodes and resizes pictures of clients in a small pool of processes, which are killed if they take too long.

A process gets the bytes of a file, and returns numbers in a fixed form. Nothing that a client sends is unpickled here.
"""

import asyncio
import io
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava.config import ImageConfig, PictureOptions, TileGrid
from llava.errors import ImageError
from llava.preprocess.image import Preprocessed, Views
from llava.serve.errors import ApiError
from llava.serve.limits import Limits

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

_MEMORY_BYTES = 4 * 2**30  # of one process, above what it uses at the start
_START_S = 120.0  # until a process is ready, on a slow disk
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # Pillow's EPS plugin, for one, runs a program
_MAX_VIEWS = 16  # more than a picture is cut into
_ATTEMPTS = 2  # a process may be killed from outside; a picture that kills two of them is to blame
Connection = multiprocessing.connection.Connection


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """What a process needs to know about the model."""

    config: ImageConfig
    patches: int  # along one side of a view
    options: PictureOptions


class PicturePool:
    """Processes that read pictures."""

    def __init__(self, settings: PictureSettings, limits: Limits, *, n_processes: int | None = None):
        """n_processes: default: one per core, at most 4."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._settings, self._limits = settings, limits
        self._context = multiprocessing.get_context("spawn")
        self._n = n_processes or min(4, cores)
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()  # the rest can sleep
        self._workers: list[_Worker] = []
        self._threads = ThreadPoolExecutor(self._n, "pictures")  # others never wait for pictures

    async def start(self) -> None:
        """Starts the processes, and waits until they are ready."""
        self._workers = [_Worker(self._context, self._settings, self._limits) for _ in range(self._n)]
        await asyncio.gather(*(asyncio.to_thread(one.start) for one in self._workers))
        for one in self._workers:
            self._idle.put_nowait(one)

    def stop(self) -> None:
        """Kills the processes, from any thread or signal handler. No picture is read any more."""
        for one in self._workers:
            one.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def pids(self) -> list[int]:
        """Process ids, for tests."""
        return [one.pid for one in self._workers]

    async def read(self, contents: bytes) -> Preprocessed:
        """Returns the views of a picture. Raises ApiError or ImageError."""
        worker = await self._idle.get()
        reading = asyncio.get_running_loop().run_in_executor(self._threads, worker.read, contents)

        def end(done: asyncio.Future[Preprocessed]) -> None:  # later, if this call is cancelled
            self._idle.put_nowait(worker)
            _ = done.cancelled() or done.exception()  # nobody may be left to take it

        reading.add_done_callback(end)
        return await asyncio.shield(reading)


class _Worker:
    """One process, which is started again after it has died or has been killed, until it is stopped."""

    def __init__(self, context: Any, settings: PictureSettings, limits: Limits):
        self._context, self._settings, self._limits = context, settings, limits
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._lock = threading.RLock()  # guards the start of a process and `_stopped`; a signal may interrupt `stop`
        self._stopped = False

    @property
    def pid(self) -> int:
        """Its id, or 0 while there is none."""
        return (self._process and self._process.pid) or 0

    def start(self) -> None:
        """Starts the process, and waits until it is ready. Raises EOFError, OSError or ImageError."""
        self.kill()
        connection = self._connection = self._spawn()
        if not connection.poll(_START_S) or connection.recv_bytes() != b"ready":
            raise ImageError("a process that reads pictures cannot be started")

    def _spawn(self) -> Connection:
        with self._lock:
            if self._stopped:
                raise ImageError("the processes that read pictures have been stopped")
            connection, child = self._context.Pipe()
            arguments = (child, self._settings, self._limits)
            process = self._context.Process(target=_run, args=arguments, name="pictures", daemon=True)
            process.start()
            self._process = process
        child.close()
        return connection

    def stop(self) -> None:
        """Kills the process for good. A thread that waits for it sees that its connection has ended."""
        with self._lock:
            self._stopped = True
            if process := self._process:
                process.kill()
                process.join()

    def kill(self) -> None:
        """Kills the process."""
        if self._process:
            self._process.kill()
            self._process.join()
        if self._connection:
            self._connection.close()
        self._process = self._connection = None

    def read(self, contents: bytes) -> Preprocessed:
        """Returns the views of a picture. Raises ApiError or ImageError."""
        for _ in range(_ATTEMPTS):
            self._revive()
            try:
                return self._exchange(contents)
            except (EOFError, OSError):  # the process died: it was killed, or wanted too much memory
                self.kill()
        raise ApiError(400, "a picture could not be read: its decoder failed", param="messages")

    def _revive(self) -> None:
        """Starts the process again if it has died. Raises ApiError."""
        if self._process is not None and self._process.is_alive():
            return
        try:
            self.start()
        except (EOFError, OSError, ImageError):
            self.kill()
            message = "the processes that read pictures cannot be started; try again later"
            raise ApiError(503, message, code="pictures_unavailable") from None

    def _exchange(self, contents: bytes) -> Preprocessed:
        """Sends a file to the process and receives its views. Raises EOFError or OSError if the process dies."""
        assert self._connection
        self._connection.send_bytes(contents)
        if not self._connection.poll(self._limits.picture_s):
            self.kill()
            message = f"a picture took more than {self._limits.picture_s:g} s to read; send a smaller one"
            raise ApiError(400, message, param="messages")
        header = json.loads(self._connection.recv_bytes())
        if "error" in header:
            raise ImageError(header["error"])
        pixels = np.frombuffer(self._connection.recv_bytes(), dtype=np.float32).reshape(header["shape"])
        grid = TileGrid(**header["grid"]) if header["grid"] else None
        views = Views(torch.from_numpy(pixels.copy()), grid, tuple(header["size"]))
        return Preprocessed(views, tuple(header["losses"]))


def _run(connection: Connection, settings: PictureSettings, limits: Limits) -> None:
    """The process: reads files until its connection is closed."""
    from PIL import Image

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the server ends this one
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)  # libtiff, for one, writes lines about damaged files there
    torch.set_num_threads(1)
    # Pillow refuses twice as many, in what a file embeds, too, and in what it crops: views must pass in any case
    Image.MAX_IMAGE_PIXELS = max(limits.pixels, _MAX_VIEWS * settings.config.size**2)
    warnings.simplefilter("ignore")
    _limit_memory()
    with suppress(EOFError, OSError):  # the server has ended
        connection.send_bytes(b"ready")
        while True:
            _answer(connection, connection.recv_bytes(), settings, limits)


def _answer(connection: Connection, contents: bytes, settings: PictureSettings, limits: Limits) -> None:
    """Reads one file, and sends its views or what is wrong with it."""
    from llava.preprocess import image

    try:
        picture = _open(contents, settings.config, limits)
        read = image.preprocess(picture, settings.config, settings.patches, settings.options)
    except ImageError as error:
        message = re.sub(r" \(.*\)$", "", str(error))  # without the words of a library
        connection.send_bytes(json.dumps({"error": message}).encode())
        return
    except MemoryError:
        os._exit(1)
    except Exception:  # Pillow's decoders raise all kinds of errors for damaged files
        connection.send_bytes(json.dumps({"error": "picture: is damaged, or cannot be read as an image"}).encode())
        return
    pixels, grid, size = read.views
    header = {"shape": list(pixels.shape), "size": list(size), "losses": read.losses}
    connection.send_bytes(json.dumps(header | {"grid": asdict(grid) if grid else None}).encode())
    connection.send_bytes(pixels.contiguous().numpy().data)


def _open(contents: bytes, config: ImageConfig, limits: Limits) -> "Image.Image":
    """Returns a picture that is not decoded yet. Raises ImageError for other formats, and for too many pixels."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    try:
        picture = Image.open(io.BytesIO(contents), formats=[one for one in _FORMATS if one in Image.OPEN])
    except UnidentifiedImageError:
        raise ImageError("picture: is damaged, or in a format that is not accepted; send PNG, JPEG or WEBP") from None
    except Image.DecompressionBombError:
        raise ImageError("picture: has far too many pixels") from None
    width, height = picture.size
    if width * height > limits.pixels:
        raise ImageError(f"picture: has {width} x {height} pixels; expected at most {limits.pixels}; scale it down")
    if config.aspect == "pad" and max(width, height) ** 2 > limits.padded_pixels:
        side = math.isqrt(limits.padded_pixels)
        raise ImageError(
            f"picture: has {width} x {height} pixels, and the model sees it as a square; expected sides of at most "
            f"{side} pixels; scale it down"
        )
    return picture


def _limit_memory() -> None:
    """Limits the memory of this process, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    with suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES, used + _MEMORY_BYTES))
