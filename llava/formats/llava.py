"""The format of published LLaVA checkpoints, such as liuhaotian/llava-v1.5-7b.

It extends the Hugging Face format of the language model with LLaVA's tensors and config keys.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llava.config import LlavaConfig, LoadOptions
from llava.errors import CheckpointError
from llava.formats import llama, mpt
from llava.formats.added_rows import copy_plain_tokenizer, without_added_rows, write_added_rows
from llava.formats.clip import OWN_TOWER, OWN_TOWER_NAME, clip_config, published_id, write_tower
from llava.formats.format import (
    TEMPLATE_KEY,
    Checkpoint,
    CheckpointFiles,
    Format,
    ReadConfig,
    shapes_of,
    to_disk,
)
from llava.formats.multimodal import VISION, read_model_config, vision_keys
from llava.formats.tokenizer import copy_tokenizer, load_tokenizer
from llava.model.llava import shapes
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.atomic import new_folder
from llava.tensors.keymap import Rule, prefixed
from llava.tensors.lazy import InMemory, LazyTensor
from llava.tensors.torch_zip import write_torch
from llava.tensors.writer import (
    MAX_SHARD_BYTES,
    FileWriter,
    OutputTensor,
    Progress,
    no_progress,
    write_json,
    write_safetensors,
    write_shards,
)

RULES = (*llama.RULES, *prefixed("model.", VISION))

FileType = Literal["safetensors", "bin"]
WRITERS: dict[FileType, FileWriter] = {"safetensors": write_safetensors, "bin": write_torch}


class Llava(Format):
    """The format of LLaVA models based on Llama, Mistral or Yi. MPT-based models are written here and read by `mpt`."""

    name = "llava"
    writes = True
    image_mode = "original"
    tensor_keys = llama.TENSOR_KEYS

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        return RULES if config is None else rules_for(config)

    def detect(self, files: CheckpointFiles) -> list[str]:
        evidence = [f"tensor {name}" for name in files.weights if name.startswith("model.mm_projector.")][:1]
        if tower := files.config.get("mm_vision_tower"):
            evidence.append(f"config.json: mm_vision_tower = {tower}")
        return evidence

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        decoder = llama.decoder_config(files.config, shapes_of(tensors), files.config_file)
        return read_model_config(files.path, files.config, decoder, tensors, options)

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        return without_added_rows(checkpoint)

    def outputs(self, checkpoint: Checkpoint) -> list[OutputTensor]:
        """Returns the tensors to write. A tower outside the checkpoint is not written; config.json refers to it."""
        kept = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith("vision.")}
        if checkpoint.tower_inside:
            kept = checkpoint.tensors | checkpoint.unused_tower
        return to_disk(kept, checkpoint.config, rules_for(checkpoint.config))

    def write_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        config = llava_config(checkpoint.config, checkpoint.tokenizer, tower_name(checkpoint))
        return config | {"unfreeze_mm_vision_tower": checkpoint.tower_inside}

    def extra_bytes(self, source: Checkpoint) -> int:
        return sum(tensor.n_bytes for tensor in own_tower_tensors(source).values())

    def write_extra(self, source: Checkpoint, folder: Path) -> None:
        copy_plain_tokenizer(source, folder)
        write_own_tower(source, folder)
        write_added_rows(source, folder)


def rules_for(config: LlavaConfig, *, linear: bool | None = None) -> tuple[Rule, ...]:
    """Returns the key table. `linear`: whether the projector is a single layer, whose names on disk have no index."""
    rules = mpt.RULES if config.decoder.kind == "mpt" else RULES
    if linear is None:
        linear = config.projector is not None and config.projector.depth == 1
    return tuple(rule for rule in rules if not (linear and rule.ours and rule.ours.startswith("projector.*")))


def from_memory(tensors: Mapping[str, Tensor | LazyTensor], config: LlavaConfig) -> list[OutputTensor]:
    """Returns tensors under this format's names, with their dtypes unchanged. A tied head is omitted."""
    lazy: dict[str, LazyTensor] = {
        name: InMemory(tensor=tensor, origin=name) if isinstance(tensor, Tensor) else tensor
        for name, tensor in tensors.items()
    }
    if config.decoder.tied:
        lazy.pop("decoder.head.weight", None)
    return to_disk(lazy, config, rules_for(config))


