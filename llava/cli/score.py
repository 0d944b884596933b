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
    from llava.eval import scienceqa as task

    run = task.open_run(
        problems, splits, split, rule=rule.value, seed=seed, skip_missing_problems=skip_missing_problems
    )
    found = task.score(task.read_predictions(predictions), run)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        _show(task.table(found), *task.notes(found, run.rule))


@score.command("llava-bench")
def llava_bench(
    *,
    reviews: Annotated[
        list[Path], typer.Option("--reviews", metavar="FILE", help="a judge's verdicts, as JSON lines; repeatable")
    ],
    more: Annotated[list[Path] | None, typer.Argument(metavar="FILE", help="more files of verdicts")] = None,
    as_published: Annotated[
        bool, typer.Option("--as-published", help="average unparsed verdicts in, as the original does")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score a judge's verdicts on LLaVA-Bench: in all and by category, relative to the reference answers."""
    from llava.eval.tasks import llava_bench as task

    read = [(file.stem, task.read_reviews(file)) for file in [*reviews, *(more or ())]]
    both = {rule: [one for file in read for one in task.summarize(*file, as_published=rule)] for rule in (False, True)}
    if as_json:
        print(json.dumps([one.to_dict() for one in both[as_published]]))
    elif not any(one.unparsed for one in both[as_published]):
        _show(task.table(both[as_published], "all verdicts have scores, so both rules give these figures"))
    else:
        _show(*(task.table(both[rule], task.TITLES[rule]) for rule in (as_published, not as_published)))


def _show(*parts: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)
    console.print(*parts, sep="\n")
