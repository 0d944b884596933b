"""Prepares the model for a run: opens the checkpoint, selects the trained weights, and initialises new weights."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llava.checkpoint.consistency import check_headers
from llava.checkpoint.detect import FALLBACK_TEMPLATE, read_files
from llava.checkpoint.load import load_weights, read_finite
from llava.checkpoint.open import open_checkpoint
from llava.config import ImageConfig, LlavaConfig, LoadOptions, ProjectorConfig, projector_depth
from llava.errors import CheckpointError, ConfigError
from llava.formats.clip import find_tower, read_tower, vision_config
from llava.formats.format import Checkpoint, TemplateChoice
from llava.formats.multimodal import image_config
from llava.formats.native import VERSION_KEY
from llava.formats.tokenizer import copy_tokenizer, load_tokenizer
from llava.model.llava import Llava, meta_model, shapes
from llava.model.lora import Adapter
from llava.quantize.nf4 import NF4Linear
from llava.tensors.atomic import new_folder
from llava.tensors.files import parsing
from llava.tensors.hub import absolute_if_local
from llava.tensors.lazy import LazyTensor, MeanRows, WithRows
from llava.train.lora import add_lora
from llava.train.recipe import MODEL, Recipe, read_recipe, recipe_names
from llava.zoo.bases import advice

log = logging.getLogger(__name__)

_NEW_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@advice()
def start(recipe: Recipe, tokenizer_folder: Path) -> Checkpoint:
    """Returns the checkpoint to start from. Its `missing` lists the projector weights to initialise. Reads no weights.

    tokenizer_folder: output folder for a tokenizer with <im_start> and <im_end>, written if the recipe uses these
    tokens and the model's tokenizer lacks them.
    Raises LlavaError.
    """
    checkpoint = _open(recipe)
    if not recipe.projector:  # stage 1, which trains it, has a template and an aspect of its own
        _warn_about_other_values(checkpoint, recipe)
    if recipe.start_end and checkpoint.new_tokens:
        checkpoint = _with_tokenizer_files(checkpoint, tokenizer_folder, checkpoint.new_tokens)
    if recipe.start_end and checkpoint.tokenizer.id_of("<im_start>") is None:
        checkpoint = _with_tokens(checkpoint, tokenizer_folder)
    config = replace(
        checkpoint.config, template=recipe.template, start_end=recipe.start_end, image=_image(recipe, checkpoint.config)
    )
    missing = tuple(name for name in shapes(config) if name not in checkpoint.tensors)
    tower = recipe.vision_tower or checkpoint.vision_tower
    checkpoint = replace(
        checkpoint,
        config=config,
        template=TemplateChoice(recipe.template, "the template of the recipe"),
        vision_tower=tower and absolute_if_local(tower),  # the export must find it from any working directory
        missing=missing,
    )
    if lost := [name for name in missing if not name.startswith("projector.") and name != "newline"]:
        raise CheckpointError(
            f"{checkpoint.path}: {lost[0]} is missing; only projector weights can be newly initialised"
        )
    check_headers(replace(checkpoint, missing=()))
    return checkpoint


def _open(recipe: Recipe) -> Checkpoint:
    options = LoadOptions(vision_tower=recipe.vision_tower)
    _check_earlier_runs(recipe)
    if recipe.projector:
        return open_checkpoint(recipe.projector, replace(options, base=recipe.model))
    files = read_files(recipe.model)
    named = {"mm_vision_tower", VERSION_KEY} & set(files.config)
    if recipe.vision_tower and not named and not recipe.base:
        language = open_checkpoint(files, LoadOptions(vision=False))
        if not any(name.startswith("projector.") for name in language.unused):
            return _with_tower(language, recipe)
    checkpoint = open_checkpoint(files, replace(options, base=recipe.base))
    if checkpoint.config.vision is None:
        raise ConfigError(f"{recipe.model}: is a language model without a vision tower; set vision_tower in the recipe")
    return checkpoint


def _check_earlier_runs(recipe: Recipe) -> None:
    """Raises ConfigError with the command of an earlier run, such as stage 1, if its result is needed but missing."""
    for key in ("projector", "model", "base"):
        source = getattr(recipe, key)
        if source is None or Path(source).exists() or Path(source).name != MODEL:
            continue
        for name in recipe_names():
            if read_recipe(name).output_dir == Path(source).parent.as_posix():
                raise ConfigError(
                    f"{source}: does not exist yet; {key} is the result of another recipe, so first run: llava train "
                    f"{name}"
                )


def _with_tower(language: Checkpoint, recipe: Recipe) -> Checkpoint:
    """Combines a language model and a vision tower into a LLaVA model whose projector has no weights yet."""
    name = absolute_if_local(str(recipe.vision_tower))
    tower = find_tower(name, {})
    where = tower.folder or Path(name)
    with parsing(where / "config.json"):
        vision = vision_config(tower.config, where, select_layer=recipe.select_layer)
    depth = projector_depth(recipe.projector_type)
    config = replace(
        language.config,
        vision=vision,
        projector=ProjectorConfig(in_dim=vision.dim, out_dim=language.config.decoder.dim, depth=depth),
        image=image_config(
            tower.processor, vision, aspect=recipe.aspect, pinpoints=recipe.pinpoints, merge=_merge(recipe)
        ),
    )
    available = language.tensors | (read_tower(tower.folder) if tower.folder else {})
    expected = shapes(config)
    return replace(
        language,
        config=config,
        tensors={ours: tensor for ours, tensor in available.items() if ours in expected},
        unused=language.unused | {ours: tensor for ours, tensor in available.items() if ours not in expected},
        vision_tower=name,
        tower_folder=tower.folder,
    )


def _warn_about_other_values(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Warns if a LLaVA was trained with other values than those of the recipe, which may just be its defaults."""
    before, after = _prompt_and_image(checkpoint), _prompt_and_image_of(recipe)
    known = {key for key, value in before.items() if value is not None and key in after}
    changed = [key for key in after if key in known and before[key] != after[key]]
    if changed:
        log.warning(
            "%s: was trained with %s, but the recipe, which may leave keys at their defaults, has %s",
            recipe.model,
            ", ".join(f"{key}={_as_text(before[key])}" for key in changed),
            ", ".join(f"{key}={_as_text(after[key])}" for key in changed),
        )


