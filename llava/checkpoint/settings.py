"""Foreign config.json files become a `LlavaConfig`. Shapes of tensors win over what a config says."""

import ast
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from llava.checkpoint import published
from llava.checkpoint.detect import MODE_KEY, TEMPLATE_KEY
from llava.config import DecoderConfig, DType, ImageConfig, ProjectorConfig, RopeScaling, VisionConfig
from llava.errors import CheckpointError, ConfigError

Shapes = Mapping[str, tuple[int, ...]]  # our tensor names -> shapes
ImageMode = Literal["original", "hf"]


def decoder_config(settings: Mapping[str, Any], shapes: Shapes, where: str) -> DecoderConfig:
    """A Llama's sizes; defaults are LlamaConfig's of transformers 4.37.2. Raises ConfigError."""
    dim = settings.get("hidden_size", 4096)
    n_heads = settings.get("num_attention_heads", 32)
    if settings.get("attention_bias") or settings.get("mlp_bias"):
        raise ConfigError(f"{where}: attention_bias or mlp_bias is on; this decoder has no biases")
    _one_of(settings.get("hidden_act", "silu"), ("silu",), f"{where}: hidden_act")
    positions = settings.get("max_position_embeddings") or settings.get("max_sequence_length") or 2048
    rope = table(settings, "rope_parameters", where)  # transformers 5 keeps theta and scaling together
    scaling = _rope_scaling(table(settings, "rope_scaling", where) or rope, positions, where)
    stretched = scaling is not None and scaling.kind in ("linear", "dynamic")
    return DecoderConfig(
        kind="llama",
        n_layers=settings.get("num_hidden_layers", 32),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=settings.get("num_key_value_heads") or n_heads,
        head_dim=settings.get("head_dim") or dim // n_heads,
        mlp_dim=settings.get("intermediate_size", 11008),
        vocab_size=shapes["decoder.embed.weight"][0] if "decoder.embed.weight" in shapes else settings["vocab_size"],
        max_seq=int(positions * scaling.factor) if scaling and stretched else positions,
        eps=settings.get("rms_norm_eps", 1e-6),
        rope_theta=settings.get("rope_theta") or rope.get("rope_theta") or 10000.0,
        rope_scaling=scaling,
        tied=settings.get("tie_word_embeddings", False),
    )


def mpt_config(settings: Mapping[str, Any], shapes: Shapes, where: str) -> DecoderConfig:
    """MPT's sizes; what is not stated is as in MPT-7B, for transformers from 4.37 on may save an empty attn_config.

    Raises ConfigError where this decoder does not compute what the config asks for.
    """
    attention = table(settings, "attn_config", where)
    for values, key, only in (
        (settings, "no_bias", True),
        (settings, "logit_scale", None),
        (settings, "embedding_fraction", 1.0),
        (attention, "alibi", True),
        (attention, "qk_ln", False),
        (attention, "prefix_lm", False),
        (attention, "softmax_scale", None),
        (attention, "attn_type", "multihead_attention"),
    ):
        if (value := values.get(key, only)) != only:
            raise ConfigError(f"{where}: {key} is {value!r}; this decoder has {only!r} alone")
    norms = ("low_precision_layernorm", "layernorm")
    _one_of(settings.get("norm_type", norms[0]), norms, f"{where}: norm_type")
    dim, n_heads = settings["d_model"], settings["n_heads"]
    return DecoderConfig(
        kind="mpt",
        n_layers=settings["n_layers"],
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        mlp_dim=dim * settings.get("expansion_ratio", 4),
        vocab_size=shapes["decoder.embed.weight"][0] if "decoder.embed.weight" in shapes else settings["vocab_size"],
        max_seq=settings.get("max_seq_len", 2048),
        eps=settings.get("layer_norm_epsilon", 1e-5),
        rope_theta=None,
        alibi_bias_max=attention.get("alibi_bias_max", 8),
        clip_qkv=attention.get("clip_qkv"),
        tied=True,
    )


