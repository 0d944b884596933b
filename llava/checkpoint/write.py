"""Writes weights tensor by tensor, sizes first and then bytes, so that a model of any size needs no memory to convert.

Everything is written under a temporary name and renamed when it is whole.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llava.checkpoint.files import DTYPE_NAMES, check_finite
from llava.errors import CheckpointError

MAX_SHARD_BYTES = 5_000_000_000
Progress = Callable[[int, int], None]  # bytes written, bytes in all


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A tensor to write: its header, and its rows in as many parts as are handy."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]  # mapped or made when they are written
    where: str  # file and tensors that it comes from, for messages
    force: bool = False  # write NaN and Inf too
    ours: str = ""  # our name of the tensor that it is, or is a part of

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Writer = Callable[[Path, Sequence[Item], Callable[[int], None]], None]  # of one file; the callback is told of bytes


def write_bytes(out: BinaryIO | Any, item: Item, on_bytes: Callable[[int], None]) -> None:
    """The item's values, row-major and little-endian, in one piece. Raises CheckpointError on NaN and Inf."""
    written = 0
    for part in item.parts():
        check_finite(part, item.where, item.force)
        data = part.to(item.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        out.write(data.data)
        written += data.nbytes
        on_bytes(data.nbytes)
    assert written == item.n_bytes, f"{item.name}: {written} bytes for a tensor of {item.n_bytes}"


def write_safetensors(file: Path, items: Sequence[Item], on_bytes: Callable[[int], None]) -> None:
    """One file in the safetensors format."""
    with file.open("wb") as out:
        stream_safetensors(out, items, on_bytes)


def stream_safetensors(out: BinaryIO | Any, items: Sequence[Item], on_bytes: Callable[[int], None]) -> None:
    """Length of the header, header, values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for item in items:
        header[item.name] = {
            "dtype": DTYPE_NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [place, place + item.n_bytes],
        }
        place += item.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of 8 bytes
    out.write(len(text).to_bytes(8, "little") + text)
    for item in items:
        write_bytes(out, item, on_bytes)


def counting(items: Sequence[Item], progress: Progress) -> Callable[[int], None]:
    """Adds up bytes written and passes the sum on, with that of all items."""
    total, done = sum(item.n_bytes for item in items), 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    return count


def write_shards(
    folder: Path,
    items: Sequence[Item],
    progress: Progress = silent,
    *,
    max_bytes: int | None = None,
    writer: Writer = write_safetensors,
) -> list[Path]:
    """One file, or shards of at most `max_bytes` (default: 5 GB), and their index. Returns the files, weights first.

    `writer`: of one file; safetensors, or torch's format for `pytorch_model*.bin`.
    """
    stem, suffix = ("model", "safetensors") if writer is write_safetensors else ("pytorch_model", "bin")
    shards = in_shards(items, max_bytes or MAX_SHARD_BYTES, stem, suffix)
    count = counting(items, progress)
    for name, shard in shards.items():
        writer(folder / name, shard, count)
    return [*(folder / name for name in shards), write_index(folder / f"{stem}.{suffix}.index.json", shards)]


def in_shards(
    items: Sequence[Item], max_bytes: int, stem: str = "model", suffix: str = "safetensors"
) -> dict[str, list[Item]]:
    """File names and what goes into each."""
    shards: list[list[Item]] = [[]]
    for item in items:
        if shards[-1] and sum(other.n_bytes for other in shards[-1]) + item.n_bytes > max_bytes:
            shards.append([])
        shards[-1].append(item)
    n = len(shards)
    names = [f"{stem}.{suffix}"] if n == 1 else [f"{stem}-{i + 1:05}-of-{n:05}.{suffix}" for i in range(n)]
    return dict(zip(names, shards, strict=True))


def write_index(file: Path, shards: Mapping[str, Sequence[Item]]) -> Path:
    """Which tensor lies in which file."""
    weight_map = {item.name: name for name, shard in shards.items() for item in shard}
    total = sum(item.n_bytes for shard in shards.values() for item in shard)
    write_json(file, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return file


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Indented JSON with a newline at its end."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def free_folder(target: Path) -> Path:
    """The absolute path of a folder that is absent or empty; where a link leads to. Raises CheckpointError."""
    target = target.expanduser().absolute()
    target = target.resolve() if target.is_symlink() else target
    if target.is_file():
        raise CheckpointError(f"{target}: is a file; name a folder to write")
    if target.is_mount():  # which can not give way to the finished folder
        raise CheckpointError(f"{target}: is where a disk is mounted; name a folder on it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: is there already and not empty; name another folder or remove it")
    return target


@contextmanager
def new_folder(target: Path, n_bytes: int) -> Iterator[Path]:
    """A folder to write into, which becomes `target` if all goes well and vanishes if not.

    `target` must be absent or empty. Raises CheckpointError, also where `n_bytes` do not fit or writing fails.
    """
    target = free_folder(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    made = [folder for folder in partial.parents if not folder.exists()]  # the innermost first
    try:
        partial.mkdir(parents=True)
        check_space(partial, n_bytes, target)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise _not_written(target, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made if not target.exists() else ():
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def new_file(target: Path, n_bytes: int) -> Iterator[Path]:
    """A file's temporary name, which becomes `target` (replacing it) if all goes well. Raises CheckpointError."""
    target = target.expanduser().absolute()
    if target.is_dir():
        raise CheckpointError(f"{target}: is a folder; name a file to write")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        check_space(target.parent, n_bytes, target)
        yield partial
        partial.replace(target)
    except OSError as error:
        raise _not_written(target, error) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def check_space(folder: Path, n_bytes: int, target: Path) -> None:
    """Raises CheckpointError where the disk of `folder` has less than `n_bytes` left for `target`."""
    if (free := shutil.disk_usage(folder).free) < n_bytes:
        raise CheckpointError(
            f"{target}: needs {n_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; make room"
        )


def _not_written(target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{target}: can not be written ({error.strerror or error}); nothing was left behind")
