"""Commands that score files of answers and verdicts: eval score scienceqa, eval score llava-bench."""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from llava.cli.eval import evaluation
from llava.cli.options import AsJson

score = typer.Typer(help="Score files of answers or verdicts.", no_args_is_help=True)
evaluation.add_typer(score, name="score")


class _Rule(str, Enum):
    current = "current"
    before = "before-2023-10"


@score.command()
def scienceqa(
    *,
    predictions: Annotated[
        Path, typer.Option("--predictions", metavar="FILE", help="answers, in a format of the original")
    ],
    problems: Annotated[Path, typer.Option("--problems", help="ScienceQA's problems.json")],
    splits: Annotated[Path, typer.Option("--splits", help="ScienceQA's pid_splits.json")],
    split: Annotated[str, typer.Option("--split", help="name of the split")] = "test",
    rule: Annotated[_Rule, typer.Option("--rule", help="of the original's script, now or before October 2023")] = (
        _Rule.current
    ),
    seed: Annotated[
        int, typer.Option("--seed", help="of the choices that before-2023-10 draws for unparsed answers")
    ] = 0,
    skip_missing_problems: Annotated[
        bool, typer.Option("--skip-missing-problems", help="leave out ids of the split that problems.json lacks")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score answers to ScienceQA: in all, with pictures, and by subject, context and grade."""
    from llava.eval.tasks import scienceqa as task

    run = task.open_run(
        problems, splits, split, rule=rule.value, seed=seed, skip_missing_problems=skip_missing_problems
    )
    found = task.score(task.read_predictions(predictions), run)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        _show(task.table(found), *task.notes(found, run.rule))


def _show(*parts: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)
    console.print(*parts, sep="\n")
