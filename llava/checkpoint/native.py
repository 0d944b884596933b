"""Conversion, and our own layout: safetensors under our names and one config.json, tower and tokenizer included."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.checkpoint import llama
from llava.checkpoint.detect import FORMAT_KEY, NATIVE_FORMAT
from llava.checkpoint.open import Checkpoint, check_headers, open_checkpoint
from llava.checkpoint.write import Item, Progress, copy_tokenizer, new_folder, silent, write_json, write_shards
from llava.errors import CheckpointError, ConfigError


class Layout(NamedTuple):
    """A layout that can be written: which tensors, and what its config.json says."""

    items: Callable[[Checkpoint], list[Item]]
    config: Callable[[Checkpoint], dict[str, Any]]


def items(checkpoint: Checkpoint) -> list[Item]:
    """All tensors under our names, as they are stored."""
    return [
        Item(name=name, dtype=source.dtype, shape=source.shape, where=source.where, parts=source.pieces)
        for name, source in checkpoint.sources.items()
    ]


def config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the native config.json says."""
    return {FORMAT_KEY: NATIVE_FORMAT, **checkpoint.config.to_dict()}


LAYOUTS = {"native": Layout(items, config), "llama": Layout(llama.items, llama.config)}


def convert(
    source: str | Path,
    target: Path,
    *,
    to: str = "native",
    vision: bool = True,
    verify: bool = False,
    force: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> Checkpoint:
    """Writes a checkpoint in another layout into `target` (absent or empty), streaming, and returns the source.

    `to`: native, or llama for a plain Llama folder that any Llama loader opens. `verify`: everything is read back and
    compared bit by bit. `force`: go on in spite of unknown tensors, NaN and Inf. `options` as for `open_checkpoint`.
    Raises LlavaError; a folder that failed is not left behind.
    """
    if to not in LAYOUTS:
        raise ConfigError(f"there is no layout {to!r} to convert to; expected one of {', '.join(LAYOUTS)}")
    checkpoint = open_checkpoint(source, vision=vision and to != "llama", lenient=force, **options)
    check_headers(checkpoint)
    written = [replace(item, force=force) for item in LAYOUTS[to].items(checkpoint)]
    with new_folder(Path(target), sum(item.n_bytes for item in written)) as folder:
        write_shards(folder, written, progress)
        write_json(folder / "config.json", LAYOUTS[to].config(checkpoint))
        copy_tokenizer(checkpoint.tokenizer_folder, folder)
        if verify:
            check_equal(checkpoint, open_checkpoint(folder), progress)
    return checkpoint


def check_equal(one: Checkpoint, other: Checkpoint, progress: Progress = silent) -> None:
    """Two checkpoints hold the same tensors, bit for bit. Raises CheckpointError naming the first that differs."""
    if differing := sorted(set(one.sources) ^ set(other.sources)):
        raise CheckpointError(f"{other.folder}: differs from {one.folder} in having or lacking {differing[0]}")
    total = sum(source.n_bytes for source in one.sources.values())
    done = 0
    for name, tensor in one.tensors():
        tensor, same = tensor.to(one.sources[name].dtype), other.sources[name].read()
        if tensor.dtype != same.dtype or not torch.equal(_bits(tensor), _bits(same)):
            raise CheckpointError(f"{other.folder}: {name} is not what {one.folder} holds; convert again")
        done += one.sources[name].n_bytes
        progress(done, total)


def _bits(tensor: Tensor) -> Tensor:
    """NaN equals itself, 0 is not -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
