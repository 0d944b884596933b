"""Commands for the catalogue of published checkpoints: zoo, zoo show, zoo check."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava.cli.app import app
from llava.cli.options import AsJson, Revision
from llava.errors import counted
from llava.zoo import catalogue  # does not import torch

if TYPE_CHECKING:
    from rich.console import Console

    from llava.zoo.match import Match, Matches

zoo = typer.Typer(help="Browse the catalogue of published checkpoints, or identify a checkpoint folder.")
app.add_typer(zoo, name="zoo")


@zoo.callback(invoke_without_command=True)
def tables(
    context: typer.Context,
    base_llm: Annotated[
        str | None, typer.Option("--base-llm", help="show only entries whose base LLM contains this text")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="format to filter by, or part of its name: merged (or llava), delta, lora, projector, hf-reexport "
            "(or llava-hf)",
        ),
    ] = None,
    vision_encoder: Annotated[
        str | None, typer.Option("--vision-encoder", help="vision encoder to filter by, e.g. CLIP-L-336px")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="pretraining or finetuning data to filter by, e.g. 558K")
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            "--runs", metavar="FOLDER", help="compare published scores with those of llava eval run: a run, or a folder"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list of entries instead of tables")] = False,
) -> None:
    """Browse the catalogue of published checkpoints, or identify a checkpoint folder."""
    if context.invoked_subcommand:
        return
    chosen = catalogue.select(base_llm=base_llm, format=format, vision_encoder=vision_encoder, data=data)
    if runs:
        _compare(chosen, runs, as_json=as_json)
    elif as_json:
        _print_json(chosen)
    elif chosen:
        _print_tables(catalogue.tables(chosen))
    else:
        print("no entry matches; run llava zoo without filters to list all entries")


def _compare(chosen: list[dict[str, Any]], folder: Path, *, as_json: bool) -> None:
    from llava.eval.published import notes, published, read_measured, score_tables

    ids = {entry["id"] for entry in chosen}
    found = read_measured(folder)
    measured = [run for run in found if run.entry is None or run.entry["id"] in ids]
    if as_json:
        scores = [{"id": entry["id"], "published": published(entry)} for entry in chosen]
        _print_json({"entries": scores, "runs": [run.to_dict() for run in measured]})
        return
    _print_tables(score_tables(chosen, measured))
    for run in measured:
        _print_lines("", notes(run))
    if n := len(found) - len(measured):
        print(f"{counted(n, 'run')} of entries that the filters leave out")


@zoo.command()
def show(
    id: Annotated[str, typer.Argument(metavar="ID", help="id of an entry, or its last component")],
    as_json: AsJson = False,
) -> None:
    """Show an entry: requirements, scores, template, and the commands to download, merge and run the checkpoint."""
    entry = catalogue.find(id)
    commands = [{"for": purpose, "command": line} for purpose, line in catalogue.commands(entry)]
    if as_json:
        needs = {"base": catalogue.base_id(entry), "vision_tower": catalogue.tower(entry)}
        _print_json({**entry, "needs": needs, "licence": catalogue.licence(entry), "commands": commands})
        return
    _print_pairs(catalogue.facts(entry))
    print()
    for line in commands:
        print(f"# {line['for']}\n{line['command']}")


@zoo.command()
def check(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="folder or hub id of the checkpoint; its name is ignored")
    ],
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Identify a checkpoint by its files. If it is not in the zoo, show the nearest entries and how they differ."""
    from llava.checkpoint.detect import detect, read_files
    from llava.zoo.match import match

    files = read_files(folder, revision)
    found = match(files, detect(files))
    if as_json:
        _print_json(_as_dict(found))
        return
    if found.candidates:
        several = "one of these; the files do not distinguish them" if len(found.candidates) > 1 else "this"
        print(f"{folder} is {several}:")
        for one in found.candidates:
            print(f"  {one.entry['id']}")
    else:
        print(f"{folder} is not in the zoo; nearest entries:")
        for one in found.nearest[:_SHOWN]:
            print(f"  {one.entry['id']}")
            _print_lines("    differs: ", one.differs.values())
    print("evidence:")
    _print_lines("  ", (f"{name}: {fact.evidence}" for name, fact in found.fingerprint.items()))


_SHOWN = 4  # number of nearest entries in text output; --json lists all


def _as_dict(found: "Matches") -> dict[str, Any]:
    def one(match: "Match") -> dict[str, Any]:
        return {"id": match.entry["id"], "agrees": match.agrees, "differs": match.differs}

    return {
        "candidates": [one(match) for match in found.candidates],
        "nearest": [one(match) for match in found.nearest],
        "evidence": {name: {"value": fact.value, "seen": fact.evidence} for name, fact in found.fingerprint.items()},
    }


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _print_lines(indent: str, lines: Any) -> None:
    for line in lines:
        print(f"{indent}{line}")


def _console(width: int) -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width, markup=False, highlight=False)


def _print_tables(tables: Iterable[catalogue.Table]) -> None:
    from rich.table import Table

    console = _console(width=400)
    for part in tables:
        table = Table(title=part.title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("Checkpoint", no_wrap=not sys.stdout.isatty(), overflow="fold")
        for column in part.columns:
            table.add_column(column, overflow="fold")
        for line in part.lines:
            table.add_row(*line)
        console.print(table)
        console.print()


def _print_pairs(pairs: list[tuple[str, str]]) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in pairs:
        table.add_row(name, text)
    _console(width=140).print(table)
