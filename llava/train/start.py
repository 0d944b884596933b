"""What a run starts from: a language model and a tower put together, or a LLaVA to go on from; which weights learn."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llava.checkpoint.detect import FORMAT_KEY
from llava.checkpoint.files import check_finite
from llava.checkpoint.open import Checkpoint, check_headers, look, open_checkpoint
from llava.checkpoint.source import Mean, Rows
from llava.checkpoint.write import new_folder
from llava.config import ImageConfig, LlavaConfig
from llava.convert.tokenizer import copy_tokenizer
from llava.errors import CheckpointError, ConfigError
from llava.formats.tokenizer import load_tokenizer
from llava.model.llava import Llava, meta_model, shapes
from llava.model.lora import Adapter, LoraLinear
from llava.quantize.nf4 import NF4Linear
from llava.train.lora import add_lora
from llava.train.recipe import Recipe

_NEW_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def start(recipe: Recipe, tokenizer_folder: Path) -> Checkpoint:
    """Where each weight comes from; those of a new projector are `missing`. No weights are read.

    `tokenizer_folder`: where a tokenizer with <im_start> and <im_end> is written if the model's has none.
    Raises LlavaError.
    """
    checkpoint = _opened(recipe)
    if recipe.start_end and checkpoint.new_tokens:
        checkpoint = _with_files(checkpoint, tokenizer_folder, checkpoint.new_tokens)
    if recipe.start_end and checkpoint.tokenizer.id_of("<im_start>") is None:
        checkpoint = _with_tokens(checkpoint, tokenizer_folder)
    config = replace(
        checkpoint.config, template=recipe.template, start_end=recipe.start_end, image=_image(recipe, checkpoint.config)
    )
    wanted = shapes(config)
    checkpoint = replace(
        checkpoint, config=config, missing=tuple(name for name in wanted if name not in checkpoint.sources)
    )
    if lost := [name for name in checkpoint.missing if not name.startswith("projector.") and name != "newline"]:
        raise CheckpointError(f"{checkpoint.folder}: holds no {lost[0]}; only a projector can start anew")
    check_headers(replace(checkpoint, missing=()))
    return checkpoint


def _opened(recipe: Recipe) -> Checkpoint:
    if recipe.projector:
        return open_checkpoint(recipe.projector, base=recipe.model, vision_tower=recipe.vision_tower)
    facts = look(recipe.model)
    if not recipe.vision_tower or {"mm_vision_tower", FORMAT_KEY} & set(facts.settings) or recipe.base:
        opened = open_checkpoint(facts, base=recipe.base, vision_tower=recipe.vision_tower)
        if opened.config.vision is None:
            raise ConfigError(f"{recipe.model}: is a language model alone; name a tower for it: vision_tower")
        return opened
    return open_checkpoint(facts._replace(settings={**facts.settings, **_keys(recipe)}))


def _keys(recipe: Recipe) -> dict[str, Any]:
    """What a LLaVA's config.json would say of the tower and projector beside this language model."""
    return {
        "mm_vision_tower": recipe.vision_tower,
        "mm_projector_type": recipe.projector_type,
        "mm_vision_select_layer": recipe.select_layer,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": recipe.aspect,
        "image_grid_pinpoints": [list(size) for size in recipe.pinpoints],
        "mm_patch_merge_type": "spatial_unpad" if recipe.aspect == "anyres" else "flat",
        "mm_use_im_start_end": False,  # the tokens come next
    }


def _image(recipe: Recipe, config: LlavaConfig) -> ImageConfig:
    assert config.image
    merge: Literal["spatial_unpad", "flat"] = "spatial_unpad" if recipe.aspect == "anyres" else "flat"
    return replace(config.image, aspect=recipe.aspect, pinpoints=recipe.pinpoints, merge=merge)


