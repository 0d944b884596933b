"""Commands that load a model: ask, chat, features."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava.cli.app import app, progress_bar
from llava.cli.options import (
    Adapters,
    AsJson,
    Base,
    Checkpoint,
    Device,
    DType,
    Exif,
    Force,
    ImageMode,
    LegacyStrip,
    MaxNewTokens,
    MinP,
    Model,
    Quantize,
    RepetitionPenalty,
    Revision,
    Seed,
    Stop,
    Temperature,
    Template,
    TopK,
    TopP,
    VisionTower,
)
from llava.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from llava.assistant import Assistant


@app.command()
def ask(
    words: Annotated[list[str], typer.Argument(metavar='[IMAGE]... "QUESTION"', help="- reads a picture from stdin")],
    model: Model = None,
    base: Base = None,
    adapter: Adapters = None,
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
    adapter: Adapters = None,
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
    """Talk in turns. /image PATH, /adapter NAME, /reset, /save FILE, /quit; Ctrl-C ends an answer, nothing else."""
    options = dict(locals())
    vlm = _load(options)
    from llava.chat import Chat

    Chat(vlm, _sampling(options)).run()


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
    adapters = dict(map(_named, options.get("adapter") or ()))
    return llava.load(path, adapters=adapters, **{name: options[name] for name in _LOADING if name in options})


def _named(adapter: str) -> tuple[str, str]:
    name, _, folder = adapter.partition("=")
    if not (name and folder):
        raise ConfigError(f"--adapter is {adapter!r}; expected NAME=FOLDER_OR_HUB_ID")
    return name, folder


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _SAMPLING}


def _existing(path: str) -> Path:
    if not os.path.isfile(path):
        raise ImageError(f"{path:.200}: no such picture; the question comes last, in quotes")
    return Path(path)
