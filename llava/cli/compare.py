"""Commands that read runs: eval compare, eval show."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from llava.cli.eval import evaluation
from llava.cli.options import AsJson
from llava.errors import counted

log = logging.getLogger(__name__)


@evaluation.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="folders of runs; the others are compared with the first")
    ],
    *,
    out: Annotated[Path | None, typer.Option("--out", help="folder for compare.md and charts")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="of the bootstrap")] = 1000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the bootstrap")] = 0,
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: scores, differences with confidence intervals, and the questions that changed."""
    from llava.eval import side_by_side
    from llava.eval.bootstrap import Options
    from llava.eval.compare import compare, open_runs

    found = compare(open_runs(folders), Options(samples, seed))
    for note in found.notes:
        log.warning("%s", note)
    written = side_by_side.write(found, out) if out else None
    if as_json:
        print(json.dumps(side_by_side.to_dict(found)))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)
    console.print(*side_by_side.tables(found), sep="\n")
    if written:
        print(f"changed questions, settings and charts: {written}")


@evaluation.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML file to write; default: show.html in the folder")
    ] = None,
    pictures: Annotated[
        int, typer.Option("--pictures", min=0, help="megabytes of pictures, scaled down, at most")
    ] = 50,
) -> None:
    """Write one HTML file to browse questions, pictures, answers and verdicts. It needs nothing from outside."""
    from llava.eval.runs import check_scores, read_run
    from llava.eval.show import page
    from llava.tensors.atomic import new_file

    run = read_run(folder)
    check_scores(run)
    text, n_left_out = page(run, max_bytes=pictures * 1_000_000)
    if n_left_out:
        log.warning(
            "%s left out of the page; set pictures= (--pictures) to more megabytes", counted(n_left_out, "picture")
        )
    target = out or folder / "show.html"
    with new_file(target, len(text)) as partial:
        partial.write_text(text, encoding="utf-8")
    print(target)
