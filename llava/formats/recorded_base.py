"""The base that a LoRA, projector or delta records: its name, and values of a few of its tensors to recognise it by."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llava.errors import CheckpointError
from llava.formats.format import Checkpoint, CheckpointFiles, section
from llava.tensors.files import parsing, read_json_if_present
from llava.tensors.hub import find_local
from llava.tensors.lazy import LazyTensor

log = logging.getLogger(__name__)

BASE_KEY = "llava_base"  # our own key in config.json: {"name": …, "values": {tensor name: [values]}}
_SAMPLED = r"decoder\.(norm|blocks\.\d+\.(attn\.qkv|mlp\.down))\.weight"
_N_VALUES = 16  # per tensor
_TOLERANCE = 2.0**-8  # relative; covers one rounding to bfloat16, because the base may be stored in another dtype


class RecordedName(NamedTuple):
    """A recorded name of the base: a folder or hub id."""

    name: str
    where: str  # the file and key that contain it
    revision: str | None = None  # on the hub


def recorded_names(files: CheckpointFiles, format: str) -> Iterator[RecordedName]:
    """Yields the base names recorded in the files, most reliable first.

    In a delta or a whole model, `_name_or_path` is the model's own name, so it is not read.
    """
    try:
        adapter = read_json_if_present(files.path / "adapter_config.json") if format == "lora" else {}
    except CheckpointError:  # the error is reported when the LoRA is opened
        adapter = {}
    if named := adapter.get("base_model_name_or_path"):
        revision = adapter.get("revision")
        yield RecordedName(
            str(named), "adapter_config.json: base_model_name_or_path", str(revision) if revision else None
        )
    if format in ("lora", "projector") and (named := files.config.get("_name_or_path")):
        yield RecordedName(str(named), "config.json: _name_or_path")
    recorded = files.config.get(BASE_KEY)
    if isinstance(recorded, Mapping) and (named := recorded.get("name")):
        yield RecordedName(str(named), f"config.json: {BASE_KEY}")


class FoundBase(NamedTuple):
    """A recorded base that is on this machine."""

    folder: Path
    name: str
    where: str  # the file and key that record the name


def find_recorded_base(files: CheckpointFiles, format: str) -> FoundBase | None:
    """Returns the recorded base if it is a local folder or in the hub's cache, else None. Downloads nothing.

    A relative path is looked up in the checkpoint's folder, then in the working directory.
    """
    folder = files.path.parent if files.path.is_file() else files.path
    for name, where, revision in recorded_names(files, format):
        found = find_local(name, folder, revision=revision)
        if found is not None and found.resolve() != folder.resolve():
            return FoundBase(found, name, where)
    return None


def base_record(name: str | None, tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """Returns the key to add to config.json of a LoRA, projector or delta.

    name: folder or hub id of the base, if it is a checkpoint by itself. tensors: the base's, under our names.
    """
    values = {ours: _sample(tensors[ours]) for ours in _sampled(tensors)}
    return {BASE_KEY: {**({"name": name} if name else {}), "values": values}}


def has_recorded_values(files: CheckpointFiles) -> bool:
    return bool(_recorded_values(files))


def warn_about_other_values(files: CheckpointFiles, base: Checkpoint) -> None:
    """Logs a warning if the values recorded in config.json are not those of the base."""
    for ours, recorded in _recorded_values(files).items():
        if ours not in base.tensors or not _equal(recorded, base.tensors[ours]):
            log.warning(
                "%s: config.json records other values of %s than the base %s has, so it was made with another base; "
                "answers are worse with a different base",
                files.path,
                ours,
                base.path,
            )
            return


def _recorded_values(files: CheckpointFiles) -> dict[str, list[float]]:
    with parsing(files.config_file):
        values = section(section(files.config, BASE_KEY, files.config_file), "values", files.config_file)
        return {str(ours): [float(value) for value in some] for ours, some in values.items()}


def _sampled(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Returns the names of the final norm and of two matrices in the first and the last block."""
    names = [ours for ours in tensors if re.fullmatch(_SAMPLED, ours)]
    blocks = sorted({int(ours.split(".")[2]) for ours in names if ".blocks." in ours})
    kept = {f"decoder.blocks.{i}." for i in (*blocks[:1], *blocks[-1:])}
    return sorted(ours for ours in names if ".blocks." not in ours or ours.startswith(tuple(kept)))


def _sample(tensor: LazyTensor) -> list[float]:
    """Returns values at equal distances in a vector or in the first row of a matrix."""
    row = tensor.read() if len(tensor.shape) == 1 else tensor.rows(0, 1)[0]
    at = torch.linspace(0, len(row) - 1, min(_N_VALUES, len(row))).long()
    values: list[float] = row[at].to(tensor.dtype).double().tolist()
    return values


def _equal(recorded: list[float], tensor: LazyTensor) -> bool:
    found = _sample(tensor)
    return len(found) == len(recorded) and torch.allclose(
        torch.tensor(found), torch.tensor(recorded), rtol=_TOLERANCE, atol=1e-6
    )
