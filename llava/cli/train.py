"""Commands of training: train, data check."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llava.cli.app import app, progress_bar
from llava.cli.options import AsJson, Template
from llava.errors import ConfigError


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="a shipped recipe's name, or a .toml file")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a key; may be given again")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="say what it would take, and do not start")] = False,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, envvar="WORLD_SIZE", help="GPUs that --plan reckons with")
    ] = 1,
    plot: Annotated[
        list[Path] | None, typer.Option("--plot", metavar="RUN", help="draw the curves of a run's folder instead")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="picture that --plot writes, not RUN/curves.png")] = None,
    listed: Annotated[bool, typer.Option("--list", help="name the shipped recipes")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Train as a recipe says; the same command goes on where it stopped. Under torchrun: on many GPUs."""
    from llava.train import recipe as recipes

    if plot:
        from llava.train.plot import plot as draw

        print(draw(plot, out))
    elif listed:
        print("\n".join(recipes.names()))
    elif recipe is None:
        raise ConfigError("no recipe is named; llava train --list names those that are shipped")
    elif plan:
        from llava.train.plan import make_plan

        found = make_plan(recipes.read_recipe(recipe, changes or ()), n_ranks=ranks)
        print(json.dumps(asdict(found)) if as_json else found.text())
    else:
        from llava.train.loop import train as job

        model = job(recipes.read_recipe(recipe, changes or ()), device=device, as_json=as_json)
        if os.environ.get("RANK", "0") == "0" and not as_json:
            print(f"{model}: the trained model")


data = typer.Typer(help="Training data.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command("check")
def data_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="LLaVA's .json or .jsonl, a .tar, or a folder of tars")],
    images: Annotated[Path | None, typer.Option("--images", help="folder, .zip, .tar or folder of tars")] = None,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="folder whose tokenizer counts")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="counts as this model would")] = None,
    template: Template = None,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="most tokens of a sample")] = 2048,
    image_tokens: Annotated[
        int | None, typer.Option("--image-tokens", min=1, help="of a picture; else the model's, or 576")
    ] = None,
    fix: Annotated[Path | None, typer.Option("--fix", metavar="OUT", help="write a copy without the problems")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="processes; else one a CPU")] = None,
    as_json: AsJson = False,
) -> None:
    """Look at every sample and picture. Exit code 1: there are problems, and no cleaned copy was written."""
    from llava.data import check as job
    from llava.data.measure import open_measure
    from llava.data.report import shown

    measure = open_measure(tokenizer, model, template=template, limit=max_length, picture_tokens=image_tokens)
    with progress_bar("check", unit="samples") as progress:
        found = job.check(file, images, measure=measure, fix=fix, workers=workers, progress=progress)
    if as_json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False).print(shown(found))
    if not found.clean and not found.fixed:
        raise SystemExit(1)
