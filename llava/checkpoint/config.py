"""From config.json, the tensors held and the vision tower's own config to a LlavaConfig."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava.checkpoint import settings
from llava.checkpoint.detect import FORMAT_KEY, NATIVE_FORMAT, Facts
from llava.checkpoint.files import read_json, reading
from llava.checkpoint.settings import ImageMode, Shapes
from llava.checkpoint.source import Source
from llava.checkpoint.tower import Tower, find_tower, own_tower
from llava.config import DecoderConfig, LlavaConfig, ProjectorConfig
from llava.errors import CheckpointError


def native_config(facts: Facts, vision: bool, image_mode: ImageMode | None) -> LlavaConfig:
    """What our own config.json holds. Raises CheckpointError for another version's."""
    where = facts.folder / "config.json"
    if (found := facts.settings[FORMAT_KEY]) != NATIVE_FORMAT:
        raise CheckpointError(
            f"{where}: {FORMAT_KEY} is {found!r}, this version reads {NATIVE_FORMAT!r}; upgrade llava"
        )
    config = LlavaConfig.from_dict({key: value for key, value in facts.settings.items() if key != FORMAT_KEY})
    if not vision:
        return replace(config, vision=None, projector=None, image=None)
    if config.image and image_mode and image_mode != config.image.mode:
        return replace(config, image=settings.in_mode(config.image, image_mode))
    return config


def decoder_sizes(facts: Facts, family: str, held: Mapping[str, Source], like: DecoderConfig | None) -> DecoderConfig:
    """The language model's sizes as config.json has them, else `like` another's; the rows are those held."""
    if like:
        return replace(like, vocab_size=held["decoder.embed.weight"].shape[0])
    read = settings.mpt_config if family == "mpt" else settings.decoder_config
    where = str(facts.folder / "config.json")
    return read(facts.settings, {name: source.shape for name, source in held.items()}, where)


def foreign_config(
    facts: Facts,
    decoder: DecoderConfig,
    held: Mapping[str, Source],
    vision: bool,
    vision_tower: str | Path | None,
    image_mode: ImageMode | None,
    fetch_tower: bool,
) -> tuple[LlavaConfig, Path | None]:
    """The config, and the folder of the vision tower where there is one."""
    where = str(facts.folder if facts.folder.is_file() else facts.folder / "config.json")
    found: Shapes = {name: source.shape for name, source in held.items()}
    generation = facts.folder / "generation_config.json"
    config = LlavaConfig(
        decoder=decoder,
        start_end=bool(facts.settings.get("mm_use_im_start_end", False)),
        eos_ids=settings.end_ids(facts.folder, read_json(generation) if generation.is_file() else {}),
        dtype=settings.stored_dtype(facts.settings, held["decoder.norm.weight"].dtype if held else torch.float16),
        padding_side=facts.settings.get("tokenizer_padding_side") or "right",
        trained_seq=facts.settings.get("tokenizer_model_max_length"),
    )
    named = facts.settings.get("mm_vision_tower")
    if not vision or not (named or "projector.0.weight" in held):
        return config, None
    if not (vision_tower or named):
        raise CheckpointError(
            f"{where}: names no mm_vision_tower; pass vision_tower= (--vision-tower), or vision=False"
        )
    if own := settings.table(facts.settings, "vision_config", where):
        tower = Tower(None, own, processor_of(facts.folder))
    else:
        tower = find_tower(str(vision_tower or own_tower(facts.folder) or named), found, fetch=fetch_tower)
    with reading(tower.folder / "config.json" if tower.folder else Path(where)):
        seen = settings.vision_config(tower.config, facts.settings, str(tower.folder or where))
    image = settings.image_config(tower.processor, facts.settings, seen)
    return replace(
        config,
        vision=seen,
        projector=settings.projector_config(facts.settings, seen, config.decoder),
        image=settings.in_mode(image, image_mode or "original"),
    ), tower.folder


def processor_of(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json; empty where there is none: published values are meant then."""
    file = folder / "preprocessor_config.json"
    return read_json(file) if file.is_file() else {}


def projector_held(held: Mapping[str, Source], config: LlavaConfig) -> ProjectorConfig | None:
    """The projector as its tensors show it, for a checkpoint that is opened without vision."""
    weights = [source for name, source in held.items() if name.startswith("projector.") and name.endswith("weight")]
    if not weights:
        return None
    return ProjectorConfig(in_dim=weights[0].shape[1], out_dim=config.decoder.dim, depth=len(weights))
