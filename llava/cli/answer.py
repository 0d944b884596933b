"""Commands that load a model: ask, chat, features."""

import json
import os
import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava.cli.app import app, progress_bar
from llava.cli.kernel_cache import use_private_folder
from llava.cli.options import (
    Adapters,
    AsJson,
    Base,
    ChatOptions,
    Checkpoint,
    EngineFlags,
    LanguageModelOptions,
    Model,
    ModelOptions,
    SamplingOptions,
    grouped,
)
from llava.cli.table import TableOptions, answer_each, check_images, option_of
from llava.config import IMAGE_SUFFIXES
from llava.errors import ConfigError, ImageError, PromptError, counted

if TYPE_CHECKING:
    from llava.assistant import Assistant


@app.command()
@grouped
def ask(
    words: Annotated[
        list[str],
        typer.Argument(metavar='[IMAGE]... "QUESTION"', help="image files (-: read from stdin), then the question"),
    ],
    *,
    context: typer.Context,
    table: TableOptions,
    model: Model = None,
    base: Base = None,
    adapter: Adapters = None,
    loading: ModelOptions,
    engine: EngineFlags,
    sampling: SamplingOptions,
    as_json: AsJson = False,
) -> None:
    """Ask a question about any number of images, together or, for a table of answers, about each of them."""
    *paths, question = words
    out = table.file()
    check_question(question, shlex.join([option_of(out), str(out)]) if out else "")
    sampling.check()
    load_model = partial(load, model, loading, base=base, adapters=adapter, engine=engine)
    if out:
        check_images(paths, out)
        for path in paths:
            _check_exists(path)
        named = {"model": model, "base": base, "adapter": adapter, "batch_invariant": engine.batch_invariant}
        answer_each(
            load_model,
            paths,
            question,
            out,
            sampling=vars(sampling),
            settings=named | vars(loading) | vars(sampling),
            command=context.obj,
            as_json=as_json,
        )
        return
    images = images_at(paths, "to ask about each image in it, add --csv OUT.csv")
    vlm = load_model()
    from llava.assistant import question_about

    answer = vlm.begin(question_about(images, question), **vars(sampling))
    for piece in answer:
        if not as_json:
            print(piece, end="", flush=True)
    print(json.dumps(asdict(answer.reply()), ensure_ascii=False) if as_json else "")


@app.command()
@grouped
def chat(
    *,
    model: Model = None,
    base: Base = None,
    adapter: Adapters = None,
    loading: ModelOptions,
    engine: EngineFlags,
    sampling: ChatOptions,
) -> None:
    """Chat in the terminal. Commands: /image PATH, /adapter NAME, /reset, /save FILE, /quit; Ctrl-C stops a reply."""
    sampling.check()
    vlm = load(model, loading, base=base, adapters=adapter, engine=engine)
    from llava.chat import Chat

    Chat(vlm, vars(sampling)).run()


@app.command()
@grouped
def features(
    checkpoint: Checkpoint,
    *,
    input: Annotated[
        Path,
        typer.Option("--input", help='one text per line, or .jsonl rows {"text": …} with an optional "image" path'),
    ],
    layers: Annotated[
        str,
        typer.Option(
            "--layers", help="comma-separated layer numbers, e.g. 8,16,-1 (0: embeddings; -1: after the final norm)"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help=".safetensors file to write; must not exist")],
    base: Base = None,
    loading: ModelOptions,
) -> None:
    """Write the hidden states of texts, with or without images, to a safetensors file."""
    try:
        numbers = [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise ConfigError(f"--layers is {layers!r}; expected comma-separated layer numbers, e.g. 8,16,-1") from None
    from llava import features as job

    job.check_target(out)
    rows = job.read_rows(input)
    vlm = load(checkpoint, loading, base=base, vision=any(row.image for row in rows))
    with progress_bar("features", unit="rows") as progress:
        job.extract(vlm, rows, numbers, out, template=loading.template, progress=progress)
    print(f"{out}: {counted(len(rows), 'row')}, layers {layers}")


def load(
    path: str | None,
    options: LanguageModelOptions,
    *,
    base: str | None,
    adapters: list[str] | None = None,
    vision: bool = True,
    engine: EngineFlags = EngineFlags(),  # noqa: B008 (frozen)
) -> "Assistant":
    """Loads a model with the options of a command. adapters: NAME=M, as typed."""
    options_of_engine = engine.options()
    import llava

    if path is None:
        print(
            "llava: no --model given; using llava-tiny, which recognises only drawn objects. "
            "To load another model, pass --model FOLDER_OR_HUB_ID.",
            file=sys.stderr,
        )
    named = dict(map(name_and_folder, adapters or ()))
    use_private_folder(options.device)
    return llava.load(path, base=base, adapters=named, vision=vision, engine=options_of_engine, **vars(options))


def name_and_folder(adapter: str) -> tuple[str, str]:
    """Splits NAME=M. Raises ConfigError."""
    name, _, folder = adapter.partition("=")
    if not (name and folder):
        raise ConfigError(f"--adapter is {adapter!r}; expected NAME=FOLDER_OR_HUB_ID")
    return name, folder


def check_question(question: str, out: str = "", *, command: str = "ask") -> None:
    """Raises PromptError if the last argument is an image or a folder, because then the question was forgotten.

    out: the option and the file that the command writes, for the advice.
    """
    named = question.lower().endswith(IMAGE_SUFFIXES) and not any(map(str.isspace, question))
    is_folder = bool(out) and os.path.isdir(question)
    if named or question == "-" or is_folder or _is_image(question):
        advised = shlex.join(["llava", command, question]) + f' "What is this?" {out}'.rstrip()
        raise PromptError(
            f"{question:.200} is in the position of the question, but is {'a folder' if is_folder else 'an image'}; "
            f"put the question last, in quotes: {advised}"
        )


def _is_image(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    from PIL import Image

    try:
        Image.open(path).close()
    except (OSError, ValueError, Image.DecompressionBombError):
        return False
    return True


def images_at(paths: list[str], instead: str) -> list[Path | bytes]:
    """Returns the images of arguments: files, or - for standard input. instead: advice for a folder."""
    for path in paths:
        if os.path.isdir(path):
            raise ImageError(f"{path:.200}: is a folder; expected an image file; {instead}")
        if path != "-":
            _check_exists(path)
    return [_from_stdin() if path == "-" else Path(path) for path in paths]


def _check_exists(path: str) -> None:
    if not os.path.exists(path):
        raise ImageError(
            f"{path:.200}: no such image file; if it is part of the question, put the whole question in quotes"
        )


def _from_stdin() -> bytes:
    data = sys.stdin.buffer.read()
    if not data:
        raise ImageError("- reads an image from standard input, which is empty; pipe an image file into the command")
    return data
