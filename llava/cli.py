"""The command line: one small function a job. A job's room, and torch with it, is imported only when the job runs."""

import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from llava.errors import ConfigError, ImageError, LlavaError

if TYPE_CHECKING:
    from llava.assistant import Assistant
    from llava.checkpoint.inspect import Description, Scan


@contextmanager
def guarded() -> Iterator[None]:
    """What a caller got wrong is one line on stderr and exit code 2; Ctrl-C is exit code 130."""
    try:
        yield
    except LlavaError as error:
        print(f"llava: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("llava: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        raise SystemExit(0) from None


class _Guarded(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        with guarded():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Guarded,
    help="LLaVA in native PyTorch: load, convert and ask every published checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="folder or hub id of a checkpoint; none: llava-tiny, in this package"),
]
Checkpoint = Annotated[str, typer.Argument(metavar="M", help="folder or hub id of a checkpoint")]
Base = Annotated[str | None, typer.Option("--base", help="language model that a delta, LoRA or projector belongs to")]
VisionTower = Annotated[str | None, typer.Option("--vision-tower", help="CLIP's folder or hub id")]
Template = Annotated[str | None, typer.Option("--template", help="conversation template, by name")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N")]
Quantize = Annotated[str | None, typer.Option("--quantize", help="quantisation of the weights")]
Revision = Annotated[str | None, typer.Option("--revision", help="branch, tag or commit on the hub")]
Force = Annotated[bool, typer.Option("--force", help="go on in spite of unknown tensors, NaN and Inf")]
ImageMode = Annotated[str | None, typer.Option("--image-mode", help="arithmetic for pictures: original or hf")]
Exif = Annotated[bool, typer.Option("--exif", help="turn pictures as their EXIF orientation says")]
LegacyStrip = Annotated[bool, typer.Option("--legacy-strip", help="white space as when v0 and v1.1 were trained")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object instead of text")]

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="longest answer, in tokens")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token")]
TopP = Annotated[float | None, typer.Option("--top-p", help="likeliest tokens that together reach this probability")]
TopK = Annotated[int | None, typer.Option("--top-k", help="so many likeliest tokens")]
MinP = Annotated[float | None, typer.Option("--min-p", help="tokens this share as likely as the likeliest")]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", help="above 1: less repetition")]
Seed = Annotated[int | None, typer.Option("--seed", help="for the same answer again")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="string that ends the answer; may be given again")]


@app.command()
def ask(
    words: Annotated[list[str], typer.Argument(metavar='[IMAGE]... "QUESTION"', help="- reads a picture from stdin")],
    model: Model = None,
    base: Base = None,
    vision_tower: VisionTower = None,
    template: Template = None,
    dtype: DType = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    revision: Revision = None,
    force: Force = False,
    image_mode: ImageMode = None,
    exif: Exif = False,
    legacy_strip: LegacyStrip = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    as_json: AsJson = False,
) -> None:
    """Ask a question about a picture, several, or none."""
    options = dict(locals())
    *paths, question = words
    pictures = [sys.stdin.buffer.read() if path == "-" else _existing(path) for path in paths]
    vlm = _load(options)
    from llava.assistant import question_about

    answer = vlm.begin(question_about(pictures, question), **_sampling(options))
    for piece in answer:
        if not as_json:
            print(piece, end="", flush=True)
    if as_json:
        print(json.dumps(asdict(answer.reply()), ensure_ascii=False))
    else:
        print()


@app.command()
def chat(
    model: Model = None,
    base: Base = None,
    vision_tower: VisionTower = None,
    template: Template = None,
    dtype: DType = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    revision: Revision = None,
    force: Force = False,
    image_mode: ImageMode = None,
    exif: Exif = False,
    legacy_strip: LegacyStrip = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.2,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Talk in turns. /image PATH, /reset, /save FILE, /quit; Ctrl-C ends an answer and keeps the conversation."""
    options = dict(locals())
    vlm = _load(options)
    from llava.chat import Chat

    Chat(vlm, _sampling(options)).run()


@app.command()
def inspect(
    checkpoint: Checkpoint,
    base: Base = None,
    vision_tower: VisionTower = None,
    revision: Revision = None,
    scan: Annotated[
        bool, typer.Option("--scan", help="read all weights; report NaN, Inf and all-zero tensors")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a checkpoint is and needs, from headers alone."""
    from llava.checkpoint import inspect as job

    found = job.describe(checkpoint, base=base, vision_tower=vision_tower, revision=revision)
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
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; absent or empty")],
    to: Annotated[str, typer.Option("--to", help="native, or llama for a plain Llama folder")] = "native",
    vision: Annotated[bool, typer.Option("--vision/--no-vision", help="with or without tower and projector")] = True,
    verify: Annotated[bool, typer.Option("--verify", help="read back and compare bit by bit")] = False,
    base: Base = None,
    vision_tower: VisionTower = None,
    revision: Revision = None,
    force: Force = False,
) -> None:
    """Write a checkpoint in another layout."""
    from llava.checkpoint import native as job

    started = time.perf_counter()
    with progress_bar("convert") as progress:
        source = job.convert(
            checkpoint,
            out,
            to=to,
            vision=vision,
            verify=verify,
            progress=progress,
            base=base,
            vision_tower=vision_tower,
            revision=revision,
            force=force,
        )
    verified = ", verified bit by bit" if verify else ""
    print(f"{out}: {len(source.sources)} tensors as {to} in {time.perf_counter() - started:.1f} s{verified}")
    if source.unused:
        print(left_out(source.unused))


@app.command()
def features(
    checkpoint: Checkpoint,
    input: Annotated[Path, typer.Option("--input", help='text lines, or .jsonl rows {"text": …, "image": path?}')],
    layers: Annotated[str, typer.Option("--layers", help="such as 8,16,-1; 0 embeddings, -1 behind the last norm")],
    out: Annotated[Path, typer.Option("--out", help=".safetensors file to write")],
    base: Base = None,
    vision_tower: VisionTower = None,
    template: Template = None,
    dtype: DType = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    revision: Revision = None,
    force: Force = False,
    image_mode: ImageMode = None,
    exif: Exif = False,
    legacy_strip: LegacyStrip = False,
) -> None:
    """Hidden states of texts, with or without a picture, to a safetensors file."""
    options = dict(locals())
    try:
        numbers = [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise ConfigError(f"--layers is {layers!r}; expected numbers such as 8,16,-1") from None
    from llava import features as job

    rows = job.read_rows(input)
    options["vision"] = any(row.image for row in rows)
    vlm = _load(options)
    with progress_bar("features", unit="rows") as progress:
        job.extract(vlm, rows, numbers, out, template=template, progress=progress)
    print(f"{out}: {len(rows)} rows, layers {layers}")


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="a shipped recipe's name, or a .toml file")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a key; may be given again")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="say what it would take, and do not start")] = False,
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

        found = make_plan(recipes.read_recipe(recipe, changes or ()), n_ranks=int(os.environ.get("WORLD_SIZE", "1")))
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


_LOADING = (
    *("base", "vision_tower", "vision", "dtype", "device", "quantize", "template", "revision"),
    *("force", "image_mode", "exif", "legacy_strip"),
)
_SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")


def _load(options: dict[str, Any]) -> "Assistant":
    import llava

    path = options.get("model") or options.get("checkpoint")
    if path is None:
        print(
            "llava: no --model is named, so llava-tiny answers: it knows drawn objects alone; "
            "--model FOLDER_OR_HUB_ID takes a real LLaVA",
            file=sys.stderr,
        )
    return llava.load(path, **{name: options[name] for name in _LOADING if name in options})


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _SAMPLING}


