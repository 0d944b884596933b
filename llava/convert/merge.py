"""Merges a delta or LoRA with its base, using the original code's arithmetic, and writes a llava-format folder."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llava.checkpoint.base_check import check_base_before_download
from llava.checkpoint.consistency import check_headers
from llava.checkpoint.detect import detect, read_files
from llava.checkpoint.open import base_source, open_checkpoint
from llava.config import LoadOptions, projector_depth
from llava.convert.resume import resumable_folder
from llava.errors import CheckpointError
from llava.formats import FORMATS
from llava.formats.clip import OWN_TOWER, OWN_TOWER_NAME, own_tower
from llava.formats.format import TEMPLATE_KEY, Checkpoint, CheckpointFiles, Detection, to_disk
from llava.formats.llava import rules_for
from llava.formats.on_base import described_by_itself
from llava.formats.recorded_base import BASE_KEY
from llava.formats.tokenizer import copy_tokenizer
from llava.tensors.atomic import free_folder
from llava.tensors.files import parsing
from llava.tensors.lazy import Cast, LazyTensor
from llava.tensors.sums import AddDelta, WithLora, WithLoraRounded
from llava.tensors.writer import MAX_SHARD_BYTES, OutputTensor, Progress, no_progress, write_index, write_json
from llava.zoo.bases import advice

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options for merging a delta or LoRA."""

    precise: bool = False  # sum in float32 and round once, unlike the original code
    verify: bool = False  # recompute all tensors and compare them with the written files
    force: bool = False  # tolerate NaN, Inf or a mismatched base
    revision: str | None = None  # branch, tag or commit of the delta or LoRA on the hub
    max_shard_bytes: int = MAX_SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The result of a merge."""

    folder: str
    base: str
    evidence: list[str]  # why the input was detected as a delta or LoRA
    n_tensors: int
    n_bytes: int
    seconds: float
    taken_over: int  # number of shards reused from an earlier, interrupted run
    verified: bool
    sha256: dict[str, str]  # shard name -> checksum


def apply_delta(
    base: str | Path | None,
    target: Path,
    delta: str | Path,
    options: MergeOptions | None = None,
    *,
    progress: Progress = no_progress,
) -> Merged:
    """Adds a delta to its base and writes the result to `target`, like the original `apply_delta.py`: computes sums in
    float16, keeps the tensor names, and takes the config and tokenizer from the delta. Raises CheckpointError.
    """
    return merge("delta", base, target, delta, options or MergeOptions(), progress)


def merge_lora(
    base: str | Path | None,
    target: Path,
    lora: str | Path,
    options: MergeOptions | None = None,
    *,
    progress: Progress = no_progress,
) -> Merged:
    """Writes base + scale * B @ A and the fully fine-tuned weights, like the original `merge_lora_weights.py` on a CPU:
    multiplies B and A, both float16, in float32 and adds the product, rounded to float16, to the base weight. Raises
    CheckpointError.
    """
    return merge("lora", base, target, lora, options or MergeOptions(), progress)


@advice()
def merge(
    format: str, base: str | Path | None, target: Path, path: str | Path, options: MergeOptions, progress: Progress
) -> Merged:
    """Merges the delta or LoRA at `path` with its base and writes float16 shards to `target` (absent or empty).

    base: None selects the recorded base, if it is on this machine.
    Files are written to `target.partial`, from which the same call resumes after an interruption. Only a few chunks are
    in memory at a time, regardless of model size. Raises CheckpointError.
    """
    started = time.perf_counter()
    free_folder(target)
    if base is not None:
        check_base_before_download(base, path, options.revision)
    files = read_files(path, options.revision)
    detection = detect(files)
    if detection.format != format:
        raise CheckpointError(_wrong_format(files, detection, format))
    base_folder = base_source(files, detection, LoadOptions(base=base))
    result = _as_llava(files, base_folder, target, options) or _as_published(files, base_folder, options)
    whole, outputs = result.whole, [replace(out, force=options.force) for out in result.outputs]
    inputs = {
        "base": _file_stats(base_folder),
        format: _file_stats(files.path),
        "precise": options.precise,
        "force": options.force,  # with `force`, shards may contain NaN; runs without `force` must not reuse them
        "max_shard_bytes": options.max_shard_bytes,
    }
    n_bytes = sum(out.n_bytes for out in outputs)
    tower = own_tower(files.path if files.config else base_folder)
    tower_bytes = sum(file.stat().st_size for file in tower.iterdir()) if tower else 0
    with resumable_folder(target, inputs, n_bytes + tower_bytes) as partial:
        taken_over = len(partial.sha256)
        shards = partial.write_shards(outputs, progress, options.max_shard_bytes)
        write_index(partial.folder / INDEX, shards)
        write_json(
            partial.folder / "config.json", result.config | ({"mm_vision_tower": OWN_TOWER_NAME} if tower else {})
        )
        result.write_extra(whole, partial.folder)
        if tower:
            shutil.copytree(tower, partial.folder / OWN_TOWER, dirs_exist_ok=True)
        _check_reopens(partial.folder, whole)
        if options.verify:
            partial.verify(shards, progress)
    return Merged(
        folder=str(target),
        base=str(base or base_folder),
        evidence=detection.evidence,
        n_tensors=len(outputs),
        n_bytes=n_bytes,
        seconds=time.perf_counter() - started,
        taken_over=taken_over,
        verified=options.verify,
        sha256=dict(partial.sha256),
    )


class _Result(NamedTuple):
    """What a merge writes."""

    whole: Checkpoint  # the delta or LoRA on its base
    config: dict[str, Any]  # config.json
    outputs: list[OutputTensor]
    write_extra: Callable[[Checkpoint, Path], None]  # writes the tokenizer and everything else to a folder


def _as_published(files: CheckpointFiles, base: Path, options: MergeOptions) -> _Result:
    """Keeps the config.json of the delta or LoRA, or of a published base, like the original tools."""
    whole = open_checkpoint(files, LoadOptions(base=base, vision=False, force=options.force))
    check_headers(whole)
    _check_projector(whole, files)
    return _Result(whole, _config(whole, files), _outputs(whole, options.precise), _copy_tokenizer)


def _copy_tokenizer(whole: Checkpoint, folder: Path) -> None:
    copy_tokenizer(whole.tokenizer_folder, folder, whole.new_tokens)


def _as_llava(files: CheckpointFiles, base: Path, target: Path, options: MergeOptions) -> _Result | None:
    """Writes a new config.json if a LoRA without one is merged with a native or llava-hf base; returns None otherwise.

    The result has the vocabulary rows and the image processing of the llava format.
    """
    if described_by_itself(files) or detect(read_files(base)).format not in ("native", "llava-hf"):
        return None
    opening = LoadOptions(base=base, image_mode="original", fetch_tower=False, force=options.force)
    whole, llava = open_checkpoint(files, opening), FORMATS["llava"]
    check_headers(whole)
    prepared = llava.prepare(whole)
    tensors, unused = (
        {name: _in_float16(tensor, options.precise) for name, tensor in group.items()}
        for group in (prepared.tensors, prepared.unused)
    )
    config = replace(prepared.config, dtype="float16")
    prepared = replace(prepared, tensors=tensors, unused=unused, config=config)
    return _Result(whole, llava.write_config(prepared), llava.outputs(prepared), llava.write_extra)


def _check_projector(whole: Checkpoint, files: CheckpointFiles) -> None:
    """Checks that the projector is complete if config.json specifies a vision tower. Raises CheckpointError."""
    if not files.config.get("mm_vision_tower"):
        return
    with parsing(files.config_file):
        type = str(files.config.get("mm_projector_type") or "linear")
        depth = projector_depth(type)
    for i in range(depth):
        for param in ("weight", "bias"):
            if (name := f"projector.{2 * i}.{param}") not in whole.unused:
                raise CheckpointError(
                    f"{files.path}: config.json specifies a vision tower and a projector of type {type}, but "
                    f"{name} is missing; download the {whole.format} again; a LoRA also needs non_lora_trainables.bin"
                )


def _wrong_format(files: CheckpointFiles, detection: Detection, format: str) -> str:
    command = {"delta": "llava apply-delta", "lora": "llava merge-lora"}.get(detection.format)
    known = FORMATS.get(detection.format)
    whole = known is not None and known.reads and not known.needs_base
    advice = "it is a whole model and does not need merging" if whole else f"pass a {format} folder"
    hint = f"use {command}" if command else advice
    return f"{files.path}: has format {detection.format} ({detection.evidence[0]}), not {format}; {hint}"


def _outputs(whole: Checkpoint, precise: bool) -> list[OutputTensor]:
    """Returns all tensors in float16 under their original names, including those outside the language model."""
    tensors = {name: _in_float16(tensor, precise) for name, tensor in (whole.tensors | whole.unused).items()}
    linear = "projector.0.weight" in tensors and "projector.2.weight" not in tensors
    return to_disk(tensors, whole.config, rules_for(whole.config, linear=linear))


def _in_float16(tensor: LazyTensor, precise: bool) -> LazyTensor:
    if isinstance(tensor, AddDelta):
        tensor = replace(tensor, to=torch.float32 if precise else torch.float16)
    elif isinstance(tensor, WithLora) and not precise:
        tensor = WithLoraRounded(tensor.base, tensor.pairs, torch.float16)
    return Cast(tensor, torch.float16)


def _config(whole: Checkpoint, files: CheckpointFiles) -> dict[str, Any]:
    """Returns the merged config.json, based on that of the delta or LoRA, or else the base."""
    config = files.config if described_by_itself(files) else whole.source_config
    changes: dict[str, Any] = {"torch_dtype": "float16"}
    if whole.format == "lora":
        changes["vocab_size"] = whole.config.decoder.vocab_size
        if whole.config.template and config.get("mm_vision_tower"):
            changes[TEMPLATE_KEY] = whole.config.template
    return {key: value for key, value in config.items() if key != BASE_KEY} | changes


def _check_reopens(folder: Path, whole: Checkpoint) -> None:
    """Checks that the result opens as a whole model with the same template. Raises CheckpointError."""
    again = open_checkpoint(folder, LoadOptions(vision=False))
    check_headers(again)
    if FORMATS[again.format].needs_base or again.config.template != whole.config.template:
        raise CheckpointError(
            f"{folder}: the result has format {again.format} and template {again.config.template}; expected a whole "
            f"model with template {whole.config.template}; pass the base that the {whole.format} was made for"
        )


def _file_stats(folder: Path) -> dict[str, list[int]]:
    """Returns the size and modification time of each file, so that a later run can detect changed inputs."""
    stats = {file.name: file.stat() for file in sorted(folder.iterdir()) if file.is_file()}
    return {str(folder.resolve()): [], **{name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}