def _prompt_and_image(checkpoint: Checkpoint) -> dict[str, object]:
    """Returns the values with which a LLaVA was trained, by the recipe's keys; none for parts that have no projector.

    A template that no rule found is not among them, nor that of a projector, which may be trained on plain captions.
    """
    config = checkpoint.config
    known = checkpoint.format != "projector" and checkpoint.template != FALLBACK_TEMPLATE
    if config.image is None or not any(name.startswith("projector.") for name in checkpoint.tensors):
        return {}
    return {
        "aspect": config.image.aspect,
        "pinpoints": config.image.pinpoints if config.image.aspect == "anyres" else None,
        "mm_patch_merge_type": config.image.merge if config.image.aspect == "anyres" else None,
        "start_end": config.start_end,
        "template": checkpoint.template.template if known else None,
    }


def _prompt_and_image_of(recipe: Recipe) -> dict[str, object]:
    image = {"pinpoints": recipe.pinpoints, "mm_patch_merge_type": _merge(recipe)} if recipe.aspect == "anyres" else {}
    return {"aspect": recipe.aspect, **image, "start_end": recipe.start_end, "template": recipe.template}


def _as_text(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool | tuple) else str(value)


def _merge(recipe: Recipe) -> Literal["spatial_unpad", "flat"]:
    return "spatial_unpad" if recipe.aspect == "anyres" else "flat"


def _image(recipe: Recipe, config: LlavaConfig) -> ImageConfig:
    assert config.image
    if config.image.mode != "original":
        log.warning(
            "%s: was saved with the image processing of transformers; trains and saves it with LLaVA's, aspect=%s",
            recipe.model,
            recipe.aspect,
        )
    return replace(
        config.image, mode="original", aspect=recipe.aspect, pinpoints=recipe.pinpoints, merge=_merge(recipe)
    )


