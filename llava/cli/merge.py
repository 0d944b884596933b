"""Commands that merge a difference with its base, and take models apart."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava.cli.app import app, progress_bar
from llava.cli.options import AsJson, Base, Checkpoint, Force, Revision, VisionTower

if TYPE_CHECKING:
    from llava.convert.merge import Merged, MergeOptions

BaseModel = Annotated[
    str, typer.Option("--base", "--base-model-path", "--model-base", help="folder or hub id of the base LLM")
]
Target = Annotated[
    Path, typer.Option("--target", "--target-model-path", "--save-model-path", help="folder to write; absent or empty")
]
Precise = Annotated[
    bool, typer.Option("--precise", help="sums in float32, rounded once, instead of the original arithmetic")
]
Verify = Annotated[bool, typer.Option("--verify", help="compute everything again and compare bit by bit")]
ShardGB = Annotated[
    float,
    typer.Option(
        "--shard-gb", min=1e-6, max=1e6, help="largest file, in GB; a rerun continues after the last complete one"
    ),
]


@app.command("apply-delta")
def apply_delta(
    base: BaseModel,
    target: Target,
    delta: Annotated[str, typer.Option("--delta", "--delta-path", help="folder or hub id of the published delta")],
    precise: Precise = False,
    verify: Verify = False,
    shard_gb: ShardGB = 5.0,
    revision: Revision = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Base weights + published delta -> usable weights."""
    from llava.convert import merge as job

    options = _options(precise, verify, shard_gb, revision, force)
    with progress_bar("apply delta") as progress:
        done = job.apply_delta(base, target, delta, options, progress=progress)
    _show(done, as_json)


@app.command("merge-lora")
def merge_lora(
    base: BaseModel,
    target: Target,
    lora: Annotated[str, typer.Option("--lora", "--model-path", help="folder or hub id of the LoRA")],
    precise: Precise = False,
    verify: Verify = False,
    shard_gb: ShardGB = 5.0,
    revision: Revision = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Base weights + LoRA -> usable weights."""
    from llava.convert import merge as job

    options = _options(precise, verify, shard_gb, revision, force)
    with progress_bar("merge LoRA") as progress:
        done = job.merge_lora(base, target, lora, options, progress=progress)
    _show(done, as_json)


def _options(precise: bool, verify: bool, shard_gb: float, revision: str | None, force: bool) -> "MergeOptions":
    from llava.convert.merge import MergeOptions

    max_shard_bytes = round(shard_gb * 1e9)
    return MergeOptions(precise=precise, verify=verify, force=force, revision=revision, max_shard_bytes=max_shard_bytes)


@app.command("make-delta")
def make_delta(
    base: BaseModel,
    target: Annotated[str, typer.Option("--target", "--target-model-path", help="folder or hub id of the whole model")],
    delta: Annotated[Path, typer.Option("--delta", "--delta-path", help="folder to write; absent or empty")],
) -> None:
    """Whole model - base weights -> a delta that can be published."""
    from llava.convert import split as job

    with progress_bar("make delta") as progress:
        job.make_delta(target, base, delta, progress=progress)
    print(f"{delta}: {target} as its difference to {base}, in float16")


@app.command("extract-projector")
def extract_projector(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; absent or empty")],
    base: Base = None,
    vision_tower: VisionTower = None,
    revision: Revision = None,
) -> None:
    """A LLaVA's projector by itself, as stage 1 leaves it."""
    from llava.config import LoadOptions
    from llava.convert import split as job

    options = LoadOptions(base=base, vision_tower=vision_tower, revision=revision)
    n = job.extract_projector(checkpoint, out, options)
    print(f"{out}: {n} tensors in mm_projector.bin")


def _show(done: "Merged", as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(done), ensure_ascii=False))
        return
    for name, digest in done.sha256.items():
        print(f"{digest}  {name}")
    rate = f"{done.n_bytes / 1e6 / done.seconds:.0f} MB/s"
    more = f", {done.taken_over} files kept from an earlier run" if done.taken_over else ""
    verified = ", verified bit by bit" if done.verified else ""
    size = f"{done.n_bytes / 1e9:.2f} GB"
    print(f"{done.folder}: {done.n_tensors} tensors, {size} in {done.seconds:.1f} s ({rate}){more}{verified}")
