"""Deltas: models stored as the difference from a base model, so that they can be published without the base."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from llava.errors import CheckpointError
from llava.formats.added_rows import VOCAB_TABLES
from llava.formats.base_model import check_raw
from llava.formats.clip import OWN_TOWER, own_tower
from llava.formats.format import Checkpoint, CheckpointFiles, Resolved, to_disk
from llava.formats.llava import WRITERS, FileType, rules_for
from llava.formats.on_base import PartOfModel, base_tensors, llava_rules, read_part
from llava.formats.recorded_base import base_record
from llava.formats.tokenizer import copy_tokenizer
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.atomic import new_folder
from llava.tensors.files import read_json
from llava.tensors.lazy import Cast, LazyTensor
from llava.tensors.sums import AddDelta
from llava.tensors.writer import Progress, no_progress, write_json, write_shards

_DIFFERENCE = 0.1  # a checkpoint is a delta if |mean| of the final norm's weight is below this


class Delta(PartOfModel):
    """The llava format, but tensors that the base also contains are stored as the difference from the base."""

    name = "delta"
    exact = False  # differences are rounded when stored

    def detect(self, files: CheckpointFiles) -> list[str]:
        if "model.norm.weight" not in files.weights:
            return []
        mean = files.weights["model.norm.weight"].float().mean().item()
        return [f"model.norm.weight has mean {mean:.4f}: a difference from a base model"] * (abs(mean) < _DIFFERENCE)

    def resolve(self, files: CheckpointFiles, base: Checkpoint | None, tokenizer: Tokenizer) -> Resolved:
        """Adds the delta to the base, in the delta's dtype; tensors and rows absent from the base stay unchanged."""
        assert base
        part = read_part(files.weights, {name: name for name in files.weights}, llava_rules(base))
        own = base_tensors(base)
        tensors = dict(part.tensors)
        for ours in sorted(name for name in {*tensors, *own} if name.startswith("decoder.")):
            delta, under = tensors.get(ours), own.get(ours)
            if delta is None or under is None or not extends(ours, delta, under):
                asked, found = (list(tensor.shape) if tensor else "none" for tensor in (delta, under))
                raise CheckpointError(
                    f"{base.path}: {ours} has shape {found} in the base, but {asked} in the delta; "
                    "pass the base that the delta was computed against"
                )
            tensors[ours] = AddDelta(delta, under, delta.dtype)
        return Resolved(tensors, part.dropped, part.unknown)


def extends(ours: str, longer: LazyTensor, base: LazyTensor) -> bool:
    """Whether `longer` has the same shape as `base`, apart from rows that new tokens add to a vocabulary table."""
    rows, own = longer.shape[:1], base.shape[:1]  # empty for a scalar
    same_rows = rows == own or (ours in VOCAB_TABLES and rows > own)
    return same_rows and longer.shape[1:] == base.shape[1:]


def write_delta(
    folder: Path,
    model: Checkpoint,
    base: Checkpoint,
    *,
    base_name: str | None = None,
    file_type: FileType = "bin",
    progress: Progress = no_progress,
) -> None:
    """Streams `model` - `base` to disk in float16; tensors and rows absent from the base are written in full.

    Both checkpoints must be opened without vision. `model` must be in the llava format; its config and tokenizer are
    copied. Applying the delta restores the model up to float16 rounding of the differences. base_name: folder or hub id
    of the base, recorded in config.json with a few of its values. Raises CheckpointError.
    """
    if model.format != "llava":
        command = shlex.join(["llava", "convert", str(model.path), "OUT", "--to", "llava"])
        hint = f"; first run: {command}, and pass the folder OUT" if "projector.0.weight" in model.unused else ""
        raise CheckpointError(f"{model.path}: has format {model.format}; a delta requires the llava format{hint}")
    check_raw(base, model.config.decoder, force=True)  # warn now: the delta cannot be loaded with an unsuitable base
    tensors = {name: _difference(name, tensor, base) for name, tensor in (model.tensors | model.unused).items()}
    rules = rules_for(model.config, linear="projector.2.weight" not in tensors)
    outputs = [replace(out, dtype=torch.float16) for out in to_disk(tensors, model.config, rules)]
    with new_folder(folder, sum(out.n_bytes for out in outputs)) as partial:
        write_shards(partial, outputs, progress, writer=WRITERS[file_type])
        config = read_json(model.path / "config.json") | base_record(
            base_name or str(base.path.absolute()), base.tensors
        )
        write_json(partial / "config.json", config)
        copy_tokenizer(model.path, partial)
        if tower := own_tower(model.path):
            shutil.copytree(tower, partial / OWN_TOWER)


def _difference(name: str, tensor: LazyTensor, base: Checkpoint) -> LazyTensor:
    if (own := base.tensors.get(name)) is None:
        return Cast(tensor, torch.float16)
    if not extends(name, tensor, own):
        raise CheckpointError(f"{own.where}: has shape {list(own.shape)}, but {tensor.where} has {list(tensor.shape)}")
    return AddDelta(tensor, own, torch.float16, sign=-1)
