"""What a run leaves: a folder in the zoo's own layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llava.checkpoint.lora import write_lora
from llava.checkpoint.open import Checkpoint, look
from llava.checkpoint.original import write_merged
from llava.checkpoint.projector import write_projector
from llava.errors import ConfigError
from llava.model.llava import Llava
from llava.train.lora import pairs
from llava.train.recipe import Recipe
from llava.train.start import row_ids


def kind(recipe: Recipe) -> str:
    """Of the layout that this recipe leaves: lora, merged or projector."""
    if recipe.lora_rank:
        return "lora"
    return "merged" if {"decoder", "vision"} & set(recipe.train) else "projector"


def export(folder: Path, model: Llava, checkpoint: Checkpoint, recipe: Recipe, *, first: bool) -> None:
    """Writes the trained model. Every rank calls this, the `first` writes."""
    learnt = {name: _whole(p) for name, p in model.named_parameters() if p.requires_grad}
    others = {} if kind(recipe) != "merged" else {n: _whole(p) for n, p in model.named_parameters() if n not in learnt}
    if not first:
        return
    config = checkpoint.config
    common: dict[str, Any] = {"vision_tower": _tower(checkpoint, recipe), "recorded": _recorded(recipe)}
    if kind(recipe) == "merged":
        inside = "vision" in recipe.train or _holds_tower(checkpoint)
        write_merged(
            folder, config, learnt | others, tokenizer_from=checkpoint.tokenizer_folder, tower_inside=inside, **common
        )
    elif kind(recipe) == "projector":
        ids = row_ids(checkpoint, recipe)
        rows = learnt["decoder.embed.weight"][list(ids)] if ids else None
        tensors = {name: tensor for name, tensor in learnt.items() if not name.startswith("decoder.")}
        write_projector(
            folder,
            config,
            tensors,
            base=recipe.model,
            start_end=rows,
            tokenizer_from=checkpoint.tokenizer_folder if ids else None,
            **common,
        )
    else:
        added = recipe.start_end and checkpoint.tokenizer_folder.parent != checkpoint.folder
        write_lora(
            folder,
            config,
            pairs(model.decoder, learnt),
            r=recipe.lora_rank,
            alpha=recipe.lora_alpha,
            dropout=recipe.lora_dropout,
            base=recipe.model,
            non_lora={name: tensor for name, tensor in learnt.items() if ".adapters." not in name},
            tokenizer_from=checkpoint.tokenizer_folder if added else None,
            **common,
        )


def _tower(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """The vision tower as config.json is to name it."""
    named = look(recipe.projector or recipe.model).settings.get("mm_vision_tower")
    if not (tower := recipe.vision_tower or named):
        raise ConfigError(f"{checkpoint.folder}: names no mm_vision_tower; name it in the recipe: vision_tower")
    return str(tower)


def _holds_tower(checkpoint: Checkpoint) -> bool:
    """Whether the tower comes from the model's own files: the trained model has to bring it too."""
    inside = ("model.vision_tower.", "transformer.vision_tower.", "vision.")
    return any(name.startswith(inside) for name in checkpoint.sources["vision.cls"].names)


def _recorded(recipe: Recipe) -> Mapping[str, Any]:
    values = {"mm_projector_lr": recipe.projector_rate, "mm_vision_tower_lr": recipe.vision_rate}
    return {key: value for key, value in values.items() if value}


def _whole(parameter: nn.Parameter) -> Tensor:
    """All of a parameter, on the CPU, of which a rank may hold a share."""
    tensor = parameter.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
