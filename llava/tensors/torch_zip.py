"""Streams a dictionary of tensors, one tensor at a time, to a file in the zip format of `torch.save`."""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch

from llava.errors import CheckpointError
from llava.tensors.writer import OutputTensor, write_bytes


def write_torch(file: Path, tensors: Sequence[OutputTensor], on_bytes: Callable[[int], None]) -> None:
    """Writes a file that `torch.load` can open with `mmap=True` and `weights_only=True`.

    Raises CheckpointError for dtypes other than float32, float16 and bfloat16.
    """
    for tensor in tensors:
        if tensor.dtype not in _STORAGES:
            raise CheckpointError(f"{tensor.where}: has dtype {tensor.dtype}; expected float32, float16 or bfloat16")
    with file.open("wb") as raw, ZipFile(raw, "w", ZIP_STORED) as archive:
        with _record(archive, raw, "data.pkl") as out:
            table = OrderedDict((tensor.name, _Tensor(i, tensor)) for i, tensor in enumerate(tensors))
            _Pickler(out, protocol=2).dump(table)
        for name, text in (("byteorder", b"little"), ("version", b"3\n")):
            with _record(archive, raw, name) as out:
                out.write(text)
        for i, tensor in enumerate(tensors):
            with _record(archive, raw, f"data/{i}") as out:
                write_bytes(out, tensor, on_bytes)


class _Storage:
    """Placeholder in the pickle for a tensor's bytes, which follow in a separate record."""

    def __init__(self, key: int, tensor: OutputTensor):
        self.id = ("storage", _STORAGES[tensor.dtype], str(key), "cpu", torch.Size(tensor.shape).numel())


_STORAGES = {torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage}


class _Tensor:
    def __init__(self, key: int, tensor: OutputTensor):
        stride = torch.empty(tensor.shape, device="meta").stride()
        hooks: OrderedDict[str, Any] = OrderedDict()
        self.arguments = (_Storage(key, tensor), 0, tuple(tensor.shape), stride, False, hooks)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        return (torch._utils._rebuild_tensor_v2, obj.arguments) if isinstance(obj, _Tensor) else NotImplemented


_ALIGNMENT = 64  # bytes, as in torch.save; keeps memory-mapped tensors aligned
_LOCAL_HEADER, _ZIP64_EXTRA, _EXTRA_HEADER = 30, 20, 4  # bytes


def _record(archive: ZipFile, raw: BinaryIO, name: str) -> Any:
    """Opens a new file in the archive. Its contents start at an offset that is a multiple of 64 bytes."""
    info = ZipInfo(f"model/{name}")
    start = raw.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA + _EXTRA_HEADER
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return archive.open(info, "w", force_zip64=True)
