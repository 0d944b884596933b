"""Conversion into any layout, and our own: safetensors under our names, one config.json, tower and tokenizer in it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from llava.checkpoint.detect import FORMAT_KEY, NATIVE_FORMAT
from llava.checkpoint.open import Checkpoint, check_headers, open_checkpoint
from llava.checkpoint.tower import own_tower
from llava.checkpoint.write import Item, Progress, new_folder, silent, write_json, write_shards
from llava.convert import gguf, ggufread, llama, llavahf, original
from llava.convert.check import check_equal, check_logits
from llava.convert.report import left_out, report
from llava.convert.tokenizer import copy_tokenizer
from llava.errors import ConfigError
from llava.preprocess.tokenizer import JsonTokenizer


def items(checkpoint: Checkpoint) -> list[Item]:
    """All tensors under our names, as they are stored; all of a tower that the folder itself holds."""
    sources = checkpoint.sources | (checkpoint.rest_of_tower if checkpoint.tower_inside else {})
    return [
        Item(name=name, dtype=source.dtype, shape=source.shape, where=source.where, parts=source.pieces, ours=name)
        for name, source in sources.items()
    ]


def config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the native config.json says."""
    return {FORMAT_KEY: NATIVE_FORMAT, **checkpoint.config.to_dict()}


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """A reader takes tokenizer.model before tokenizer.json: where that is not what is used, it is left out."""
    copy_tokenizer(checkpoint.tokenizer_folder, folder, checkpoint.new_tokens)
    if isinstance(checkpoint.tokenizer, JsonTokenizer):
        (folder / "tokenizer.model").unlink(missing_ok=True)


def _write_original_beside(checkpoint: Checkpoint, folder: Path) -> None:
    llavahf.copy_plain_tokenizer(checkpoint, folder)
    original.write_own_tower(checkpoint, folder)


Write = Callable[[Checkpoint, Path, Path, Sequence[Item], Progress], None]


def _shards(
    settings: Callable[[Checkpoint, Path], dict[str, Any]], beside: Callable[[Checkpoint, Path], None]
) -> Write:
    """Safetensors; config.json with `settings` of a folder that becomes the path; what `beside` puts beside it."""

    def write(checkpoint: Checkpoint, folder: Path, target: Path, written: Sequence[Item], progress: Progress) -> None:
        write_shards(folder, written, progress)
        write_json(folder / "config.json", settings(checkpoint, target))
        beside(checkpoint, folder)

    return write


def _reopened(folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    tower = None if own_tower(folder) else checkpoint.tower_folder  # not the one of the name: that may be out of reach
    again = open_checkpoint(folder, vision=checkpoint.config.vision is not None, vision_tower=tower)
    check_headers(again)
    return again


def _as_it_is(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint


def _nothing(source: Checkpoint) -> list[str]:
    return []


class Layout(NamedTuple):
    """A layout that can be written."""

    items: Callable[[Checkpoint], list[Item]]  # which tensors
    write: Write  # all files of a folder that becomes the second path
    held: Callable[[Checkpoint], Checkpoint] = _as_it_is  # the model as this layout holds it: types, rows
    again: Callable[[Path, Checkpoint], Checkpoint] = _reopened  # what was written of a checkpoint, read back
    remarks: Callable[[Checkpoint], list[str]] = _nothing  # for the report


LAYOUTS = {
    "native": Layout(items, _shards(lambda checkpoint, target: config(checkpoint), _copy_tokenizer)),
    "llama": Layout(
        llama.items,
        _shards(lambda checkpoint, target: llama.config(checkpoint), llavahf.copy_plain_tokenizer),
        held=llavahf.without_added_rows,
    ),
    "original": Layout(
        original.items, _shards(original.config, _write_original_beside), held=llavahf.without_added_rows
    ),
    "hf": Layout(llavahf.items, _shards(lambda checkpoint, target: llavahf.config(checkpoint), llavahf.write_beside)),
    "gguf": Layout(gguf.items, gguf.write, held=gguf.held, again=ggufread.read, remarks=gguf.remarks),
}


def convert(
    source: str | Path,
    target: Path,
    *,
    to: str = "native",
    vision: bool = True,
    verify: bool = False,
    check: bool = True,
    force: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> Checkpoint:
    """Writes a checkpoint in another layout into `target` (absent or empty), streaming, and returns the source, as
    `unused` with what was left out.

    `to`: native, original (as LLaVA-1.5 is published), hf (as llava-hf's, for transformers), gguf (for llama.cpp), or
    llama for a plain Llama folder that any Llama loader opens. `verify`: everything is read back and compared bit by
    bit. `check`: the logits of both are compared, block by block. `force`: go on in spite of unknown tensors, NaN and
    Inf, without that check. `options` as for `open_checkpoint`. conversion.md in the folder tells what was done.
    Raises LlavaError; a folder that failed is not left behind.
    """
    if to not in LAYOUTS:
        raise ConfigError(f"there is no layout {to!r} to convert to; expected one of {', '.join(LAYOUTS)}")
    if to == "original":
        options["image_mode"] = "original"  # this layout has no other
    opened = open_checkpoint(source, vision=vision and to != "llama", lenient=force, **options)
    check_headers(opened)
    layout = LAYOUTS[to]
    checkpoint = layout.held(opened)
    written = [replace(item, force=force) for item in layout.items(checkpoint)]
    target = Path(target)
    with new_folder(target, sum(item.n_bytes for item in written)) as folder:
        layout.write(checkpoint, folder, target, written, progress)
        if to == "original":
            llavahf.keep_added_rows(opened, folder)
        check = check and not force
        again = layout.again(folder, checkpoint) if verify or check else None
        found = list(_checked(checkpoint, again, verify, check, progress)) if again else []
        (folder / "conversion.md").write_text(
            report(opened, written, to, found, layout.remarks(opened)), encoding="utf-8"
        )
    return replace(checkpoint, unused=left_out(opened, written))


def _checked(checkpoint: Checkpoint, again: Checkpoint, verify: bool, check: bool, progress: Progress) -> Iterator[str]:
    """What was written, opened again. Lines for the report. Raises CheckpointError."""
    if verify:
        check_equal(checkpoint, again, progress)
        yield "Read back: every tensor has the same bits."
    if check:
        yield f"Logits of both, float32: largest difference {check_logits(checkpoint, again):.1e}."
