"""The part of `ask` that asks about each image and writes a table: `--csv` and `--jsonl`."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava.cli.advice import Command
from llava.cli.app import progress_bar
from llava.errors import ConfigError, ImageError, counted

if TYPE_CHECKING:
    from llava.assistant import Assistant

Csv = Annotated[
    Path | None,
    typer.Option(
        "--csv", metavar="OUT.csv", help="ask about each image, or each in a folder; write a table of answers"
    ),
]
JsonLines = Annotated[
    Path | None, typer.Option("--jsonl", metavar="OUT.jsonl", help="like --csv, but write a JSON object per line")
]


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """The file that the answers about each image are written to; without one, the question is about all images."""

    csv: Csv = None
    jsonl: JsonLines = None

    def file(self) -> Path | None:
        """Returns the file. Raises ConfigError if there are two, or its name does not fit the option."""
        given = {option: file for option, file in (("csv", self.csv), ("jsonl", self.jsonl)) if file}
        if len(given) > 1:
            raise ConfigError("found --csv and --jsonl; choose one of them")
        for option, file in given.items():
            if option_of(file) != f"--{option}":
                raise ConfigError(f"--{option} is {str(file)!r}; choose a name that ends in .{option}")
            return file
        return None


def option_of(table: Path) -> str:
    """Returns the option that writes a table, which is named like the suffix of the file."""
    return f"--{table.suffix[1:].lower()}"


def check_images(paths: Sequence[str], table: Path) -> None:
    """Raises ImageError unless there are images to ask about one by one."""
    if not paths:
        raise ImageError(
            f"{option_of(table)} needs images to ask about; put image files or folders before the question"
        )
    if "-" in paths:
        raise ImageError(f"- is one image from standard input; with {option_of(table)}, give image files or folders")


def answer_each(
    load_model: Callable[[], "Assistant"],
    images: Sequence[str],
    question: str,
    table: Path,
    *,
    sampling: Mapping[str, Any],
    settings: Mapping[str, Any],
    command: Command,
    as_json: bool,
) -> None:
    """Writes the table, after the answers of an interrupted run. Exits with status 1 if an image has no answer.

    settings: everything that the answers depend on, by parameter.
    """
    from llava import answers as job

    named = {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
    with job.open_run(job.find_pictures(images), question, table, named) as run:
        n, n_missing = len(run.pictures), len(run.missing)
        if n_missing < n:
            print(f"llava: {run.journal.path}: continuing after {n - n_missing} of {n} images", file=sys.stderr)
        vlm = load_model()
        with progress_bar("answers", unit="images") as progress:
            rows = job.answer_all(vlm, run, sampling, describe=command.render, progress=progress)
    n_failed = sum(row.error is not None for row in rows)
    if as_json:
        print(json.dumps({"file": str(table), "answers": n - n_failed, "errors": n_failed}))
    else:
        print(f"{table}: {counted(n - n_failed, 'answer')}, {counted(n_failed, 'error')}")
    if n_failed:
        raise SystemExit(1)