def _with_tokens(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The vocabulary with the picture's tokens behind it; their rows start at the mean of all others."""
    first = checkpoint.tokenizer.size
    sources = dict(checkpoint.sources)
    for name in ("decoder.embed.weight", "decoder.head.weight"):
        if table := sources.get(name):
            sources[name] = Rows(table, Mean(table, len(_NEW_TOKENS)), first)
    decoder = replace(checkpoint.config.decoder, vocab_size=sources["decoder.embed.weight"].shape[0])
    longer = replace(checkpoint, config=replace(checkpoint.config, decoder=decoder), sources=sources)
    return _with_files(longer, folder, {text: first + i for i, text in enumerate(_NEW_TOKENS)})


def _with_files(checkpoint: Checkpoint, folder: Path, more: Mapping[str, int]) -> Checkpoint:
    """The tokenizer with these tokens is written there, unless it is there."""
    if not folder.is_dir():
        try:
            _write_tokenizer(checkpoint.tokenizer_folder, folder, more)
        except CheckpointError:
            if not folder.is_dir():  # another rank was faster: it wrote the same
                raise
    return replace(checkpoint, tokenizer=load_tokenizer(folder), tokenizer_folder=folder, new_tokens={})


def _write_tokenizer(source: Path, target: Path, more: Mapping[str, int]) -> None:
    with new_folder(target, 0) as folder:
        copy_tokenizer(source, folder, more)


def trainable(checkpoint: Checkpoint, recipe: Recipe) -> Llava:
    """The model without memory for its weights, of the right types, with adapters, and with `requires_grad` set."""
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
        parameter.data = parameter.data.to(DTYPES[recipe.master if parameter.requires_grad else recipe.compute])
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
    """Ids of which alone the input embedding learns; () where all or none do."""
    if "rows" not in recipe.train or ("decoder" in recipe.train and not recipe.lora_rank):
        return ()
    ids = [checkpoint.tokenizer.id_of(text) for text in ("<im_start>", "<im_end>")]
    return tuple(id for id in ids if id is not None)


def fill(model: Llava, checkpoint: Checkpoint, recipe: Recipe, device: torch.device) -> None:
    """Gives the model memory there and its weights: the checkpoint's, and random ones where something starts anew."""
    model.to_empty(device=device)
    if checkpoint.config.decoder.tied:
        model.decoder.head.weight = model.decoder.embed.weight
    for name, source in checkpoint.sources.items():
        tensor = source.read()
        check_finite(tensor, source.where, False)
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, LoraLinear):
            module = module.base
        if isinstance(module, NF4Linear):
            module.set_weight(tensor.to(device))
        else:
            put(getattr(module, leaf), tensor)
    generator = torch.Generator().manual_seed(recipe.seed)
    for name in checkpoint.missing:
        parameter = model.get_parameter(name)
        put(parameter, _initial(name, tuple(parameter.shape), model, generator))
    for module in model.modules():
        if isinstance(module, Adapter):
            limit = 1 / math.sqrt(module.a.shape[1])  # as PEFT: A kaiming-uniform with a = sqrt(5), B zero
            put(module.a, torch.empty(module.a.shape).uniform_(-limit, limit, generator=generator))
            put(module.b, torch.zeros(module.b.shape))


def _initial(name: str, shape: tuple[int, ...], model: Llava, generator: torch.Generator) -> Tensor:
    """Of a projector's weight or bias as torch starts a Linear; of the newline as LLaVA-1.6 does."""
    if name == "newline":
        return torch.randn(shape, generator=generator) / math.sqrt(shape[0])
    layer = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(layer, nn.Linear)
    limit = 1 / math.sqrt(layer.in_features)
    return torch.empty(shape).uniform_(-limit, limit, generator=generator)


def put(parameter: Tensor, value: Tensor) -> None:
    """Values into a parameter, be it whole or this rank's share of it."""
    value = value.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            # every rank has the value: nothing is sent
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(value.to_local())
        else:
            parameter.copy_(value)
