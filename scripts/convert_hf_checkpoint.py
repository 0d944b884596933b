"""Entry point for the documented command: writes a checkpoint's language model as gpt-fast's model.pth.

See llava/convert/convert.py and llava/formats/gpt_fast.py. Sizes come from config.json, never from the model name.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # so that the script works in a clone without installation

from llava.cli import guarded, progress_bar
from llava.cli.checkpoint import left_out


def convert_hf_checkpoint(
    checkpoint_dir: Annotated[Path, typer.Option("--checkpoint_dir", help="folder with the checkpoint")],
    model_name: Annotated[str | None, typer.Option("--model_name", help="accepted and ignored")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="output file; default: model.pth in that folder")
    ] = None,
) -> None:
    """Write model.pth with the tensor names and row order of gpt-fast."""
    with guarded(), progress_bar("convert") as progress:
        from llava.convert.convert import write_gpt_fast

        file, checkpoint = write_gpt_fast(checkpoint_dir, output, progress=progress)
        if checkpoint.unused_names:
            print(left_out(checkpoint.unused_names))
        print(f"{file}: {len(checkpoint.tensors)} tensors, {file.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    typer.run(convert_hf_checkpoint)
