"""Finds the recorded base model of a LoRA, projector or delta, and checks the base passed by the user.

Only names recorded inside files count as evidence; folder names and hub ids passed by the user do not.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava.config import DecoderConfig
from llava.errors import CheckpointError, MissingBaseError
from llava.formats.added_rows import without_added_rows
from llava.formats.format import Checkpoint, CheckpointFiles, Detection, Format
from llava.formats.native import VERSION_KEY
from llava.formats.recorded_base import (
    find_recorded_base,
    has_recorded_values,
    recorded_names,
    warn_about_other_values,
)

log = logging.getLogger(__name__)

RAW_LLAMA = "the raw LLaMA-1 that the delta was computed against (not Vicuna, not Llama 2)"


class NeededBase(NamedTuple):
    """The base model that a checkpoint needs: its name (several names if the size is unknown) and the evidence."""

    names: list[str]
    evidence: str

    def __str__(self) -> str:
        return " or ".join(self.names) or "the language model that it was trained from"

    def describe(self, format: str) -> str:
        """Describes the base for an error message about a checkpoint of this format."""
        if format == "delta":
            return f"{RAW_LLAMA}, such as {self if self.names else 'huggyllama/llama-7b'}"
        return str(self)


class BaseModelError(CheckpointError):
    """The base model does not match the checkpoint.

    `render` builds the message from a `NeededBase`; `needed` defaults to the base recorded in the files.
    `zoo.bases.advice` raises the error again with the base from the catalogue.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        detection: Detection,
        render: Callable[[NeededBase], str],
        needed: NeededBase | None = None,
    ):
        super().__init__(render(needed or recorded_base(files, detection.format)))
        self.files, self.detection, self.render = files, detection, render

    def naming(self, needed: NeededBase) -> CheckpointError:
        """Returns the same error with another needed base."""
        return BaseModelError(self.files, self.detection, self.render, needed)


class NoBaseError(MissingBaseError):
    """The base model is neither given nor recorded and on this machine. See `BaseModelError`."""

    def __init__(self, files: CheckpointFiles, detection: Detection, needed: NeededBase | None = None):
        self.files, self.detection = files, detection
        needed = needed or recorded_base(files, detection.format)
        format = detection.format
        super().__init__(
            f"{files.path}: detected format {format} ({detection.evidence[0]}), which needs its base, "
            f"{needed.describe(format)} ({needed.evidence})",
            str(files.path),
            *_example(needed),
        )

    def naming(self, needed: NeededBase) -> CheckpointError:
        return NoBaseError(self.files, self.detection, needed)


def _example(needed: NeededBase) -> tuple[str, str]:
    """Returns a base to pass, and the command that creates it or ""."""
    example = needed.names[0] if needed.names else "FOLDER_OR_HUB_ID"
    if _is_path(example):  # of another machine, or moved since; passing it again would not help
        return "BASE", ""
    if not example.endswith("-delta-v0"):
        return example, ""
    whole = example.split("/")[-1].replace("-delta", "")  # Vicuna v0 was published only as a delta
    raw = f"huggyllama/llama-{'13b' if '13b' in whole else '7b'}"
    return whole, f"llava apply-delta --base {raw} --target {whole} --delta {example}"


def recorded_base(files: CheckpointFiles, format: str) -> NeededBase:
    """Returns the base model recorded in the checkpoint's files; `names` is empty if none is recorded."""
    for name, where, _ in recorded_names(files, format):
        return named_base(name, where)
    return NeededBase([], "its files do not say which")


def named_base(name: str, where: str, hub_id: str | None = None) -> NeededBase:
    """Returns the base with a name that is recorded in `where`. hub_id: what the catalogue calls it."""
    lost = ", a folder that does not exist" if _is_path(name) and not Path(name).exists() else ""
    return NeededBase([hub_id or name], f"{where} = {name}{lost}")


def _is_path(name: str) -> bool:
    """Returns whether a name can only be a folder: a hub id has one "/" at most."""
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1


