"""The language model as gpt-fast's `model.pth`: its names, its row order, one file in torch's zip format.

gpt-fast rotates neighbouring pairs of rows, hub checkpoints rotate the two halves of a head: rows of q and k are put in
gpt-fast's order. q, k and v are stacked.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from llava.checkpoint import keymap
from llava.checkpoint.open import Checkpoint, check_headers, open_checkpoint
from llava.checkpoint.source import Source
from llava.checkpoint.write import Item, Progress, counting, new_file, silent
from llava.convert.llama import require_llama
from llava.convert.torchzip import write_torch

GPT_FAST = tuple(  # Meta's names, but that q, k and v are one
    replace(rule, disk=rule.disk.replace("w{q,k,v}", "wqkv")) for rule in keymap.META if rule.ours
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
        write_torch(partial_file, written, counting(written, progress))
    return target, checkpoint


def items(checkpoint: Checkpoint) -> list[Item]:
    """The language model under gpt-fast's names. A tied head is written out: gpt-fast knows none."""
    require_llama(checkpoint)
    sources = dict(checkpoint.sources)
    if checkpoint.config.decoder.tied:
        sources["decoder.head.weight"] = sources["decoder.embed.weight"]
    return [
        Item(
            name=keymap.disk_names(ours, GPT_FAST)[0],
            dtype=source.dtype,
            shape=source.shape,
            where=source.where,
            parts=partial(_parts, checkpoint, ours, source),
        )
        for ours, source in sources.items()
    ]


def _parts(checkpoint: Checkpoint, ours: str, source: Source) -> Iterator[Tensor]:
    tensor = source.read()
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
