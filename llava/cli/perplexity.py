"""The command eval perplexity."""

import json
from pathlib import Path
from typing import Annotated

import typer

from llava.cli.answer import load
from llava.cli.app import progress_bar
from llava.cli.eval import evaluation
from llava.cli.options import AsJson, Base, EngineFlags, LanguageModelOptions, Model, grouped
from llava.errors import PromptError, counted


@evaluation.command("perplexity")
@grouped
def perplexity(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a text in UTF-8")],
    *,
    model: Model = None,
    base: Base = None,
    context: Annotated[
        int | None, typer.Option("--context", help="length of a window, in tokens; default: the model's context")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="tokens from one window to the next; default: half of --context")
    ] = None,
    loading: LanguageModelOptions,
    engine: EngineFlags,
    as_json: AsJson = False,
) -> None:
    """Measure how well a checkpoint's language model predicts a text: its perplexity, and bits per byte."""
    text = _read(file)
    vlm = load(model, loading, base=base, vision=False, engine=engine)
    from llava.eval import perplexity as job

    with progress_bar("perplexity", unit="tokens") as progress:
        found = job.perplexity(vlm, text, context=context, stride=stride, progress=progress)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    print(f"perplexity     {found.perplexity:.4f}\nbits per byte  {found.bits_per_byte:.4f}")
    print(
        f"{counted(found.tokens, 'token')} scored, in {counted(found.windows, 'window')} of up to {found.context} "
        f"tokens, {found.stride} apart"
    )


def _read(file: Path) -> str:
    """Returns a text as it is, line ends included, except for a byte order mark. Raises PromptError."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PromptError(f"{file}: cannot be read ({error.strerror}); expected a text in UTF-8") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{file}: not UTF-8 text ({error.reason}); expected a text in UTF-8") from None
