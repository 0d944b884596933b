"""Exports the trained model as a checkpoint, in one of the formats that published LLaVA models use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llava.checkpoint.detect import read_files
from llava.errors import ConfigError
from llava.formats.format import Checkpoint
from llava.formats.llava import write_llava
from llava.formats.lora import write_lora
from llava.formats.projector import write_projector
from llava.formats.recorded_base import base_record
from llava.model.llava import Llava
from llava.tensors.hub import absolute_if_local
from llava.train.lora import adapter_pairs
from llava.train.recipe import Recipe
from llava.train.start import row_ids

Tensors = Mapping[str, Tensor]  # our tensor name -> tensor


def export_format(recipe: Recipe) -> str:
    """Returns the export format for a recipe: llava, lora or projector."""
    if recipe.lora_rank:
        return "lora"
    return "llava" if {"decoder", "vision"} & set(recipe.train) else "projector"


def export(folder: Path, model: Llava, checkpoint: Checkpoint, recipe: Recipe, *, first: bool) -> None:
    """Writes the trained model. Every rank must call this, but only the rank whose `first` is True writes files."""
    whole = {n: _whole(p) for n, p in model.named_parameters() if p.requires_grad or export_format(recipe) == "llava"}
    if not first:
        return
    rates = {"mm_projector_lr": recipe.projector_lr, "mm_vision_tower_lr": recipe.vision_lr}
    recorded: dict[str, Any] = {key: value for key, value in rates.items() if value}
    if export_format(recipe) != "llava":
        recorded |= base_record(absolute_if_local(recipe.model), checkpoint.tensors)
    common: dict[str, Any] = {"vision_tower": _tower(checkpoint, recipe), "recorded": recorded}
    write = {"lora": _lora, "llava": _merged, "projector": _projector}[export_format(recipe)]
    write(folder, model, whole, checkpoint, recipe, common)


def _merged(
    folder: Path, model: Llava, tensors: Tensors, checkpoint: Checkpoint, recipe: Recipe, common: dict[str, Any]
) -> None:
    inside = "vision" in recipe.train or checkpoint.tower_inside
    tokenizer = checkpoint.tokenizer_folder
    write_llava(folder, checkpoint.config, tensors, tokenizer_from=tokenizer, tower_inside=inside, **common)


def _projector(
    folder: Path, model: Llava, tensors: Tensors, checkpoint: Checkpoint, recipe: Recipe, common: dict[str, Any]
) -> None:
    ids = row_ids(checkpoint, recipe)
    write_projector(
        folder,
        checkpoint.config,
        {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")},
        base=absolute_if_local(recipe.model),
        start_end=tensors["decoder.embed.weight"][list(ids)] if ids else None,
        tokenizer_from=checkpoint.tokenizer_folder if ids else None,
        **common,
    )


def _lora(
    folder: Path, model: Llava, tensors: Tensors, checkpoint: Checkpoint, recipe: Recipe, common: dict[str, Any]
) -> None:
    added = recipe.start_end and checkpoint.tokenizer_folder.parent != checkpoint.path
    write_lora(
        folder,
        checkpoint.config,
        adapter_pairs(model.decoder, tensors),
        r=recipe.lora_rank,
        alpha=recipe.lora_alpha,
        dropout=recipe.lora_dropout,
        base=absolute_if_local(recipe.model),
        non_lora={name: tensor for name, tensor in tensors.items() if ".adapters." not in name},
        tokenizer_from=checkpoint.tokenizer_folder if added else None,
        **common,
    )


def _tower(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """Returns the vision tower for config.json. Raises ConfigError if neither the recipe nor the model sets it."""
    named = read_files(recipe.projector or recipe.model).config.get("mm_vision_tower")
    if not (tower := recipe.vision_tower or named):
        raise ConfigError(f"{checkpoint.path}: config.json has no mm_vision_tower; set vision_tower in the recipe")
    return str(tower)


def _whole(parameter: nn.Parameter) -> Tensor:
    """Returns the full parameter on the CPU, gathered from all ranks if it is sharded."""
    tensor = parameter.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
