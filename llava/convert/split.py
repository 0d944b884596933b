"""Extracts the delta between a model and its base, or the projector of a model."""

import logging
import shlex
from dataclasses import replace
from pathlib import Path

from llava.checkpoint.consistency import check_headers
from llava.checkpoint.detect import detect, read_files
from llava.checkpoint.open import base_source, open_checkpoint
from llava.config import LoadOptions
from llava.errors import CheckpointError
from llava.formats.delta import write_delta
from llava.formats.format import Checkpoint
from llava.formats.llava import FileType, tower_name, write_own_tower
from llava.formats.projector import write_projector
from llava.formats.recorded_base import base_record
from llava.tensors.hub import absolute_if_local
from llava.tensors.writer import Progress, no_progress
from llava.zoo.bases import advice

log = logging.getLogger(__name__)


@advice()
def make_delta(
    model: str | Path,
    base: str | Path,
    folder: Path,
    *,
    file_type: FileType = "safetensors",
    progress: Progress = no_progress,
) -> None:
    """Writes `model` - `base` as a delta; see `formats.delta.write_delta`. Raises CheckpointError."""
    options = LoadOptions(vision=False)
    under = open_checkpoint(base, options)  # first: the model may have to be downloaded
    whole = open_checkpoint(model, options)
    write_delta(folder, whole, under, base_name=absolute_if_local(base), file_type=file_type, progress=progress)


@advice()
def extract_projector(source: str | Path, folder: Path, options: LoadOptions | None = None) -> int:
    """Writes the projector of any LLaVA model and records that model as the base. Returns the number of tensors.

    The projector of a LoRA or delta belongs to the merged model, which has no name, so only its values are recorded.
    The embeddings of <im_start> and <im_end> are included if the model uses them. A vision tower stored in the
    checkpoint is also written, since it may be fine-tuned. Raises CheckpointError, ConfigError.
    """
    options = replace(options or LoadOptions(), image_mode="original", fetch_tower=False)
    found = open_checkpoint(source, options)
    config = found.config
    projector = {
        name: tensor for name, tensor in found.tensors.items() if name.startswith("projector.") or name == "newline"
    }
    if config.vision is None or not projector:
        raise CheckpointError(f"{found.path}: has format {found.format} ({found.evidence[0]}) but no projector")
    check_headers(replace(found, missing=tuple(name for name in found.missing if not name.startswith("vision."))))
    rows = None
    if config.start_end:
        start = found.tokenizer.id_of("<im_start>")
        if found.new_tokens or start is None:
            raise CheckpointError(
                f"{found.path}: the tokenizer files do not contain <im_start>; convert the checkpoint with its base, "
                f"then extract the projector from the result: {_conversion(source, options)}"
            )
        rows = found.tensors["decoder.embed.weight"].rows(start, start + 2)
    base = None if found.format in ("lora", "delta") else absolute_if_local(_base_of(found, source, options))
    write_projector(
        folder,
        config,
        {name: tensor.read() for name, tensor in projector.items()},
        vision_tower=tower_name(found, separate=True) or "",
        base=base,
        recorded=base_record(base, found.tensors),
        start_end=rows,
        tokenizer_from=found.tokenizer_folder if config.start_end else None,
        write_extra=lambda partial: write_own_tower(found, partial, separate=True),
    )
    if found.format in ("lora", "delta"):
        log.warning(
            "%s: its base is %s merged into one model; to write that model, run: %s",
            folder, source, _conversion(source, options),
        )  # fmt: skip
    return len(projector) + (rows is not None)


def _conversion(source: str | Path, options: LoadOptions) -> str:
    """Returns the command that combines a LoRA or delta with its base."""
    return shlex.join(["llava", "convert", str(source), "OUT", "--to", "llava", "--base", str(options.base or "BASE")])


def _base_of(found: Checkpoint, source: str | Path, options: LoadOptions) -> str | Path:
    """Returns the language model to which the extracted projector belongs."""
    if found.format != "projector":
        return source
    if options.base is not None:
        return options.base
    files = read_files(source, options.revision)
    return base_source(files, detect(files), options)
