"""Writes weight files one tensor at a time, so that converting a model of any size takes little memory."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llava.tensors.files import DTYPE_NAMES, check_finite
from llava.tensors.keymap import Rule, disk_names
from llava.tensors.lazy import LazyTensor

MAX_SHARD_BYTES = 5_000_000_000
Progress = Callable[[int, int], None]  # receives the bytes processed so far and the total bytes


def no_progress(done: int, total: int) -> None:
    """No-op progress callback."""


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """A tensor to write: its header fields and a function that yields its rows in chunks."""

    name: str  # name on disk
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]  # yields the rows, which are read or computed on demand
    where: str  # source file and tensors, for error messages
    force: bool = False  # write the tensor even if it contains NaN or Inf
    ours: str = ""  # our name for this tensor, or for the concatenated tensor that contains it

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


# Writes one file; the callback receives the number of bytes of each chunk written.
FileWriter = Callable[[Path, Sequence[OutputTensor], Callable[[int], None]], None]
SplitRows = Callable[[str, int, int], Sequence[int]]  # our name, row count, part count -> row count of each part


def named_on_disk(
    tensors: Mapping[str, LazyTensor], rules: Iterable[Rule], split_rows: SplitRows
) -> list[OutputTensor]:
    """Returns the tensors to write, with their on-disk names. Splits concatenated tensors (such as qkv) into parts."""
    table = tuple(rules)
    outputs: list[OutputTensor] = []
    for ours, tensor in tensors.items():
        names = disk_names(ours, table)
        if len(names) == 1:
            outputs.append(output(names[0], tensor, ours))
            continue
        ends = accumulate(split_rows(ours, tensor.shape[0], len(names)), initial=0)
        for name, (start, stop) in zip(names, pairwise(ends), strict=True):
            chunks = partial(tensor.chunks, start, stop)
            shape = (stop - start, *tensor.shape[1:])
            outputs.append(
                OutputTensor(name=name, dtype=tensor.dtype, shape=shape, chunks=chunks, where=tensor.where, ours=ours)
            )
    return outputs


def output(name: str, tensor: LazyTensor, ours: str = "") -> OutputTensor:
    """Returns an OutputTensor that writes a whole tensor under `name`."""
    return OutputTensor(
        name=name, dtype=tensor.dtype, shape=tensor.shape, chunks=tensor.chunks, where=tensor.where, ours=ours
    )


def write_bytes(out: BinaryIO | Any, tensor: OutputTensor, on_bytes: Callable[[int], None]) -> None:
    """Writes the values, row-major and little-endian. Raises CheckpointError on NaN or Inf unless `force` is set."""
    written = 0
    for chunk in tensor.chunks():
        check_finite(chunk, tensor.where, tensor.force)
        data = chunk.to(tensor.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        out.write(data.data)
        written += data.nbytes
        on_bytes(data.nbytes)
    assert written == tensor.n_bytes, f"{tensor.name}: {written} bytes for a tensor of {tensor.n_bytes}"


def write_safetensors(file: Path, tensors: Sequence[OutputTensor], on_bytes: Callable[[int], None]) -> None:
    """Writes one file in the safetensors format."""
    with file.open("wb") as out:
        stream_safetensors(out, tensors, on_bytes)


def stream_safetensors(out: BinaryIO | Any, tensors: Sequence[OutputTensor], on_bytes: Callable[[int], None]) -> None:
    """Writes the header length, the header and the values to an open file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.n_bytes],
        }
        offset += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # pads the header, so that the values are aligned to 8 bytes
    out.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        write_bytes(out, tensor, on_bytes)


def byte_counter(tensors: Sequence[OutputTensor], progress: Progress) -> Callable[[int], None]:
    """Returns a callback that counts the bytes written and reports the count and the total to `progress`."""
    total, done = sum(tensor.n_bytes for tensor in tensors), 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    return count


def write_shards(
    folder: Path,
    tensors: Sequence[OutputTensor],
    progress: Progress = no_progress,
    *,
    max_bytes: int = MAX_SHARD_BYTES,
    writer: FileWriter = write_safetensors,
) -> list[Path]:
    """Writes weight files and their index. Returns the paths, with the index last.

    max_bytes: size limit of each file; a larger tensor gets its own file.
    writer: `write_safetensors`, or `torch_zip.write_torch` for pytorch_model*.bin.
    """
    stem, suffix = ("model", "safetensors") if writer is write_safetensors else ("pytorch_model", "bin")
    shards = plan_shards(tensors, max_bytes, stem, suffix)
    count = byte_counter(tensors, progress)
    for name, shard in shards.items():
        writer(folder / name, shard, count)
    return [*(folder / name for name in shards), write_index(folder / f"{stem}.{suffix}.index.json", shards)]


def plan_shards(
    tensors: Sequence[OutputTensor], max_bytes: int, stem: str = "model", suffix: str = "safetensors"
) -> dict[str, list[OutputTensor]]:
    """Returns file name -> tensors, with at most `max_bytes` per file. A larger tensor gets its own file."""
    shards: list[list[OutputTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.n_bytes for other in shards[-1]) + tensor.n_bytes > max_bytes:
            shards.append([])
        shards[-1].append(tensor)
    n = len(shards)
    names = [f"{stem}.{suffix}"] if n == 1 else [f"{stem}-{i + 1:05}-of-{n:05}.{suffix}" for i in range(n)]
    return dict(zip(names, shards, strict=True))


def write_index(file: Path, shards: Mapping[str, Sequence[OutputTensor]]) -> Path:
    """Writes the index that maps each tensor to its file. Returns its path."""
    weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
    total = sum(tensor.n_bytes for shard in shards.values() for tensor in shard)
    write_json(file, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return file


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes indented JSON with a trailing newline."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
