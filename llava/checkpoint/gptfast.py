"""The language model as gpt-fast's `model.pth`: its names, its row order, one file in torch's zip format.

gpt-fast rotates neighbouring pairs of rows, hub checkpoints rotate the two halves of a head: rows of q and k are put in
gpt-fast's order. q, k and v are stacked.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch
from torch import Tensor

from llava.checkpoint import keymap
from llava.checkpoint.keymap import Rule
from llava.checkpoint.open import Checkpoint, Source, check_headers, open_checkpoint
from llava.checkpoint.write import Item, Progress, new_file, silent, write_bytes
from llava.errors import CheckpointError

GPT_FAST = (
    Rule("tok_embeddings.weight", "decoder.embed.weight"),
    Rule("layers.*.attention_norm.weight", "decoder.blocks.*.attn_norm.weight"),
    Rule("layers.*.attention.wqkv.weight", "decoder.blocks.*.attn.qkv.weight"),
    Rule("layers.*.attention.wo.weight", "decoder.blocks.*.attn.out.weight"),
    Rule("layers.*.ffn_norm.weight", "decoder.blocks.*.mlp_norm.weight"),
    Rule("layers.*.feed_forward.w1.weight", "decoder.blocks.*.mlp.gate.weight"),
    Rule("layers.*.feed_forward.w3.weight", "decoder.blocks.*.mlp.up.weight"),
    Rule("layers.*.feed_forward.w2.weight", "decoder.blocks.*.mlp.down.weight"),
    Rule("norm.weight", "decoder.norm.weight"),
    Rule("output.weight", "decoder.head.weight"),
)


def convert(folder: Path, output: Path | None = None, *, progress: Progress = silent) -> tuple[Path, Checkpoint]:
    """Writes `model.pth` into the folder (or `output`) and returns it with the source.

    Whatever is no part of the language model is left out. Raises LlavaError.
    """
    checkpoint = open_checkpoint(folder, vision=False, lenient=True)
    check_headers(checkpoint)
    target = output or checkpoint.folder / "model.pth"
    written = items(checkpoint)
    with new_file(target, sum(item.n_bytes for item in written)) as partial_file:
        write_pth(partial_file, written, progress)
    return target, checkpoint


def items(checkpoint: Checkpoint) -> list[Item]:
    """The language model under gpt-fast's names. A tied head is written out: gpt-fast knows none."""
    sources = dict(checkpoint.sources)
    if checkpoint.config.decoder.tied:
        sources["decoder.head.weight"] = sources["decoder.embed.weight"]
    return [
        Item(
            name=keymap.disk_names(ours, GPT_FAST)[0],
            dtype=_writable(source),
            shape=source.shape,
            where=source.where,
            parts=partial(_parts, checkpoint, ours, source.read),
        )
        for ours, source in sources.items()
    ]


def _writable(source: Source) -> torch.dtype:
    if source.dtype not in _STORAGES:
        raise CheckpointError(f"{source.where}: is {source.dtype}; model.pth can hold float32, float16 and bfloat16")
    return source.dtype


def _parts(checkpoint: Checkpoint, ours: str, read: Callable[[], Tensor]) -> Iterator[Tensor]:
    tensor = read()
    if not ours.endswith("attn.qkv.weight"):
        yield tensor
        return
    config = checkpoint.config.decoder
    q, k, v = tensor.split([config.n_heads * config.head_dim] + 2 * [config.n_kv_heads * config.head_dim])
    yield interleaved(q, config.head_dim)
    yield interleaved(k, config.head_dim)
    yield v


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """[heads x head_dim, D] in the half-split order -> the order of neighbouring pairs."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


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


def write_pth(file: Path, items: Sequence[Item], progress: Progress = silent) -> None:
    """What `torch.save` makes of a table of tensors, but written tensor by tensor; it can be mapped when loaded."""
    total, done = sum(item.n_bytes for item in items), 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    with file.open("wb") as raw, ZipFile(raw, "w", ZIP_STORED) as archive:
        with _record(archive, raw, "data.pkl") as out:
            table = OrderedDict((item.name, _Tensor(i, item)) for i, item in enumerate(items))
            _Pickler(out, protocol=2).dump(table)
        for name, text in (("byteorder", b"little"), ("version", b"3\n")):
            with _record(archive, raw, name) as out:
                out.write(text)
        for i, item in enumerate(items):
            with _record(archive, raw, f"data/{i}") as out:
                write_bytes(out, item, count)


_ALIGNMENT = 64  # bytes; where torch puts records, so that mapped tensors are aligned
_LOCAL_HEADER, _ZIP64_EXTRA, _EXTRA_HEADER = 30, 20, 4  # bytes


def _record(archive: ZipFile, raw: BinaryIO, name: str) -> Any:
    """A file of the archive whose contents start at a multiple of 64 bytes."""
    info = ZipInfo(f"model/{name}")
    start = raw.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA + _EXTRA_HEADER
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return archive.open(info, "w", force_zip64=True)