def comparable_name(name: str) -> str:
    """Normalizes a recorded name for comparison.

    Takes the last path component (in a hub cache path, the repository name), converts it to lower case, replaces each
    run of `-`, `.` and `_` with `-`, and removes the suffix `-hf`.
    """
    parts = [part for part in re.split(r"[/\\]", name.lower()) if part not in ("", ".")]
    for part in parts:
        if part.startswith("models--"):
            parts = [part.split("--")[-1]]
            break
    last = re.sub(r"[-._]+", "-", parts[-1]) if parts else ""
    return last.removesuffix("-hf")


# ------------------------------------------------------------------------------------------------------------ checks


def check_base_format(
    base: CheckpointFiles, format: str, known: Format | None, files: CheckpointFiles, detection: Detection
) -> None:
    """Raises BaseModelError if the format or architecture of `base` rules it out as the base of `files`."""
    is_llava = detection.format == "delta" and format == "llava-hf"
    if known is None or not known.reads or known.needs_base or is_llava:
        why = "a LLaVA" if is_llava else "not a language model by itself"
        raise BaseModelError(
            files,
            detection,
            lambda needed: (
                f"{base.path}: has format {format}, which cannot be the base of a {detection.format} checkpoint "
                f"({why}); pass {needed.describe(detection.format)} as base= (--base)"
            ),
        )
    has, asked = _architecture(base.config or known.published_config(base)), _architecture(files.config)
    if has and asked and has != asked:
        raise wrong_base(base.path, f"has architecture {has}, but {files.path} requires {asked}", files, detection)


def wrong_base(base: Path, mismatch: str, files: CheckpointFiles, detection: Detection) -> BaseModelError:
    """Returns the error to raise when the base passed by the user does not match the checkpoint."""

    def render(needed: NeededBase) -> str:
        format = detection.format
        return f"{base}: {mismatch}, so it is not the base of this {format}; pass {needed.describe(format)}"

    return BaseModelError(files, detection, render)


def _architecture(config: Mapping[str, Any]) -> str | None:
    """Returns "llama" or "mpt", or None if the config does not determine the architecture."""
    if VERSION_KEY in config:
        return (config.get("decoder") or {}).get("kind")
    keys = {"d_model": "mpt", "hidden_size": "llama", "num_hidden_layers": "llama"}
    return next((kind for key, kind in keys.items() if key in config), None)


def check_heads(has: DecoderConfig, asked: DecoderConfig, base: Path, who: str, wrong: str) -> None:
    """Raises CheckpointError if the head counts or head_dim differ, a mismatch that tensor shapes may not reveal."""
    for name in ("n_heads", "n_kv_heads", "head_dim"):
        one, other = getattr(has, name), getattr(asked, name)
        if one != other:
            raise CheckpointError(f"{base}: {name} is {one}, but {who} {other}, so it is {wrong}")


def check_vocabulary(base: Checkpoint, result: int, files: CheckpointFiles, wrong: str, force: bool) -> None:
    """Checks `vocab_size` in config.json against the row counts of the base and of the combined model (`result`).

    The rows that llava-hf adds to a base may be counted or not. If no count matches, raises CheckpointError, or logs a
    warning if `force` is true.
    """
    stated, rows = files.config.get("vocab_size"), base.config.decoder.vocab_size
    plain = without_added_rows(base).config.decoder.vocab_size
    if isinstance(stated, int) and stated not in (rows, plain, result):
        refuse_or_warn(f"{wrong}: it has {rows} vocabulary rows, but {files.path} specifies {stated}", force)


def check_raw(base: Checkpoint, asked: DecoderConfig, force: bool) -> None:
    """Checks that the base of a delta is a raw LLaMA-1 model. With a fine-tuned base, the result would be garbage.

    asked: the delta's config. If the check fails, raises CheckpointError, or logs a warning if `force` is true.
    """
    if evidence := [*_signs_of_training(base), *_signs_of_llama_2(base.config.decoder, asked)]:
        refuse_or_warn(
            f"{base.path}: is not {RAW_LLAMA}: {'; '.join(evidence)}; pass the raw LLaMA-1, such as "
            "huggyllama/llama-7b or huggyllama/llama-13b, as base= (--base)",
            force,
        )


