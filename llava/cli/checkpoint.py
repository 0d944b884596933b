"""Commands for checkpoint files: inspect, convert."""

import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava.cli.app import app, progress_bar
from llava.cli.options import AsJson, Base, Checkpoint, Force, IgnoreTensors, Revision, VisionTower
from llava.errors import counted

if TYPE_CHECKING:
    from llava.checkpoint.inspect import Description, Scan


@app.command()
def inspect(
    checkpoint: Checkpoint,
    base: Base = None,
    vision_tower: VisionTower = None,
    revision: Revision = None,
    scan: Annotated[
        bool, typer.Option("--scan", help="read all weights and report NaN, Inf and all-zero tensors")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a checkpoint's format, sizes, template and requirements. Only headers are read, unless --scan is given."""
    from llava.checkpoint import inspect as job
    from llava.config import LoadOptions

    found = job.describe(checkpoint, LoadOptions(base=base, vision_tower=vision_tower, revision=revision))
    values = None
    if scan:
        with progress_bar("scan") as progress:
            values = job.scan(checkpoint, revision=revision, progress=progress)
    if as_json:
        print(json.dumps(asdict(found) | ({"scan": asdict(values)} if values else {}), ensure_ascii=False))
    else:
        _show(found, values)


@app.command()
def convert(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="output folder; must be empty if it exists")],
    to: Annotated[
        str, typer.Option("--to", help="output format: native, llava, llava-hf, llama, gguf or gpt-fast")
    ] = "native",
    vision: Annotated[bool, typer.Option("--vision/--no-vision", help="keep the vision tower and projector")] = True,
    verify: Annotated[
        bool, typer.Option("--verify", help="read the output back and compare it with the source bit by bit")
    ] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="compare the logits of source and output")] = True,
    base: Base = None,
    vision_tower: VisionTower = None,
    revision: Revision = None,
    force: Force = False,
    ignore_tensors: IgnoreTensors = None,
) -> None:
    """Write a checkpoint in another format."""
    from llava.config import LoadOptions
    from llava.convert import convert as job

    started = time.perf_counter()
    with progress_bar("convert") as progress:
        options = LoadOptions(
            base=base,
            vision_tower=vision_tower,
            vision=vision,
            revision=revision,
            force=force,
            ignore_tensors=tuple(ignore_tensors or ()),
        )
        source = job.convert(checkpoint, out, options, to=to, verify=verify, check=check, progress=progress)
    verified = ", verified bit by bit" if verify else ""
    print(f"{out}: {counted(len(source.tensors), 'tensor')} as {to} in {time.perf_counter() - started:.1f} s{verified}")
    if source.unused_names:
        print(left_out(source.unused_names))


def left_out(names: tuple[str, ...]) -> str:
    """Returns a one-line count of the tensors that a conversion left out, grouped by part of the model."""
    parts = ("projector", "text_model", "inv_freq", "vision")
    counts = Counter(next((part for part in parts if part in name), name) for name in names)
    return "left out: " + ", ".join(f"{part} ({counted(n, 'tensor')})" if n > 1 else part for part, n in counts.items())


def _show(found: "Description", values: "Scan | None") -> None:
    from rich.console import Console
    from rich.table import Table

    from llava.tensors.atomic import size_text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(name: str, text: object) -> None:
        table.add_row(name, str(text))

    row("kind", found.kind)
    for line in found.evidence:
        row("", line)
    if found.base:
        row("needs base", found.base)
    for note in found.licences:
        row("licence", note)
    for name, part in found.sizes.items():
        text = ", ".join(f"{k} {v}" for k, v in part.items() if v is not None) if isinstance(part, dict) else part
        row(name, f"{part:,}" if isinstance(part, int) else text)
    if found.context:
        row("context", f"{found.context} tokens")
        because = found.template_because
        row("template", f"{found.template or 'none'} ({because})" if because else "depends on the base")
        row("image mode", found.image_mode or "no images")
        row("memory", ", ".join(f"{kind} {size_text(n)}" for kind, n in found.memory_bytes.items()))
        row("missing", _some(found.missing))
        row("unused", _some(found.unused))
    if values:
        for name, names in (("NaN", list(values.nan)), ("Inf", list(values.inf)), ("all zero", values.zero)):
            row(name, _some(names))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
