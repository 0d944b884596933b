"""Tensors and config keys that LLaVA adds to language model checkpoints: vision tower, projector and image settings."""

import ast
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import torch

from llava.config import (
    DecoderConfig,
    DType,
    ImageConfig,
    ImageMode,
    LlavaConfig,
    LoadOptions,
    ProjectorConfig,
    VisionConfig,
    projector_depth,
    projector_type,
)
from llava.errors import CheckpointError, ConfigError
from llava.formats import clip
from llava.formats.clip import Tower, find_tower, own_tower, processor_config, side, vision_config
from llava.formats.config_keys import ConfigKeys, words
from llava.formats.format import IMAGE_MODE_KEY, ReadConfig, TensorKeys, one_of, section, shapes_of
from llava.tensors.files import parsing, read_json_if_present
from llava.tensors.keymap import Rule, prefixed
from llava.tensors.lazy import LazyTensor

log = logging.getLogger(__name__)

VISION = (  # without the prefix, such as "model.", that a format adds with `prefixed`
    Rule("mm_projector.*.weight", "projector.*.weight"),  # an MLP
    Rule("mm_projector.*.bias", "projector.*.bias"),
    Rule("mm_projector.weight", "projector.0.weight"),  # linear
    Rule("mm_projector.bias", "projector.0.bias"),
    Rule("image_newline", "newline"),
    *prefixed("vision_tower.vision_tower.vision_model.", clip.TOWER),
    *prefixed("vision_tower.vision_tower.", clip.TOWER),
)
TENSOR_KEYS = (
    TensorKeys("projector", "mm_projector_type", "mm_hidden_size hidden_size"),
    TensorKeys("newline", "image_aspect_ratio mm_patch_merge_type", "hidden_size"),
    TensorKeys(r"vision\.pos", "mm_vision_tower", "mm_vision_tower image_size patch_size"),
    TensorKeys("vision", "mm_vision_tower mm_vision_select_layer", "mm_vision_tower"),
)
KEYS = ConfigKeys(
    used=words(
        "mm_vision_tower mm_hidden_size mm_projector_type mm_vision_select_layer mm_vision_select_feature "
        "mm_use_im_start_end mm_patch_merge_type image_aspect_ratio image_grid_pinpoints tokenizer_model_max_length "
        "tokenizer_padding_side vision_config"
    ),
    only={"mm_resampler_type": (), "sep_image_conv_front": (False,), "s2": (False,)},
    no_effect=words(
        "use_mm_proj mm_use_im_patch_token image_crop_resolution image_split_resolution s2_scales "  # not read
        "tune_mm_mlp_adapter freeze_mm_mlp_adapter unfreeze_mm_vision_tower tune_mm_vision_resampler mm_projector_lr "
        "mm_vision_tower_lr mm_tunable_parts tune_mm_vision_tower pretrain_mm_mlp_adapter vision_tower_pretrained "
        "freeze_backbone tune_vision_encoder mm_llm_compress use_pos_skipping pos_skipping_range "  # for training
        "mm_newline_position add_faster_video mm_spatial_pool_mode mm_spatial_pool_stride "
        "mm_spatial_pool_out_channels faster_token_stride force_sample"  # for videos
    ),
)


def read_model_config(
    path: Path,
    config: Mapping[str, Any],
    decoder: DecoderConfig,
    tensors: Mapping[str, LazyTensor],
    options: LoadOptions,
) -> ReadConfig:
    """Builds a LlavaConfig from config.json, without vision if `options` disables it or the checkpoint has none.

    path: checkpoint folder or single file. Raises CheckpointError or ConfigError.
    """
    where = path if path.is_file() else path / "config.json"
    norm = tensors.get("decoder.norm.weight")
    language = LlavaConfig(
        decoder=decoder,
        start_end=bool(config.get("mm_use_im_start_end", False)),
        eos_ids=_eos_ids(path / "generation_config.json"),
        dtype=_stored_dtype(config, torch.float16 if norm is None else norm.dtype),
        padding_side=config.get("tokenizer_padding_side") or "right",
        trained_seq=config.get("tokenizer_model_max_length"),
    )
    named = config.get("mm_vision_tower")
    if not options.vision or not (named or "projector.0.weight" in tensors):
        return ReadConfig(language, config, path)
    tower = _tower(path, config, tensors, options)
    if "vision.cls" not in tensors and _trained_tower(config) and not (options.vision_tower or own_tower(path)):
        log.warning(
            "%s: states that the vision tower was trained, but its weights are not here; %s is used, and answers may "
            "be worse", where, named,
        )  # fmt: skip
    mode = options.image_mode or config.get(IMAGE_MODE_KEY)
    complete = _with_vision(language, config, tensors, tower, mode, where)
    return ReadConfig(complete, config, path, tower.folder)


