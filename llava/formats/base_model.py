"""The base of a LoRA, a projector or a delta: the names that files record, and whether the given one can be it.

Names recorded inside files are evidence. The names of folders, and the hub ids that a user gives, never are.
"""

import logging
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from llava.config import DecoderConfig
from llava.errors import CheckpointError
from llava.formats.format import Checkpoint, CheckpointFiles, Detection
from llava.formats.native import VERSION_KEY
from llava.tensors.files import read_json_if_present

log = logging.getLogger(__name__)

RAW_LLAMA = "the raw LLaMA-1 that the difference was taken to (not Vicuna, not Llama 2)"


class NeededBase(NamedTuple):
    """The base of a checkpoint: names (several if the files do not show the size), and how they are known."""

    names: list[str]
    evidence: str

    def __str__(self) -> str:
        return " or ".join(self.names) or "the language model that it was trained from"

    def describe(self, format: str) -> str:
        """For error messages about a checkpoint of this format."""
        if format == "delta":
            return f"{RAW_LLAMA}, such as {self if self.names else 'huggyllama/llama-7b'}"
        return str(self)


class BaseModelError(CheckpointError):
    """A base is missing or cannot be the right one.

    `render` writes the message about a `NeededBase`, by default the one that the files name. `zoo.bases.advice` raises
    the error again with the base that the catalogue knows.
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


def recorded_names(files: CheckpointFiles, format: str) -> Iterator[tuple[str, str]]:
    """Names of the base in the files, the most reliable first, each with its file and key.

    The config of a delta or a whole model records its own name under the same key: not a base.
    """
    adapter = read_json_if_present(files.path / "adapter_config.json") if format == "lora" else {}
    if named := adapter.get("base_model_name_or_path"):
        yield str(named), "adapter_config.json: base_model_name_or_path"
    if format in ("lora", "projector") and (named := files.config.get("_name_or_path")):
        yield str(named), "config.json: _name_or_path"


def recorded_base(files: CheckpointFiles, format: str) -> NeededBase:
    """The base as far as the files name it."""
    for name, where in recorded_names(files, format):
        return NeededBase([name], f"{where} = {name}")
    return NeededBase([], "its files do not say which")


def comparable_name(name: str) -> str:
    """A recorded name reduced to its last component, ignoring case, `-`, `.`, `_` and the path of a hub cache."""
    parts = [part for part in re.split(r"[/\\]", name.lower()) if part not in ("", ".")]
    for part in parts:
        if part.startswith("models--"):
            parts = [part.split("--")[-1]]
            break
    last = re.sub(r"[-._]+", "-", parts[-1]) if parts else ""
    return last.removesuffix("-hf")


# ------------------------------------------------------------------------------------------------------------ checks


def missing_base(files: CheckpointFiles, detection: Detection) -> BaseModelError:
    """The error if a base is needed and none was given."""

    def render(needed: NeededBase) -> str:
        example, first = needed.names[0] if needed.names else "FOLDER_OR_HUB_ID", ""
        if example.endswith("-delta-v0"):  # Vicuna v0 was published as a delta only
            whole = example.split("/")[-1].replace("-delta", "")
            raw = f"huggyllama/llama-{'13b' if '13b' in whole else '7b'}"
            first = (
                f"; it was published as a delta only: llava apply-delta --base {raw} --target {whole} --delta {example}"
            )
            example = whole
        return (
            f"{files.path}: {detection.format} ({detection.evidence[0]}): needs its base, "
            f"{needed.describe(detection.format)} ({needed.evidence}); name its folder or hub id with base= (--base): "
            f"llava ask IMAGE QUESTION --model {shlex.quote(str(files.path))} --base {example}{first}"
        )

    return BaseModelError(files, detection, render)


def check_base_format(
    base: CheckpointFiles, format: str, usable: bool, files: CheckpointFiles, detection: Detection
) -> None:
    """The base is a language model of the same architecture. Raises BaseModelError."""
    if not usable or format == "llava-hf":
        why = "not a language model by itself"
        if format == "llava-hf":
            why = (
                "a re-export for transformers, with added vocabulary rows; give the original base, or convert it: "
                "llava convert FOLDER OUT --to llama"
            )
        raise BaseModelError(
            files,
            detection,
            lambda needed: (
                f"{base.path}: has format {format}, which cannot be the base of a {detection.format} ({why}); "
                f"base= is {needed.describe(detection.format)}"
            ),
        )
    has, asked = _architecture(base), _architecture(files)
    if has and asked and has != asked:
        raise wrong_base(base.path, f"has architecture {has}, {files.path} is for {asked}", files, detection)


def wrong_base(base: Path, mismatch: str, files: CheckpointFiles, detection: Detection) -> BaseModelError:
    """The error if a base has other sizes than the checkpoint asks for."""

    def render(needed: NeededBase) -> str:
        format = detection.format
        return f"{base}: {mismatch}: not the base of this {format}, which is {needed.describe(format)}"

    return BaseModelError(files, detection, render)


def _architecture(files: CheckpointFiles) -> str | None:
    """llama or mpt; None if config.json does not show it."""
    if VERSION_KEY in files.config:
        return (files.config.get("decoder") or {}).get("kind")
    keys = {"d_model": "mpt", "hidden_size": "llama", "num_hidden_layers": "llama"}
    return next((kind for key, kind in keys.items() if key in files.config), None)


def check_heads(has: DecoderConfig, asked: DecoderConfig, base: Path, who: str, wrong: str) -> None:
    """Compares the sizes that no tensor's shape shows. Raises CheckpointError."""
    for name in ("n_heads", "n_kv_heads", "head_dim"):
        one, other = getattr(has, name), getattr(asked, name)
        if one != other:
            raise CheckpointError(f"{base}: {name} is {one}, {who} {other}: {wrong}")