def llava_config(config: LlavaConfig, tokenizer: Tokenizer | None, vision_tower: str | None) -> dict[str, Any]:
    """Returns config.json with all keys that the original code or this package reads. Raises ConfigError.

    The template is recorded as `llava_template`, a key that other readers ignore. The original code guesses the
    template from the folder name.
    """
    is_mpt = config.decoder.kind == "mpt"
    language = mpt.mpt_config(config) if is_mpt else llama.llama_config(config, tokenizer)
    if config.template:
        language[TEMPLATE_KEY] = config.template
    if config.vision is None:
        return language
    family = "Mpt" if is_mpt else "Mistral" if llama.is_mistral(config.decoder) else "Llama"
    names = {
        "architectures": [f"Llava{family}ForCausalLM"],
        "model_type": {"Mpt": "llava_mpt", "Mistral": "llava_mistral"}.get(family, "llava"),
    }
    return language | names | vision_keys(config, vision_tower)


# --------------------------------------------------------------------------------------------------- the vision tower


def tower_name(checkpoint: Checkpoint, *, separate: bool = False) -> str | None:
    """Returns `mm_vision_tower` for a copy of a checkpoint, or None for a model without vision.

    If the tower is a model of its own, returns its recorded name. If the shards contain the tower's weights, readers
    need only its config, so returns the hub id of a published CLIP model of the same size or, if there is none,
    `OWN_TOWER_NAME`, which refers to the subfolder that `write_own_tower` writes.
    separate: true if no shards are written; readers then need the weights too, so never returns a published id.
    """
    vision = checkpoint.config.vision
    if vision is None:
        return None
    if not (checkpoint.tower_inside or checkpoint.tower_beside):
        return checkpoint.vision_tower
    known = None if separate or not checkpoint.tower_inside else published_id(clip_config(vision))
    return known or OWN_TOWER_NAME


def own_tower_tensors(checkpoint: Checkpoint, *, separate: bool = False) -> dict[str, LazyTensor]:
    """Returns the tensors that `write_own_tower` writes; {} if it writes nothing."""
    if tower_name(checkpoint, separate=separate) != OWN_TOWER_NAME:
        return {}
    every = checkpoint.tensors | checkpoint.unused_tower
    return {name: tensor for name, tensor in every.items() if name.startswith("vision.")}


def write_own_tower(checkpoint: Checkpoint, folder: Path, *, separate: bool = False) -> None:
    """Writes the tower to `folder / OWN_TOWER` if `tower_name()` returns `OWN_TOWER_NAME`."""
    if tower := own_tower_tensors(checkpoint, separate=separate):
        write_tower(folder / OWN_TOWER, checkpoint.config, {name: tensor.read() for name, tensor in tower.items()})


# -------------------------------------------------------------------------------------------------- a model in memory


def write_llava(
    folder: Path,
    config: LlavaConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer_from: Path,
    vision_tower: str | None,
    tower_inside: bool = False,
    file_type: FileType = "safetensors",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    recorded: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> None:
    """Writes an in-memory model in this format, in `config.dtype`. Without vision, writes a plain Llama or MPT model.

    tensors: keyed by our names, on any device. tokenizer_from: a folder with the tokenizer files. vision_tower: a CLIP
    folder or hub id to record in config.json. tower_inside: store `vision.*` in the shards, for a trained tower.
    recorded: additional keys for config.json. Raises ConfigError or CheckpointError; a failed write leaves no files.
    """
    settings = llava_config(config, load_tokenizer(tokenizer_from), vision_tower)
    settings |= {"unfreeze_mm_vision_tower": True} if tower_inside else {}
    names = [name for name in shapes(config) if tower_inside or not name.startswith("vision.")]
    if missing := [name for name in names if name not in tensors]:
        raise CheckpointError(f"{folder}: cannot write the model, because {missing[0]} is missing from `tensors`")
    # Also write the blocks after the selected layer if `tensors` contains them, because CLIP loaders expect them.
    names += [name for name in tensors if tower_inside and name.startswith("vision.") and name not in names]
    dtype = getattr(torch, config.dtype)
    outputs = [replace(out, dtype=dtype) for out in from_memory({name: tensors[name] for name in names}, config)]
    with new_folder(folder, sum(out.n_bytes for out in outputs)) as partial:
        write_shards(partial, outputs, progress, max_bytes=max_shard_bytes, writer=WRITERS[file_type])
        write_json(partial / "config.json", settings | dict(recorded or {}))
        copy_tokenizer(tokenizer_from, partial)
        write_json(partial / "generation_config.json", _generation_config(config, settings))


def _generation_config(config: LlavaConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns generation_config.json, with `config.eos_ids` as its eos_token_id."""
    bos = {key: settings[key] for key in ("bos_token_id",) if settings.get(key) is not None}
    ids = list(config.eos_ids)
    eos = {"eos_token_id": ids if len(ids) > 1 else ids[0]} if ids else {}
    return {"_from_model_config": True, **bos, **eos}
