"""Commands for training: train, data check, data convert, data overlap."""

import json
import os
import sys
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from llava.cli.advice import Command
from llava.cli.app import app, command_line, progress_bar
from llava.cli.kernel_cache import use_private_folder
from llava.cli.options import AsJson, Base, Template, Transparency
from llava.errors import ConfigError


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="name of a built-in recipe, or path to a .toml file")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a recipe key; repeatable")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="print the estimated requirements of the run and exit")] = False,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, envvar="WORLD_SIZE", help="number of GPUs that --plan assumes")
    ] = 1,
    plot: Annotated[
        list[Path] | None,
        typer.Option(
            "--plot", metavar="RUN", help="plot the training curves of a run folder instead of training; repeatable"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="output file for --plot; default: RUN/curves.png")] = None,
    listed: Annotated[bool, typer.Option("--list", help="list the shipped recipes")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a model from a recipe. Run the same command again to resume; use torchrun to train on several GPUs."""
    from llava.train.recipe import read_recipe, recipe_names

    if plot:
        from llava.train.plot import plot as draw

        print(draw(plot, out))
    elif listed:
        names = recipe_names()
        print(json.dumps(names) if as_json else "\n".join(names))
    elif recipe is None:
        raise ConfigError("no recipe given; run llava train --list to see the shipped recipes")
    elif plan:
        from llava.train.plan import make_plan

        made = make_plan(read_recipe(recipe, changes or ()), n_ranks=ranks)
        print(json.dumps(asdict(made)) if as_json else made.text())
    else:
        from llava.train.loop import train as job

        is_main = os.environ.get("RANK", "0") == "0"
        use_private_folder(device)
        try:
            model = job(read_recipe(recipe, changes or ()), device=device, as_json=as_json)
        except KeyboardInterrupt:
            if is_main:
                print(f"llava: interrupted; to continue, run: {command_line()}", file=sys.stderr)
            raise SystemExit(130) from None
        if is_main and not as_json:
            print(f"{model}: the trained model")


data = typer.Typer(help="Commands for training data.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command("check")
def data_check(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="LLaVA .json or .jsonl file, .tar file, or folder of .tar files")
    ],
    images: Annotated[
        Path | None,
        typer.Option("--images", help="location of the images: folder, .zip file, .tar file or folder of .tar files"),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="folder of the tokenizer used to count tokens")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="folder or hub id of the model to count tokens for")
    ] = None,
    base: Base = None,
    template: Template = None,
    transparency: Transparency = "drop",
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="maximum number of tokens per sample")] = 2048,
    image_tokens: Annotated[
        int | None, typer.Option("--image-tokens", min=1, help="tokens per image; default: from --model, else 576")
    ] = None,
    fix: Annotated[
        Path | None, typer.Option("--fix", metavar="OUT", help="write a copy of the data with the problems fixed")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="number of worker processes; default: one per CPU")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every sample and image. The exit code is 1 if there are problems that no fixed copy resolves."""
    from llava.config import PictureOptions
    from llava.data import check as job
    from llava.data.findings import render
    from llava.data.measure import open_measure

    command: Command = context.obj
    pictures = PictureOptions(transparency=transparency)  # type: ignore[arg-type]  # checks the name
    measure = open_measure(
        tokenizer, model, template=template, limit=max_length, picture_tokens=image_tokens, base=base
    )
    with progress_bar("check", unit="samples") as progress:
        found = job.check(
            file,
            images,
            measure=measure,
            fix=fix,
            workers=workers,
            transparency=pictures.transparency,
            progress=progress,
        )
    found = replace(found, findings=[one._replace(text=command.rewrite(one.text)) for one in found.findings])
    if as_json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False).print(render(found))
    if not found.resolved:
        raise SystemExit(1)


class _Layout(str, Enum):
    sharegpt = "sharegpt"
    openai = "openai"
    scienceqa = "scienceqa"


@data.command("convert")
def data_convert(
    file: Annotated[
        Path, typer.Argument(metavar="IN", help=".json or .jsonl file; of ScienceQA, the folder with problems.json")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=".json or .jsonl file to write")],
    layout: Annotated[_Layout, typer.Option("--from", help="layout of IN")],
    split: Annotated[
        str | None, typer.Option("--split", help="of ScienceQA; default: from OUT, as in llava_train_QCM-LEA.json")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="of ScienceQA's texts, such as QCM-LEPA; default: from OUT")
    ] = None,
    drop: Annotated[
        bool, typer.Option("--drop", help="leave out samples that cannot be converted instead of failing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert data in another layout to LLaVA's JSON. Nothing is written if a sample cannot be converted."""
    from llava.data import convert as job
    from llava.data.scienceqa import wanted

    if layout is _Layout.scienceqa:
        with progress_bar("convert", unit="samples") as progress:
            done = job.convert_scienceqa(file, out, wanted(out, split, format), drop=drop, progress=progress)
    elif split or format:
        raise ConfigError(f"--split and --format are about ScienceQA; leave them out with --from {layout.value}")
    else:
        done = job.convert(file, out, layout=layout.value, drop=drop)
    print(json.dumps(done.to_dict(), ensure_ascii=False) if as_json else done.text())


@data.command("overlap")
def data_overlap(
    train: Annotated[
        Path, typer.Argument(metavar="TRAIN", help="training data: .json, .jsonl or .tar file, or folder of .tar files")
    ],
    bench: Annotated[
        Path,
        typer.Argument(
            metavar="BENCH", help="benchmark: a folder of pictures and JSON files, one such file, or training data"
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option("--images", help="location of TRAIN's images: folder, .zip, .tar or folder of .tar files"),
    ] = None,
    bench_images: Annotated[
        Path | None,
        typer.Option("--bench-images", help="location of BENCH's images; default: BENCH itself, a folder"),
    ] = None,
    distance: Annotated[
        int,
        typer.Option(
            "--distance", min=0, max=64, help="bits, of 256, in which the hashes of the same picture may differ"
        ),
    ] = 24,
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="number of worker processes; default: one per CPU")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="write the report, as JSON, to a new file")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find images and questions of a benchmark in training data. The exit code is 1 if there are any."""
    from llava.data.overlap import OverlapOptions, find_overlap
    from llava.data.overlap_report import render
    from llava.tensors.atomic import check_new, new_file

    if out:
        check_new(out)
    options = OverlapOptions(images=images, bench_images=bench_images, distance=distance, workers=workers)
    report = find_overlap(train, bench, options, progress_bar)
    text = json.dumps(report.to_dict())  # in ASCII, because names of files need not be valid Unicode
    if out:
        with new_file(out, 2 * len(text)) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False).print(render(report))
    if report.found:
        raise SystemExit(1)