def _signs_of_training(base: Checkpoint) -> Iterator[str]:
    """Yields evidence that the base is a Vicuna, Llama 2 or LLaVA model."""
    config = base.source_config
    name = str(config.get("_name_or_path") or "")
    if any(word in comparable_name(name) for word in ("vicuna", "llama-2", "llama2", "llava")):
        yield f"config.json: _name_or_path = {name}"
    if base.format == "llava" or config.get("mm_vision_tower") or config.get("vision"):
        yield "config.json describes a LLaVA model"


def _signs_of_llama_2(sizes: DecoderConfig, asked: DecoderConfig) -> Iterator[str]:
    """Yields evidence that the base is a Llama 2 model: typical config values that differ from the delta's."""
    if 4096 <= sizes.max_seq != asked.max_seq:
        yield f"config.json: {sizes.max_seq} positions (the delta has {asked.max_seq}, like LLaMA-1)"
    if sizes.eps == 1e-5 != asked.eps:
        yield f"config.json: rms_norm_eps = 1e-05 (the delta has {asked.eps}, like LLaMA-1)"


def refuse_or_warn(text: str, force: bool) -> None:
    """Raises CheckpointError, or logs a warning if `force` is true."""
    if not force:
        raise CheckpointError(f"{text}; pass force=True (--force) to continue anyway")
    log.warning("%s", text)


def warn_if_recorded_otherwise(files: CheckpointFiles, format: str, base: Checkpoint, found: CheckpointFiles) -> None:
    """Warns if a base differs from the one recorded in a LoRA, projector or delta, by the evidence that there is.

    These are values of the base's tensors or, if none were recorded, names and the config's numbers. found: the files
    of `base`.
    """
    if has_recorded_values(files):
        warn_about_other_values(files, base)
    elif (
        format != "delta"
        and not _is_recorded(files, format, found)
        and (evidence := _other_base(files, format, base, found))
    ):
        log.warning("%s: %s; answers are worse with a different base", files.path, evidence)


def _is_recorded(files: CheckpointFiles, format: str, base: CheckpointFiles) -> bool:
    """Whether the base is the folder that is recorded. Its own config names its parent, if it was fine-tuned itself."""
    recorded = find_recorded_base(files, format)
    return recorded is not None and recorded.folder.resolve() == base.path.resolve()


def _other_base(files: CheckpointFiles, format: str, base: Checkpoint, found: CheckpointFiles) -> str | None:
    """Returns evidence that the base is not the recorded one: its name or, if either has none, its config."""
    name, where, _ = next(recorded_names(files, format), ("", "", None))
    cached = next((part for part in found.path.parts if part.startswith("models--")), "")  # in the hub's cache
    # a LLaVA's own config names the model that it was trained from
    named = "" if base.source_config.get("mm_vision_tower") else str(found.config.get("_name_or_path") or "")
    own = "/".join(cached.split("--")[1:]) or named
    if not name or not own:
        return _other_numbers(files, base)
    if comparable_name(own) == comparable_name(name):
        return None
    evidence = f"the base is {own}" if cached else f"config.json of the base {found.path} has _name_or_path = {own}"
    return f"{where} = {name}, but {evidence}"


def _other_numbers(files: CheckpointFiles, base: Checkpoint) -> str | None:
    """Compares numbers that differ between versions of a model of the same size, such as Vicuna 1.3 and 1.5."""
    decoder = base.config.decoder
    for key, value in (("rms_norm_eps", decoder.eps), ("rope_theta", decoder.rope_theta)):
        stated = files.config.get(key)
        if decoder.kind == "llama" and isinstance(stated, int | float) and stated != value:
            return f"config.json has {key} = {stated}, but the base {base.path} has {value}"
    return None