def _with_tokens(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Adds image tokens to the vocabulary. Each new embedding or head row is the mean of the existing rows."""
    first = checkpoint.tokenizer.size
    tensors = dict(checkpoint.tensors)
    for name in ("decoder.embed.weight", "decoder.head.weight"):
        if table := tensors.get(name):
            tensors[name] = WithRows(table, MeanRows(table, len(_NEW_TOKENS)), first)
    decoder = replace(checkpoint.config.decoder, vocab_size=tensors["decoder.embed.weight"].shape[0])
    longer = replace(checkpoint, config=replace(checkpoint.config, decoder=decoder), tensors=tensors)
    if checkpoint.format in ("llava-hf", "native"):  # llava-hf's rows are no longer the last ones, so they must be kept
        longer = replace(longer, format="llava")
    return _with_tokenizer_files(longer, folder, {text: first + i for i, text in enumerate(_NEW_TOKENS)})


def _with_tokenizer_files(checkpoint: Checkpoint, folder: Path, new_tokens: Mapping[str, int]) -> Checkpoint:
    """Adds `new_tokens` to the tokenizer and writes it to `folder`. A folder that already exists is left unchanged."""
    if not folder.is_dir():
        try:
            with new_folder(folder, 0) as partial:
                copy_tokenizer(checkpoint.tokenizer_folder, partial, new_tokens)
        except CheckpointError:
            if not folder.is_dir():  # otherwise, another rank has already written the same tokenizer
                raise
    return replace(checkpoint, tokenizer=load_tokenizer(folder), tokenizer_folder=folder, new_tokens={})


def trainable(checkpoint: Checkpoint, recipe: Recipe) -> Llava:
    """Returns the model on the meta device, with adapters, dtypes and `requires_grad` set according to the recipe."""
    model = meta_model(checkpoint.config)
    with torch.device("meta"):
        if recipe.lora_rank:
            add_lora(
                model.decoder,
                checkpoint.config.decoder,
                rank=recipe.lora_rank,
                alpha=recipe.lora_alpha,
                dropout=recipe.lora_dropout,
                nf4=recipe.quantize_base == "nf4",
            )
    model.requires_grad_(False)
    for parameter in _learning(model, recipe):
        parameter.requires_grad_(True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(
            DTYPES[recipe.param_dtype if parameter.requires_grad else recipe.compute_dtype]
        )
    return model


def _learning(model: Llava, recipe: Recipe) -> Iterator[Tensor]:
    if "projector" in recipe.train and model.projector is not None:
        yield from model.projector.parameters()
        if model.newline is not None:
            yield model.newline
    if "decoder" in recipe.train and recipe.lora_rank:
        for module in model.decoder.modules():
            if isinstance(module, Adapter):
                yield from module.parameters()
    elif "decoder" in recipe.train:
        yield from model.decoder.parameters()
    if "vision" in recipe.train and model.vision is not None:
        yield from model.vision.parameters()
    if "rows" in recipe.train:
        yield model.decoder.embed.weight


def row_ids(checkpoint: Checkpoint, recipe: Recipe) -> tuple[int, ...]:
    """Returns the ids of the tokens whose input embeddings are trained, or () if all or none are trained."""
    if "rows" not in recipe.train or ("decoder" in recipe.train and not recipe.lora_rank):
        return ()
    ids = [checkpoint.tokenizer.id_of(text) for text in ("<im_start>", "<im_end>")]
    return tuple(id for id in ids if id is not None)


def fill(model: Llava, checkpoint: Checkpoint, recipe: Recipe, device: torch.device) -> None:
    """Allocates the model on the device, loads the checkpoint, and initialises missing weights and adapters."""
    model.to_empty(device=device)
    if checkpoint.config.decoder.tied:
        model.decoder.head.weight = model.decoder.embed.weight

    def store(module: nn.Module, leaf: str, tensor: LazyTensor) -> None:
        value = read_finite(tensor)
        if isinstance(module, NF4Linear):
            module.set_weight(value.to(device))
        else:
            put(getattr(module, leaf), value)

    load_weights(model, checkpoint.tensors, store)
    generator = torch.Generator().manual_seed(recipe.seed)
    for name in checkpoint.missing:
        parameter = model.get_parameter(name)
        put(parameter, _initial(name, tuple(parameter.shape), model, generator))
    for module in model.modules():
        if isinstance(module, Adapter):
            limit = 1 / math.sqrt(module.a.shape[1])  # as in PEFT: A is Kaiming-uniform with a = sqrt(5), B is zero
            put(module.a, torch.empty(module.a.shape).uniform_(-limit, limit, generator=generator))
            put(module.b, torch.zeros(module.b.shape))


def _initial(name: str, shape: tuple[int, ...], model: Llava, generator: torch.Generator) -> Tensor:
    """Returns initial values for a projector parameter (as in torch.nn.Linear) or the newline (as in LLaVA-1.6)."""
    if name == "newline":
        return torch.randn(shape, generator=generator) / math.sqrt(shape[0])
    layer = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(layer, nn.Linear)
    limit = 1 / math.sqrt(layer.in_features)
    return torch.empty(shape).uniform_(-limit, limit, generator=generator)


def put(parameter: Tensor, value: Tensor) -> None:
    """Copies a full tensor into a parameter, which may be sharded across ranks."""
    value = value.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            # every rank has the full tensor, so no communication is needed
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(value.to_local())
        else:
            parameter.copy_(value)
