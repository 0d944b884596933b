"""Writes a checkpoint in another format and verifies the result."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llava.checkpoint.consistency import check_headers
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.convert.report import left_out, report
from llava.convert.verify import check_equal, check_logits
from llava.errors import ConfigError
from llava.formats import FORMATS
from llava.formats.clip import own_tower
from llava.formats.format import Checkpoint, Format, WriteJob
from llava.tensors.atomic import free_folder, new_file, new_folder
from llava.tensors.torch_zip import write_torch
from llava.tensors.writer import Progress, byte_counter, no_progress
from llava.zoo.bases import advice


@advice()
def convert(
    source: str | Path,
    target: Path,
    options: LoadOptions | None = None,
    *,
    to: str = "native",
    verify: bool = False,
    check: bool = True,
    progress: Progress = no_progress,
) -> Checkpoint:
    """Converts `source` to the format `to` and streams it into the folder `target`, which must be absent or empty.

    verify: read all tensors back and compare them bit by bit with the source. check: compare the logits of the source
    and the result, loading one module at a time. With `options.force`, NaN and Inf are tolerated and logits are not
    compared. A report is written to conversion.md in `target`. Returns the source checkpoint, with the
    names of omitted tensors in `unused_names`. Raises LlavaError; a failed conversion leaves no files.
    """
    options, format, target = options or LoadOptions(), _writable(to), free_folder(Path(target))
    vision = options.vision and format.holds_vision
    options = replace(options, vision=vision, image_mode=format.image_mode or options.image_mode)
    opened = open_checkpoint(source, options)
    check_headers(opened)
    checkpoint = format.prepare(opened)
    outputs = [replace(out, force=options.force) for out in format.outputs(checkpoint)]
    config = format.write_config(checkpoint)
    with new_folder(target, sum(out.n_bytes for out in outputs) + format.extra_bytes(opened)) as folder:
        format.write(WriteJob(checkpoint, opened, outputs, config, folder, progress))
        check = check and not options.force
        written = _read_back(format, folder, checkpoint) if verify or check else None
        results = list(_compare(checkpoint, written, verify, check, progress)) if written else []
        text = report(opened, outputs, to, results, format.remarks(opened))
        (folder / "conversion.md").write_text(text, encoding="utf-8")
    return replace(checkpoint, unused_names=left_out(opened, outputs))


def _writable(to: str) -> Format:
    known = [name for name, format in FORMATS.items() if format.writes]
    if to not in known:
        raise ConfigError(f"cannot convert to {to!r}; expected one of {', '.join(known)}")
    return FORMATS[to]


def _read_back(format: Format, folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    if (written := format.read_back(folder, checkpoint)) is None:
        # use the source's tower, since the tower specified in config.json may be unavailable
        tower = None if own_tower(folder) else checkpoint.tower_folder
        has_vision = checkpoint.config.vision is not None
        written = open_checkpoint(folder, LoadOptions(vision=has_vision, vision_tower=tower))
    check_headers(written)
    return written


def _compare(
    checkpoint: Checkpoint, written: Checkpoint, verify: bool, check: bool, progress: Progress
) -> Iterator[str]:
    """Runs the requested comparisons and yields report lines. Raises CheckpointError if the checkpoints differ."""
    if verify:
        check_equal(checkpoint, written, progress)
        yield "Read back: every tensor has the same bits."
    if check:
        yield f"Logits of both, float32: largest difference {check_logits(checkpoint, written):.1e}."


@advice()
def write_gpt_fast(
    folder: Path, output: Path | None = None, *, progress: Progress = no_progress
) -> tuple[Path, Checkpoint]:
    """Writes model.pth for gpt-fast to `output`, by default in the checkpoint folder, like gpt-fast's own script.

    Returns the path of the written file and the source checkpoint. Raises LlavaError.
    """
    format = FORMATS["gpt-fast"]
    opened = open_checkpoint(folder, LoadOptions(vision=False, force=True))
    check_headers(opened)
    target, checkpoint = output or opened.path / "model.pth", format.prepare(opened)
    outputs = format.outputs(checkpoint)
    with new_file(target, sum(out.n_bytes for out in outputs)) as partial:
        write_torch(partial, outputs, byte_counter(outputs, progress))
    return target, opened