def table(settings: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object within the config; absent, null and empty are one. Raises ConfigError."""
    value = settings.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} is {value!r:.60}; expected an object")
    return value


def _one_of(value: Any, known: tuple[str, ...], what: str) -> Any:
    if value not in known:
        raise ConfigError(f"{what} is {value!r}; expected one of {', '.join(known)}")
    return value


def _rope_scaling(values: Mapping[str, Any], positions: int, where: str) -> RopeScaling | None:
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return None
    return RopeScaling(
        kind=_one_of(kind, ("linear", "dynamic", "llama3"), f"{where}: rope scaling"),
        factor=float(values["factor"]),
        original_max_seq=values.get("original_max_position_embeddings") or positions,
        low_freq_factor=values.get("low_freq_factor", 1.0),
        high_freq_factor=values.get("high_freq_factor", 4.0),
    )


def vision_config(tower: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> VisionConfig:
    """`tower`: CLIP's config.json (or its vision_config); `settings`: the LLaVA's. Raises ConfigError."""
    sizes = table(tower, "vision_config", where) or tower
    feature = settings.get("mm_vision_select_feature", "patch")
    try:
        return VisionConfig(
            dim=sizes["hidden_size"],
            n_layers=sizes["num_hidden_layers"],
            n_heads=sizes["num_attention_heads"],
            mlp_dim=sizes["intermediate_size"],
            image_size=sizes["image_size"],
            patch_size=sizes["patch_size"],
            eps=sizes.get("layer_norm_eps", 1e-5),
            activation=sizes.get("hidden_act", "quick_gelu"),
            select_layer=settings.get("mm_vision_select_layer", -1),
            select_feature=_one_of(feature, ("patch", "cls_patch"), f"{where}: mm_vision_select_feature"),
        )
    except KeyError as key:
        raise ConfigError(
            f"{where}: is no CLIP config, it has no {key}; name a CLIP folder with vision_tower="
        ) from None


def tower_from_shapes(shapes: Shapes) -> dict[str, Any] | None:
    """A vision_config for a tower in the shards whose repository is out of reach; None if its heads are not known."""
    patch, pos = shapes.get("vision.patch.weight"), shapes.get("vision.pos")
    if not patch or not pos:
        return None
    n_layers = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"vision\.blocks\.(\d+)\.", name)))
    side = round((pos[0] - 1) ** 0.5)
    return published.clip_like(patch[0], n_layers, side * patch[2], patch[2])


def projector_config(settings: Mapping[str, Any], vision: VisionConfig, decoder: DecoderConfig) -> ProjectorConfig:
    """`linear`, `mlp{N}x_gelu` or `identity`; no key means linear."""
    kind = str(settings.get("mm_projector_type") or "linear")
    depth = {"linear": 1, "identity": 0}.get(kind)
    if depth is None:
        if not (match := re.fullmatch(r"mlp(\d+)x_gelu", kind)):
            raise ConfigError(f"config.json: mm_projector_type {kind!r}; expected linear, mlpNx_gelu or identity")
        depth = int(match[1])
    return ProjectorConfig(in_dim=settings.get("mm_hidden_size") or vision.dim, out_dim=decoder.dim, depth=depth)


def image_config(processor: Mapping[str, Any], settings: Mapping[str, Any], vision: VisionConfig) -> ImageConfig:
    """`processor`: the tower's preprocessor_config.json (may be empty: CLIP's published values)."""
    size = processor.get("crop_size") or processor.get("size") or vision.image_size
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge")
    aspect, merge = settings.get("image_aspect_ratio") or "square", settings.get("mm_patch_merge_type") or "flat"
    return ImageConfig(
        size=size or vision.image_size,
        mean=_triple(processor, "image_mean", published.CLIP_MEAN),
        std=_triple(processor, "image_std", published.CLIP_STD),
        aspect=_one_of(aspect, ("square", "pad", "anyres"), "config.json: image_aspect_ratio"),
        pinpoints=_pinpoints(settings.get("image_grid_pinpoints")),
        merge=_one_of(merge, ("flat", "spatial", "spatial_unpad"), "config.json: mm_patch_merge_type"),
    )


def in_mode(image: ImageConfig, mode: ImageMode) -> ImageConfig:
    """The same options with the other code's arithmetic.

    transformers reads the published list of canvases as (h, w) where LLaVA reads (w, h): the sizes are the same, as
    the list holds each with its mirror image, but ties fall on the other one.
    """
    mirrored = tuple((h, w) for w, h in image.pinpoints)
    same = mode == image.mode or set(mirrored) != set(image.pinpoints)
    return replace(image, mode=mode, pinpoints=image.pinpoints if same else mirrored)


def _triple(processor: Mapping[str, Any], key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = processor.get(key) or default
    try:
        r, g, b = map(float, value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"preprocessor_config.json: {key} is {value!r:.60}; expected three numbers") from None
    return r, g, b


def _pinpoints(value: Any) -> tuple[tuple[int, int], ...]:
    if isinstance(value, str):  # some derivatives store the list as text
        try:
            value = ast.literal_eval(value)
        except (
            ValueError,
            TypeError,
            SyntaxError,
            RecursionError,
            MemoryError,
        ):  # what literal_eval is documented to raise
            raise ConfigError(f"config.json: image_grid_pinpoints is {value!r:.60}; expected a list of pairs") from None
    return tuple((int(w), int(h)) for w, h in value or ())


def stored_dtype(settings: Mapping[str, Any], seen: torch.dtype) -> DType:
    """The type of the weights: as they are stored if that is one to compute in, else what the config states."""
    stated = str(settings.get("torch_dtype") or settings.get("dtype") or "float16")
    known = get_args(DType)
    names = (str(name).removeprefix("torch.") for name in (seen, stated, "float16"))
    return cast(DType, next(name for name in names if name in known))


def end_ids(folder: Path, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """eos of generation_config.json, one id or several. config.json's is wrong in old checkpoints and not read."""
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    if not all(id is None or isinstance(id, int) for id in ids):
        raise CheckpointError(
            f"{folder / 'generation_config.json'}: eos_token_id is {value!r}; expected a number or a list"
        )
    return tuple(id for id in ids if id is not None)


