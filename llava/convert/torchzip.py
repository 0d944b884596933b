"""A table of tensors in torch's own zip format, as `torch.save` makes it, but written tensor by tensor."""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch

from llava.checkpoint.write import Item, write_bytes
from llava.errors import CheckpointError


def write_torch(file: Path, items: Sequence[Item], on_bytes: Callable[[int], None]) -> None:
    """What `torch.load` opens, mapped and with `weights_only=True`. CheckpointError: a type it can not hold."""
    for item in items:
        if item.dtype not in _STORAGES:
            raise CheckpointError(f"{item.where}: is {item.dtype}; expected float32, float16 or bfloat16")
    with file.open("wb") as raw, ZipFile(raw, "w", ZIP_STORED) as archive:
        with _record(archive, raw, "data.pkl") as out:
            table = OrderedDict((item.name, _Tensor(i, item)) for i, item in enumerate(items))
            _Pickler(out, protocol=2).dump(table)
        for name, text in (("byteorder", b"little"), ("version", b"3\n")):
            with _record(archive, raw, name) as out:
                out.write(text)
        for i, item in enumerate(items):
            with _record(archive, raw, f"data/{i}") as out:
                write_bytes(out, item, on_bytes)


class _Storage:
    """Stands for a tensor's bytes while the table is pickled; they follow in a record of their own."""

    def __init__(self, key: int, item: Item):
        self.id = ("storage", _STORAGES[item.dtype], str(key), "cpu", torch.Size(item.shape).numel())


_STORAGES = {torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage}


class _Tensor:
    def __init__(self, key: int, item: Item):
        stride = torch.empty(item.shape, device="meta").stride()
        hooks: OrderedDict[str, Any] = OrderedDict()
        self.arguments = (_Storage(key, item), 0, tuple(item.shape), stride, False, hooks)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        return (torch._utils._rebuild_tensor_v2, obj.arguments) if isinstance(obj, _Tensor) else NotImplemented


_ALIGNMENT = 64  # bytes; where torch puts records, so that mapped tensors are aligned
_LOCAL_HEADER, _ZIP64_EXTRA, _EXTRA_HEADER = 30, 20, 4  # bytes


def _record(archive: ZipFile, raw: BinaryIO, name: str) -> Any:
    """A file of the archive whose contents start at a multiple of 64 bytes."""
    info = ZipInfo(f"model/{name}")
    start = raw.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA + _EXTRA_HEADER
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return archive.open(info, "w", force_zip64=True)
