"""The command explain."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava.cli.answer import check_question, images_at, load
from llava.cli.app import app
from llava.cli.options import Adapters, Base, EngineFlags, Model, ModelOptions, SamplingOptions, grouped
from llava.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from PIL import Image

    from llava.explain.maps import AttentionMap

_SUFFIXES = (".png", ".html")


@app.command()
@grouped
def explain(
    words: Annotated[
        list[str],
        typer.Argument(metavar='IMAGE... "QUESTION"', help="image files (-: read from stdin), then the question"),
    ],
    *,
    out: Annotated[Path, typer.Option("--out", help=".png file with all words, or .html page to look at them")],
    layers: Annotated[
        str | None, typer.Option("--layers", help="blocks of the decoder, e.g. 10,11,12, from 0; default: all")
    ] = None,
    heads: Annotated[str | None, typer.Option("--heads", help="attention heads, from 0; default: all")] = None,
    rollout: Annotated[
        bool, typer.Option("--rollout", help="follow the attention through the blocks, instead of their mean")
    ] = False,
    model: Model = None,
    base: Base = None,
    adapter: Adapters = None,
    loading: ModelOptions,
    engine: EngineFlags,
    sampling: SamplingOptions,
) -> None:
    """Show what each word of an answer looks at in the images: a heat map for each word, as a PNG or HTML file."""
    from llava.tensors.atomic import check_new

    *paths, question = words
    check_question(question, shlex.join(["--out", str(out)]), command="explain")
    if out.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"--out {out}: ends with {out.suffix or 'no suffix'}; choose a .png or .html file")
    check_new(out)
    blocks, of_blocks = _numbers("--layers", layers), _numbers("--heads", heads)
    sampling.check()
    images = images_at(paths, "name the images in it that you mean")
    if not images:
        raise PromptError('there is no image to look at; put it before the question: llava explain IMAGE "QUESTION"')
    vlm = load(model, loading, base=base, adapters=adapter, engine=engine)
    from llava.assistant import question_about
    from llava.preprocess.image import read_picture

    messages = question_about(images, question)
    found = vlm.attention_map(messages, layers=blocks, heads=of_blocks, rollout=rollout, **vars(sampling))
    pictures = [read_picture(image, vlm.preprocessor.pictures).image for image in images]
    _write(out, found, pictures, question, vlm.prepare(messages).prompt)
    print(found.reply.text)


def _numbers(name: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; expected comma-separated numbers, e.g. 10,11,12") from None


def _write(out: Path, found: "AttentionMap", pictures: list["Image.Image"], question: str, prompt: str) -> None:
    from llava.explain import draw, page
    from llava.tensors.atomic import new_file

    with new_file(out, 0) as partial:
        if out.suffix.lower() == ".png":
            draw.sheet(found, pictures).save(partial, "PNG")
        else:
            partial.write_text(page.page(found, pictures, question, prompt), encoding="utf-8")