def _with_vision(
    language: LlavaConfig,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    tower: Tower,
    image_mode: ImageMode | None,
    where: Path,
) -> LlavaConfig:
    with parsing(tower.folder / "config.json" if tower.folder else where):
        vision = vision_config(
            tower.config,
            tower.folder or where,
            select_layer=config.get("mm_vision_select_layer", -1),
            select_feature=config.get("mm_vision_select_feature", "patch"),
        )
    image = image_config(
        tower.processor,
        vision,
        aspect=config.get("image_aspect_ratio") or "square",
        pinpoints=_pinpoints(config.get("image_grid_pinpoints")),
        merge=config.get("mm_patch_merge_type") or "flat",
    )
    return replace(
        language,
        vision=vision,
        projector=_projector_config(config, vision, projector_in(tensors, language.decoder), language.decoder, where),
        image=in_mode(image, image_mode or "original"),
    )


def _tower(path: Path, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], options: LoadOptions) -> Tower:
    where, named = path if path.is_file() else path / "config.json", config.get("mm_vision_tower")
    if not (options.vision_tower or named):
        raise CheckpointError(
            f"{where}: mm_vision_tower is not set; set vision_tower= (--vision-tower) to a CLIP folder or hub id, "
            "or vision=False (--no-vision) to load only the language model"
        )
    if inline := section(config, "vision_config", where):
        return Tower(None, inline, processor_config(path))
    name = options.vision_tower or own_tower(path) or named
    if str(name) == clip.OWN_TOWER_NAME:
        raise CheckpointError(
            f"{path / clip.OWN_TOWER}: is missing, and config.json says that the vision tower is there; copy the whole "
            "folder again, or set vision_tower= (--vision-tower) to a CLIP folder or hub id"
        )
    return find_tower(str(name), shapes_of(tensors), fetch=options.fetch_tower)


def _trained_tower(config: Mapping[str, Any]) -> bool:
    parts = str(config.get("mm_tunable_parts") or "").split(",")
    return bool(config.get("unfreeze_mm_vision_tower")) or "mm_vision_tower" in parts


def _projector_config(
    config: Mapping[str, Any],
    vision: VisionConfig,
    found: ProjectorConfig | None,
    decoder: DecoderConfig,
    where: Path,
) -> ProjectorConfig:
    """Returns the projector config of the tensors, `found`; without tensors, the config of `mm_projector_type`
    (default: linear) and `mm_hidden_size` (default: the tower's width). Logs a warning if the two differ.
    """
    depth = projector_depth(str(config.get("mm_projector_type") or "linear"))
    stated = ProjectorConfig(
        in_dim=config.get("mm_hidden_size") or vision.dim, out_dim=decoder.dim, depth=depth if found is None else 1
    )
    if found is None:
        return stated
    for key, value, used in (
        ("mm_projector_type", projector_type(depth), found.type),
        ("mm_hidden_size", stated.in_dim, found.in_dim),
    ):
        if value != used:
            log.warning("%s: %s is %s, but the projector's tensors show %s, which is used", where, key,
                        config.get(key, f"not set, which means {value}"), used)  # fmt: skip
    return found


def image_config(
    processor: Mapping[str, Any],
    vision: VisionConfig,
    *,
    aspect: str,
    pinpoints: tuple[tuple[int, int], ...] = (),
    merge: str = "flat",
) -> ImageConfig:
    """Builds an ImageConfig. `processor`: preprocessor_config.json, or {} for CLIP's values. Raises ConfigError."""
    size = side(processor.get("crop_size")) or side(processor.get("size"))
    return ImageConfig(
        size=size or vision.image_size,
        mean=_triple(processor, "image_mean", clip.MEAN),
        std=_triple(processor, "image_std", clip.STD),
        aspect=one_of(aspect, ("square", "pad", "anyres"), "config.json: image_aspect_ratio"),
        pinpoints=pinpoints,
        merge=one_of(merge, ("flat", "spatial", "spatial_unpad"), "config.json: mm_patch_merge_type"),
    )


