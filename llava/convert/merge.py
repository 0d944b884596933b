"""A delta or a LoRA and its base as one folder in the original's layout: streamed, with the original's arithmetic."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava.checkpoint.detect import FORMAT_KEY, TEMPLATE_KEY, Facts, Finding, detect
from llava.checkpoint.files import locate, reading
from llava.checkpoint.open import SUPPORTED, Checkpoint, check_headers, look, open_checkpoint
from llava.checkpoint.source import Source, Typed
from llava.checkpoint.sums import Adapted, AdaptedIn, Summed
from llava.checkpoint.write import MAX_SHARD_BYTES, Item, Progress, silent, write_index, write_json
from llava.checkpoint.write import free_folder as check_free
from llava.convert import llama
from llava.convert.original import rules_of
from llava.convert.partial import growing
from llava.convert.tokenizer import copy_tokenizer
from llava.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What was written."""

    folder: str
    base: str
    evidence: list[str]  # what shows what the folder that was put on the base is
    n_tensors: int
    n_bytes: int
    seconds: float
    taken_over: int  # shards that an earlier, killed run had left whole
    verified: bool
    sha256: dict[str, str]  # of the shards


def apply_delta(base: str | Path, target: Path, delta: str | Path, **options: Any) -> Merged:
    """base + delta, as the original's tool of this name: sums in float16, names unchanged, the delta's config and
    tokenizer. Options as for `merge`. Raises CheckpointError.
    """
    return merge("delta", base, target, delta, **options)


def merge_lora(base: str | Path, target: Path, lora: str | Path, **options: Any) -> Merged:
    """base + scale * B @ A and what was trained besides, as the original's `merge_lora_weights.py` on a CPU: factors
    in float16, their product in float32 and rounded, then the sum. Options as for `merge`. Raises CheckpointError.
    """
    return merge("lora", base, target, lora, **options)


def merge(
    kind: str,
    base: str | Path,
    target: Path,
    path: str | Path,
    *,
    precise: bool = False,
    verify: bool = False,
    force: bool = False,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> Merged:
    """A folder of `kind` on its base, written into `target` (absent or empty) in float16 shards with an index.

    Work goes to `target.partial`, which the same call goes on with after a kill. `precise`: sums in float32, rounded
    once. `verify`: everything is made anew and compared with the files. `force`: in spite of unknown tensors, NaN, Inf
    and a doubtful base. Memory: some pieces of 2^24 values, whatever the size. Raises CheckpointError.
    """
    started = time.perf_counter()
    check_free(target)
    facts = look(path, revision)
    finding = detect(facts)
    if finding.kind != kind:
        raise CheckpointError(_other_kind(facts, finding, kind))
    under = locate(base, what="base")
    found = open_checkpoint(facts, base=under, vision=False, lenient=force)
    check_headers(found)
    _check_projector(found, facts)
    settings = _settings(found, facts, under)
    written = [replace(item, force=force) for item in _items(found, precise)]
    order = {
        "base": _files(under),
        kind: _files(facts.folder),
        "precise": precise,
        "force": force,  # what was written with it may hold NaN
        "max_shard_bytes": max_shard_bytes,
    }
    with growing(target, order, sum(item.n_bytes for item in written)) as partial:
        taken_over = len(partial.sha256)
        shards = partial.write_shards(written, progress, max_shard_bytes)
        write_index(partial.folder / INDEX, shards)
        write_json(partial.folder / "config.json", settings)
        copy_tokenizer(found.tokenizer_folder, partial.folder, found.new_tokens)
        _check_reopens(partial.folder, found)
        if verify:
            partial.verify(shards, progress)
    return Merged(
        folder=str(target),
        base=str(base),
        evidence=finding.evidence,
        n_tensors=len(written),
        n_bytes=sum(item.n_bytes for item in written),
        seconds=time.perf_counter() - started,
        taken_over=taken_over,
        verified=verify,
        sha256=dict(partial.sha256),
    )


def _check_projector(found: Checkpoint, facts: Facts) -> None:
    """Where config.json names a tower, all of the projector is there. Raises CheckpointError."""
    if not facts.settings.get("mm_vision_tower"):
        return
    with reading(facts.folder / "config.json"):
        kind = str(facts.settings.get("mm_projector_type") or "linear")
        depth = {"linear": 1, "identity": 0}.get(kind) or int("".join(re.findall(r"mlp(\d+)x", kind)) or 0)
    for i in range(depth):
        for part in ("weight", "bias"):
            if (name := f"projector.{2 * i}.{part}") not in found.spare:
                raise CheckpointError(
                    f"{facts.folder}: config.json names a vision tower and a projector of kind {kind}, but the files "
                    f"hold no {name} of it; fetch the {found.kind} again, of a LoRA non_lora_trainables.bin too"
                )


def _other_kind(facts: Facts, finding: Finding, kind: str) -> str:
    other = {"delta": "llava apply-delta", "lora": "llava merge-lora"}.get(finding.kind)
    as_it_is = "it needs no merging, it loads as it is" if finding.kind in SUPPORTED else f"name the folder of a {kind}"
    hint = f"use {other}" if other else as_it_is
    return f"{facts.folder}: is no {kind} but {finding.kind} ({finding.evidence[0]}); {hint}"


def _items(found: Checkpoint, precise: bool) -> list[Item]:
    """Every tensor under its original name, in float16; what this model itself does not read too."""
    sources = {name: _in_half(source, precise) for name, source in (found.sources | found.spare).items()}
    linear = "projector.0.weight" in sources and "projector.2.weight" not in sources
    return llama.taken_apart(sources, found.config, rules_of(found.config, linear=linear))


def _in_half(source: Source, precise: bool) -> Source:
    if isinstance(source, Summed):
        source = replace(source, kind=torch.float32 if precise else torch.float16)
    elif isinstance(source, Adapted) and not precise:
        source = AdaptedIn(source.base, source.adapters, torch.float16)
    return Typed(source, torch.float16)


def _settings(found: Checkpoint, facts: Facts, base: Path) -> dict[str, Any]:
    """config.json of the folder that was put on; of peft's own, which bring none, the base's. May raise."""
    settings: Mapping[str, Any] = facts.settings or look(base).settings
    if FORMAT_KEY in settings:  # ours: nothing that others read
        if settings.get("vision") or found.config.decoder.kind != "llama":
            raise CheckpointError(
                f"{facts.folder}: brings no config.json, and that of {base} is native; convert the base first: "
                f"llava convert {base} OUT --to original"
            )
        settings = llama.settings(found.config, found.tokenizer)
    changed: dict[str, Any] = {"torch_dtype": "float16"}
    if found.kind == "lora":
        changed["vocab_size"] = found.config.decoder.vocab_size
        if found.config.template and settings.get("mm_vision_tower"):
            changed[TEMPLATE_KEY] = found.config.template
    return {**settings, **changed}


def _check_reopens(folder: Path, found: Checkpoint) -> None:
    """What was written is a model by itself, with the same template. Raises CheckpointError."""
    again = open_checkpoint(folder, vision=False)
    check_headers(again)
    if again.kind in ("delta", "lora") or again.config.template != found.config.template:
        raise CheckpointError(
            f"{folder}: the sum is of kind {again.kind} with template {again.config.template}, not a model of template "
            f"{found.config.template}: the base is not the one that the difference was taken to"
        )


def _files(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of each file: whether a later run has the same inputs."""
    found = {file.name: file.stat() for file in sorted(folder.iterdir()) if file.is_file()}
    return {str(folder.resolve()): [], **{name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}}
