"""Commands that merge a delta or LoRA into its base, or split a model into parts."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava.cli.app import app, progress_bar
from llava.cli.options import AsJson, Base, Checkpoint, Force, Revision, VisionTower, grouped
from llava.errors import counted

if TYPE_CHECKING:
    from llava.convert.merge import Merged, MergeOptions

BaseModel = Annotated[
    str, typer.Option("--base", "--base-model-path", "--model-base", help="folder or hub id of the base LLM")
]
RecordedBase = Annotated[
    str | None,
    typer.Option(
        "--base",
        "--base-model-path",
        "--model-base",
        help="folder or hub id of the base LLM; default: the recorded base, if it is on this machine",
    ),
]
Target = Annotated[
    Path,
    typer.Option(
        "--target", "--target-model-path", "--save-model-path", help="output folder; must be empty if it exists"
    ),
]


@dataclass(frozen=True, kw_only=True)
class MergingOptions:
    """Options for the merge commands; see `llava.convert.merge.MergeOptions`."""

    precise: Annotated[
        bool, typer.Option("--precise", help="sum in float32 and round once, unlike the original tools")
    ] = False
    verify: Annotated[
        bool, typer.Option("--verify", help="recompute every tensor and compare it with the output bit by bit")
    ] = False
    shard_gb: Annotated[
        float,
        typer.Option(
            "--shard-gb",
            min=1e-6,
            max=1e6,
            help="maximum shard size in GB; after an interruption, a rerun skips complete shards",
        ),
    ] = 5.0
    revision: Revision = None
    force: Force = False

    def resolve(self) -> "MergeOptions":
        from llava.convert.merge import MergeOptions

        return MergeOptions(
            precise=self.precise,
            verify=self.verify,
            force=self.force,
            revision=self.revision,
            max_shard_bytes=round(self.shard_gb * 1e9),
        )


@app.command("apply-delta")
@grouped
def apply_delta(
    *,
    base: RecordedBase = None,
    target: Target,
    delta: Annotated[str, typer.Option("--delta", "--delta-path", help="folder or hub id of the published delta")],
    options: MergingOptions,
    as_json: AsJson = False,
) -> None:
    """Apply a published delta to its base model to obtain usable weights."""
    from llava.convert import merge as job

    with progress_bar("apply delta") as progress:
        _show(job.apply_delta(base, target, delta, options.resolve(), progress=progress), as_json)


@app.command("merge-lora")
@grouped
def merge_lora(
    *,
    base: RecordedBase = None,
    target: Target,
    lora: Annotated[str, typer.Option("--lora", "--model-path", help="folder or hub id of the LoRA")],
    options: MergingOptions,
    as_json: AsJson = False,
) -> None:
    """Merge a LoRA into its base model to obtain usable weights."""
    from llava.convert import merge as job

    with progress_bar("merge LoRA") as progress:
        _show(job.merge_lora(base, target, lora, options.resolve(), progress=progress), as_json)


@app.command("make-delta")
def make_delta(
    base: BaseModel,
    target: Annotated[str, typer.Option("--target", "--target-model-path", help="folder or hub id of the full model")],
    delta: Annotated[Path, typer.Option("--delta", "--delta-path", help="output folder; must be empty if it exists")],
) -> None:
    """Subtract the base weights from a full model to obtain a delta that can be published."""
    from llava.convert import split as job

    with progress_bar("make delta") as progress:
        job.make_delta(target, base, delta, progress=progress)
    print(f"{delta}: the difference between {target} and {base}, in float16")


@app.command("extract-projector")
def extract_projector(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="output folder; must be empty if it exists")],
    base: Base = None,
    vision_tower: VisionTower = None,
    revision: Revision = None,
) -> None:
    """Write only the projector of a LLaVA checkpoint, in the format that stage 1 of training saves."""
    from llava.config import LoadOptions
    from llava.convert import split as job

    options = LoadOptions(base=base, vision_tower=vision_tower, revision=revision)
    n = job.extract_projector(checkpoint, out, options)
    print(f"{out}: {counted(n, 'tensor')} in mm_projector.bin")


def _show(done: "Merged", as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(done), ensure_ascii=False))
        return
    from llava.tensors.atomic import size_text

    for name, digest in done.sha256.items():
        print(f"{digest}  {name}")
    rate = f"{done.n_bytes / 1e6 / done.seconds:.0f} MB/s"
    files = "1 file" if done.taken_over == 1 else f"{done.taken_over} files"
    more = f", {files} kept from an earlier run" if done.taken_over else ""
    verified = ", verified bit by bit" if done.verified else ""
    size = size_text(done.n_bytes)
    print(
        f"{done.folder}: {counted(done.n_tensors, 'tensor')}, {size} in {done.seconds:.1f} s ({rate}){more}{verified}"
    )