def check_vocabulary(rows: int, result: int, files: CheckpointFiles, wrong: str, force: bool) -> None:
    """The base has as many rows as config.json states, or the checkpoint brings the others. Raises CheckpointError."""
    stated = files.config.get("vocab_size")
    if isinstance(stated, int) and stated not in (rows, result):
        refuse_or_warn(f"{wrong}: it has a vocabulary of {rows}, {files.path} states {stated}", force)


def check_raw(base: Checkpoint, asked: DecoderConfig, force: bool) -> None:
    """The base of a delta is the raw LLaMA-1: added to a trained model, the sum is garbage.

    asked: the delta's sizes. Raises CheckpointError.
    """
    if evidence := [*_signs_of_training(base), *_signs_of_llama_2(base.config.decoder, asked)]:
        refuse_or_warn(
            f"{base.path}: is not {RAW_LLAMA}: {'; '.join(evidence)}; give the raw LLaMA-1, such as "
            "huggyllama/llama-7b or huggyllama/llama-13b, as base= (--base)",
            force,
        )


def _signs_of_training(base: Checkpoint) -> Iterator[str]:
    """Signs of a Vicuna, a Llama 2 or a LLaVA."""
    config = base.source_config
    name = str(config.get("_name_or_path") or "")
    if any(word in comparable_name(name) for word in ("vicuna", "llama-2", "llama2", "llava")):
        yield f"config.json: _name_or_path = {name}"
    if base.format == "llava" or config.get("mm_vision_tower") or config.get("vision"):
        yield "config.json describes a LLaVA"


def _signs_of_llama_2(sizes: DecoderConfig, asked: DecoderConfig) -> Iterator[str]:
    """Numbers of Llama 2 that the delta, which keeps its base's, does not have."""
    if 4096 <= sizes.max_seq != asked.max_seq:
        yield f"config.json: {sizes.max_seq} positions (the delta: {asked.max_seq}, as LLaMA-1)"
    if sizes.eps == 1e-5 != asked.eps:
        yield f"config.json: rms_norm_eps = 1e-05 (the delta: {asked.eps}, as LLaMA-1)"


def refuse_or_warn(text: str, force: bool) -> None:
    """Raises CheckpointError, or with `force` logs a warning."""
    if not force:
        raise CheckpointError(f"{text}; force=True (--force) continues anyway")
    log.warning("%s", text)


def warn_if_recorded_otherwise(files: CheckpointFiles, format: str, base: CheckpointFiles) -> None:
    """Warns if a LoRA or projector records another base than the given one records of itself."""
    own = str(base.config.get("_name_or_path") or "")
    name, where = next(recorded_names(files, format), ("", ""))
    if name and own and comparable_name(own) != comparable_name(name):
        log.warning(
            f"{files.path}: {where} = {name}, but the base, {base.path}, records config.json: _name_or_path = "
            f"{own}; with another base the answers are worse"
        )