def in_mode(image: ImageConfig, mode: ImageMode) -> ImageConfig:
    """Returns a copy of `image` that uses the image mode `mode`.

    LLaVA reads the pairs in the canvas list as (w, h), transformers as (h, w). The published list contains both
    orientations of each canvas, so only the order of the canvases differs; it decides which canvas wins a tie.
    """
    transposed = tuple((h, w) for w, h in image.pinpoints)
    same = mode == image.mode or set(transposed) != set(image.pinpoints)
    return replace(image, mode=mode, pinpoints=image.pinpoints if same else transposed)


def _triple(processor: Mapping[str, Any], key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = processor.get(key) or default
    try:
        r, g, b = map(float, value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"preprocessor_config.json: {key} is {value!r:.60}; expected three numbers") from None
    return r, g, b


def _pinpoints(value: Any) -> tuple[tuple[int, int], ...]:
    if isinstance(value, str):  # some derived checkpoints store the list as a string
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise ConfigError(f"config.json: image_grid_pinpoints is {value!r:.60}; expected a list of pairs") from None
    return tuple((int(w), int(h)) for w, h in value or ())


def _stored_dtype(config: Mapping[str, Any], stored: torch.dtype) -> DType:
    """Returns the dtype of the stored weights if `DType` includes it, else the config's torch_dtype, else float16."""
    stated = str(config.get("torch_dtype") or config.get("dtype") or "float16")
    known = get_args(DType)
    names = (str(name).removeprefix("torch.") for name in (stored, stated, "float16"))
    return cast(DType, next(name for name in names if name in known))


def _eos_ids(file: Path) -> tuple[int, ...]:
    """Reads eos_token_id from generation_config.json; the value in config.json is wrong in old checkpoints."""
    value = read_json_if_present(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    if not all(id is None or isinstance(id, int) for id in ids):
        raise CheckpointError(f"{file}: eos_token_id is {value!r}; expected an integer or a list of integers")
    return tuple(id for id in ids if id is not None)


def projector_in(tensors: Mapping[str, LazyTensor], decoder: DecoderConfig) -> ProjectorConfig | None:
    """Infers the config of the projector from its tensors, or returns None if there are none.

    The linear layers are numbered 0, 2, 4, …; the first one maps from the width of the vision features.
    """
    numbers = [int(name.split(".")[1]) for name in tensors if re.fullmatch(r"projector\.\d+\.weight", name)]
    first = tensors.get("projector.0.weight")
    if first is None or len(first.shape) != 2:
        return None
    return ProjectorConfig(in_dim=first.shape[1], out_dim=decoder.dim, depth=1 + max(numbers) // 2)


def vision_keys(config: LlavaConfig, vision_tower: str | None) -> dict[str, Any]:
    """Returns the config.json keys that describe the vision part of a LLaVA model. Raises ConfigError."""
    assert config.vision
    assert config.projector
    assert config.image
    if vision_tower is None:
        raise ConfigError(
            "LLaVA's config.json requires a vision tower; set vision_tower= (--vision-tower) to a CLIP folder or hub id"
        )
    if config.image.mode != "original":
        raise ConfigError(
            f"image mode {config.image.mode!r} cannot be saved: LLaVA's config.json has no key for the mode"
        )
    return {
        "use_mm_proj": True,
        "mm_vision_tower": vision_tower,
        "mm_hidden_size": config.projector.in_dim,
        "mm_projector_type": config.projector.type,
        "mm_vision_select_layer": config.vision.select_layer,
        "mm_vision_select_feature": config.vision.select_feature,
        "mm_use_im_start_end": config.start_end,
        "mm_use_im_patch_token": False,
        "mm_resampler_type": None,
        "mm_patch_merge_type": config.image.merge,
        "image_aspect_ratio": config.image.aspect,
        "image_grid_pinpoints": [list(size) for size in config.image.pinpoints] or None,
        "tokenizer_model_max_length": config.trained_seq,
        "tokenizer_padding_side": config.padding_side,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
    }