def _existing(path: str) -> Path:
    if not os.path.isfile(path):
        raise ImageError(f"{path:.200}: no such picture; the question comes last, in quotes")
    return Path(path)


def left_out(names: tuple[str, ...]) -> str:
    """One line on tensors that a conversion leaves behind, by the part of the model they belong to."""
    parts = ("mm_projector", "vision_tower", "vision_model", "text_model", "inv_freq")
    counts = Counter(next((part for part in parts if part in name), name) for name in names)
    return "left out: " + ", ".join(f"{part} ({n} tensors)" if n > 1 else part for part, n in counts.items())


@contextmanager
def progress_bar(what: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    per_s = TextColumn("{task.fields[rate]:,.0f} " + f"{unit}/s")
    rate = (DownloadColumn(), Speed()) if unit == "bytes" else (MofNCompleteColumn(), per_s)
    started = time.perf_counter()
    with Progress("{task.description}", BarColumn(), *rate, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, rate=0)
        yield lambda done, total: bar.update(
            task, completed=done, total=total, rate=done / (time.perf_counter() - started)
        )


def _show(found: "Description", values: "Scan | None") -> None:
    from rich.console import Console
    from rich.table import Table

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
    for name, part in found.sizes.items():
        text = ", ".join(f"{k} {v}" for k, v in part.items() if v is not None) if isinstance(part, dict) else part
        row(name, f"{part:,}" if isinstance(part, int) else text)
    if found.context:
        row("context", f"{found.context} tokens")
        row("template", f"{found.template or 'none'} ({found.template_because})")
        row("image mode", found.image_mode or "no pictures")
        row("memory", ", ".join(f"{kind} {_bytes(n)}" for kind, n in found.memory_bytes.items()))
        row("missing", _some(found.missing))
        row("unused", _some(found.unused))
    if values:
        for name, names in (("NaN", list(values.nan)), ("Inf", list(values.inf)), ("all zero", values.zero)):
            row(name, _some(names))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def main(args: list[str] | None = None) -> None:
    """The console script."""
    logging.basicConfig(format="llava: %(message)s", level=logging.WARNING)
    app(args, prog_name="llava")


if __name__ == "__main__":
    main()