def flat(settings: Mapping[str, Any], processor: Mapping[str, Any], where: str) -> dict[str, Any]:
    """llava-hf's config.json with the keys of the original's, the tower's config among them under `vision_config`.

    Raises ConfigError for what LLaVA does not compute.
    """
    text, vision = (table(settings, key, where) for key in ("text_config", "vision_config"))
    layer, strategy = settings.get("vision_feature_layer", -2), settings.get("vision_feature_select_strategy")
    if not isinstance(layer, int):
        raise ConfigError(f"{where}: vision_feature_layer is {layer!r}; this tower hands on one layer alone")
    if (act := settings.get("projector_hidden_act", "gelu")) != "gelu":
        raise ConfigError(f"{where}: projector_hidden_act is {act!r}; expected gelu")
    features = {"default": "patch", "full": "cls_patch", None: "patch"}
    if strategy not in features:
        raise ConfigError(f"{where}: vision_feature_select_strategy is {strategy!r}; expected default or full")
    grid = settings.get("image_grid_pinpoints") or processor.get("image_grid_pinpoints")
    aspect = "anyres" if grid else "pad"  # in transformers' way with pictures, the middle square instead of a pad
    kept = ("tokenizer_model_max_length", "tokenizer_padding_side", MODE_KEY, TEMPLATE_KEY)  # of folders that we wrote
    return {
        **{key: value for key, value in text.items() if key != "architectures"},  # the language model's own say nothing
        "torch_dtype": settings.get("torch_dtype") or settings.get("dtype") or text.get("torch_dtype"),
        "tie_word_embeddings": bool(settings.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        "vision_config": {**published.CLIP_DEFAULTS, **vision},
        "mm_vision_tower": published.clip_id(vision) or "the one inside",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": features[strategy],
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": settings.get("image_aspect_ratio") or aspect,
        "image_grid_pinpoints": grid,
        "mm_patch_merge_type": "spatial_unpad" if grid else "flat",
        **{key: settings[key] for key in kept if key in settings},
    }


def mode_of(settings: Mapping[str, Any], processor: Mapping[str, Any]) -> ImageMode:
    """Of a llava-hf folder: as recorded, else transformers' own way, but for the processor that pads as LLaVA does."""
    if (recorded := settings.get(MODE_KEY)) is not None:
        return cast(ImageMode, _one_of(recorded, get_args(ImageMode), f"config.json: {MODE_KEY}"))
    pads = processor.get("image_processor_type") == "LlavaImageProcessor" and processor.get("do_pad")
    return "original" if pads else "hf"
