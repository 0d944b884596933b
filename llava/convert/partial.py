"""A folder of shards that grows file by file under a temporary name, and is gone on with after a kill."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from llava.checkpoint.files import Weights, read_json
from llava.checkpoint.write import Item, Progress, check_space, free_folder, in_shards, stream_safetensors, write_json
from llava.errors import CheckpointError, LlavaError

log = logging.getLogger(__name__)

_STATE = "merge.json"  # what is made, and the shards that are whole, with their checksums
SUMS = "SHA256SUMS"  # as sha256sum --check reads it


@dataclass(frozen=True, kw_only=True)
class Partial:
    """The folder in the making."""

    folder: Path
    order: Mapping[str, Any]  # what is made of what: another order does not go on here
    sha256: dict[str, str] = field(default_factory=dict)  # of the shards that are whole

    def write_shards(self, items: Sequence[Item], progress: Progress, max_bytes: int) -> dict[str, list[Item]]:
        """Shards of at most `max_bytes`, those that are whole already passed over. Returns names and contents."""
        shards = in_shards(items, max_bytes)
        total, done = sum(item.n_bytes for item in items), 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            progress(done, total)

        for name, shard in shards.items():
            if name in self.sha256 and (self.folder / name).is_file():
                count(sum(item.n_bytes for item in shard))
                continue
            self.sha256[name] = _write(self.folder / name, shard, count)
            self._note()
        return shards

    def verify(self, shards: Mapping[str, Sequence[Item]], progress: Progress) -> None:
        """Makes every tensor anew and compares it with what the files hold, and their checksums.

        Raises CheckpointError.
        """
        total, done = sum(item.n_bytes for shard in shards.values() for item in shard), 0
        for name, shard in shards.items():
            file = self.folder / name
            if _sha256(file) != self.sha256[name]:
                raise CheckpointError(f"{file}: is not what was written; the disk or another process changed it")
            weights = Weights([file])
            for item in shard:
                rows = weights[item.name].split([len(part) for part in item.parts()])
                for made, held in zip(item.parts(), rows, strict=True):
                    made = made.to(item.dtype).contiguous()  # a .bin may hold a tensor's columns as its rows
                    if not torch.equal(made.view(torch.uint8), held.view(torch.uint8)):
                        raise CheckpointError(f"{file}: {item.name} is not what base and difference give; merge again")
                done += item.n_bytes
                progress(done, total)

    def _note(self) -> None:
        temporary = self.folder / f"{_STATE}.tmp"
        write_json(temporary, {"order": dict(self.order), "sha256": self.sha256})
        temporary.replace(self.folder / _STATE)


@contextmanager
def growing(target: Path, order: Mapping[str, Any], n_bytes: int) -> Iterator[Partial]:
    """`target` (absent or empty) in the making, as `target.partial`, which is renamed if all goes well.

    What a killed run of the same `order` left there is taken over. Bad input removes it; a full disk and Ctrl-C do not.
    Raises CheckpointError.
    """
    target = free_folder(target)
    folder = target.with_name(f"{target.name}.partial")
    try:
        if target.exists():  # a link or a mount point, which can not give way, is told of now and not after the work
            target.rmdir()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{target}: can not be written ({error.strerror}); name another folder") from None
    with _alone(folder):
        partial = Partial(folder=folder, order=order, sha256=_whole_shards(folder, order))
        held = sum((folder / name).stat().st_size for name in partial.sha256)
        try:
            check_space(folder, n_bytes - held, target)
        except CheckpointError:
            if not partial.sha256:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            partial._note()
            yield partial
            sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(partial.sha256.items()))
            (folder / SUMS).write_text(sums, encoding="utf-8")
            if target.exists():
                target.rmdir()
            folder.rename(target)
            (target / _STATE).unlink()  # last: until then the same command goes on
        except LlavaError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except OSError as error:
            raise CheckpointError(
                f"{target}: can not be written ({error.strerror or error}); what is done stays in {folder}: mend that "
                "and give the same command again"
            ) from None
        except KeyboardInterrupt:
            log.warning("%s keeps the files that are whole; the same command goes on there", folder)
            raise


def _whole_shards(folder: Path, order: Mapping[str, Any]) -> dict[str, str]:
    """Shards of an earlier run that are as it left them, and their checksums.

    Raises CheckpointError where that run made something else.
    """
    if not any(folder.iterdir()):
        return {}
    state = read_json(folder / _STATE) if (folder / _STATE).is_file() else {}
    if state.get("order") != order:
        raise CheckpointError(
            f"{folder}: holds the beginnings of something else, or its inputs have changed since; remove it, or name "
            "another target"
        )
    held = ((folder / name, digest) for name, digest in state["sha256"].items() if (folder / name).is_file())
    return {file.name: digest for file, digest in held if _sha256(file) == digest}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process works in the folder meanwhile; a lock of a killed one is none. Raises CheckpointError."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder}: another process is at work there; wait for it, or stop it") from None
        except OSError as error:  # network file systems may have no locks for folders
            log.warning("%s: can not be locked (%s); start no second command on it", folder, error.strerror)
        yield
    finally:
        os.close(handle)


def _write(file: Path, items: Sequence[Item], on_bytes: Callable[[int], None]) -> str:
    """One shard, renamed when it is whole. Returns its checksum."""
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("wb") as raw, _Hashed(raw) as out:
        stream_safetensors(out, items, on_bytes)
    temporary.replace(file)
    return out.sha256.hexdigest()


class _Hashed:
    """Writes and hashes one piece, side by side, while the next is computed."""

    def __init__(self, raw: BinaryIO):
        self.sha256 = hashlib.sha256()
        self._raw = raw
        self._pool = ThreadPoolExecutor(2)
        self._last: list[Future[Any]] = []

    def __enter__(self) -> "_Hashed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait()

    def write(self, data: Any) -> None:
        """`data` must not change afterwards. Raises OSError, of the piece before."""
        self._wait()
        self._last = [self._pool.submit(self._raw.write, data), self._pool.submit(self.sha256.update, data)]

    def _wait(self) -> None:
        for last in self._last:
            last.result()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as raw:
        while piece := raw.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()
