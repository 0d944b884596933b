"""CLIP: key table, published configs, and functions that find, read and write a LLaVA model's vision tower."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.config import ImageConfig, LlavaConfig, VisionConfig
from llava.errors import CheckpointError, ConfigError
from llava.formats.config_keys import ConfigKeys, words
from llava.formats.format import CheckpointFiles, Format, Shapes, one_of, resolved_by, section, to_disk
from llava.tensors.atomic import new_folder
from llava.tensors.files import read_json, read_json_if_present
from llava.tensors.hub import locate
from llava.tensors.keymap import Rule, plan, prefixed
from llava.tensors.lazy import InMemory, LazyTensor
from llava.tensors.shards import open_weights
from llava.tensors.writer import write_json, write_shards

log = logging.getLogger(__name__)

TOWER = (
    Rule("embeddings.class_embedding", "vision.cls"),
    Rule("embeddings.patch_embedding.weight", "vision.patch.weight"),
    Rule("embeddings.position_embedding.weight", "vision.pos"),
    Rule("embeddings.position_ids", None),  # 0, 1, 2, …
    Rule("pre_layrnorm.weight", "vision.pre_norm.weight"),  # spelled this way in CLIP checkpoints
    Rule("pre_layrnorm.bias", "vision.pre_norm.bias"),
    *(
        Rule(f"encoder.layers.*.{disk}.{param}", f"vision.blocks.*.{ours}.{param}")
        for disk, ours in (
            ("layer_norm1", "attn_norm"),
            ("self_attn.{q,k,v}_proj", "attn.qkv"),
            ("self_attn.out_proj", "attn.out"),
            ("layer_norm2", "mlp_norm"),
            ("mlp.fc1", "mlp.up"),
            ("mlp.fc2", "mlp.down"),
        )
        for param in ("weight", "bias")
    ),
    Rule("post_layernorm.weight", "vision.post_norm.weight"),  # applied after the layers that LLaVA uses
    Rule("post_layernorm.bias", "vision.post_norm.bias"),
)
RULES = (
    *prefixed("vision_model.", TOWER),
    *TOWER,  # transformers 5 may omit the prefix
    Rule("text_model.**", None),
    Rule("visual_projection.weight", None),
    Rule("text_projection.weight", None),
    Rule("logit_scale", None),
)

_CLIP_L = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
PUBLISHED: dict[str, dict[str, Any]] = {  # hub id -> vision_config
    "openai/clip-vit-large-patch14": _CLIP_L | {"image_size": 224},
    "openai/clip-vit-large-patch14-336": _CLIP_L | {"image_size": 336},
}
DEFAULTS: dict[str, Any] = {  # CLIPVisionConfig's defaults in transformers, for keys missing from config.json
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 32,
    "image_size": 224,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
KEYS = ConfigKeys(  # of a tower's config.json or its vision_config
    used=words(
        "hidden_size num_hidden_layers num_attention_heads intermediate_size image_size patch_size layer_norm_eps "
        "hidden_act vision_config"
    ),
    only={"model_type": ("clip", "clip_vision_model"), "num_channels": (3,)},
    no_effect=words(
        "projection_dim text_config text_config_dict vision_config_dict logit_scale_init_value text_projection_dim "
        "vocab_size"
    ),  # of CLIP's text model and its comparison with images
)
PROCESSOR_KEYS = ConfigKeys(  # of preprocessor_config.json
    used=words("size crop_size image_mean image_std do_pad image_grid_pinpoints"),
    only={
        "image_processor_type": tuple(
            f"{name}{suffix}"
            for name in ("CLIPImageProcessor", "LlavaImageProcessor", "LlavaNextImageProcessor", "CLIPFeatureExtractor")
            for suffix in ("", "Fast", "Pil")
        ),
        "do_resize": (True,),
        "do_center_crop": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "resample": (3,),
        "rescale_factor": (1 / 255,),
    },
    no_effect=words(
        "feature_extractor_type processor_class do_convert_rgb default_to_square data_format input_data_format device "
        "return_tensors disable_grouping _valid_processor_keys use_fast image_seq_length aspect_ratio_setting"
    ),
)
MEAN = (0.48145466, 0.4578275, 0.40821073)  # from preprocessor_config.json of the `PUBLISHED` towers
STD = (0.26862954, 0.26130258, 0.27577711)
OWN_TOWER = "vision_tower"  # subfolder in which a checkpoint stores its own tower
OWN_TOWER_NAME = f"./{OWN_TOWER}"  # `mm_vision_tower` of such a checkpoint: relative, because folders are moved


class Clip(Format):
    """A CLIP repository. It is detected but not loaded as a model, because it is used only as a vision tower."""

    name = "clip"
    reads = False

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        return RULES

    def detect(self, files: CheckpointFiles) -> list[str]:
        model_type = str(files.config.get("model_type", ""))
        return [f"config.json: model_type = {model_type}"] if model_type.startswith("clip") else []


# --------------------------------------------------------------------------------------------------- finding a tower


@dataclass(frozen=True)
class Tower:
    """The config files of a vision tower."""

    folder: Path | None  # None: `config` is a published config or comes from the checkpoint's config.json
    config: Mapping[str, Any]  # config.json or its vision_config
    processor: Mapping[str, Any]  # preprocessor_config.json; if empty, CLIP's published values apply


def own_tower(folder: Path) -> Path | None:
    """Returns the subfolder in which a checkpoint stores its own tower, or None if there is no such subfolder."""
    return folder / OWN_TOWER if (folder / OWN_TOWER / "config.json").is_file() else None


def find_tower(name: str, shapes: Shapes, *, fetch: bool = True) -> Tower:
    """Finds the tower `name` (a folder or hub id) of a checkpoint whose tensors have these shapes.

    The tower's weights are downloaded only if `fetch` is true and the checkpoint does not contain them. If `fetch` is
    false, a tower in `PUBLISHED` that the checkpoint does not contain needs no download at all. If the config cannot be
    found or downloaded, CLIP-L's config is used for a tower inside the checkpoint with CLIP-L's width and depth; for
    any other tower, raises CheckpointError.
    """
    inside = "vision.cls" in shapes
    if family := _other_family(name):
        raise CheckpointError(f"vision tower {name}: is a {family} model; this version supports only CLIP towers")
    if not fetch and not inside and not Path(name).is_dir() and name in PUBLISHED:
        return Tower(None, PUBLISHED[name], {})
    try:
        folder = locate(name, weights=fetch and not inside, what="vision tower")
    except CheckpointError as error:
        if inside and (sizes := _config_from_shapes(shapes)):
            log.warning("%s; the checkpoint's own tower has CLIP-L's sizes, so CLIP-L's config is used", error)
            return Tower(None, sizes, {})
        heads = "; the checkpoint contains the tower's weights, but not its number of heads" if inside else ""
        raise CheckpointError(f"{error}{heads}; set vision_tower= (--vision-tower) to a CLIP folder") from None
    return Tower(folder, read_json(folder / "config.json"), processor_config(folder))


def _other_family(name: str) -> str | None:
    """Returns the family of a tower that is not CLIP, from the hub id recorded in config.json."""
    if Path(name).expanduser().exists() or name.count("/") != 1:
        return None
    repository = name.split("/")[1].lower()
    return next((family for family in _OTHER_FAMILIES if family.lower() in repository), None)


_OTHER_FAMILIES = ("SigLIP", "DINOv2", "DINOv3", "EVA", "InternViT", "ConvNeXt", "ImageBind", "LanguageBind")


def processor_config(folder: Path) -> dict[str, Any]:
    """Returns preprocessor_config.json, or {} (meaning CLIP's published values) if there is none.

    Transformers 5 stores it as `image_processor` in processor_config.json, which it prefers to an older file. Raises
    ConfigError for a processor that does something else than CLIP's.
    """
    file, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
    if own := section(read_json_if_present(nested), "image_processor", nested):
        file, processor = nested, dict(own)
    else:
        processor = read_json_if_present(file)
    PROCESSOR_KEYS.check(processor, file)
    size, crop = processor.get("size"), processor.get("crop_size")
    is_other_resize = isinstance(size, Mapping) and set(size) != {"shortest_edge"}
    if is_other_resize or _is_oblong(crop) or (size and crop and side(size) != side(crop)):
        raise ConfigError(
            f"{file}: size is {size!r:.80} and crop_size is {crop!r:.80}; this version supports only a resize of the "
            "shortest edge, and a square crop of the same size"
        )
    return processor


def side(size: Any) -> Any:
    """Returns the height or shortest edge in pixels of a size in preprocessor_config.json."""
    return size.get("height") or size.get("shortest_edge") if isinstance(size, Mapping) else size


def _is_oblong(size: Any) -> bool:
    return isinstance(size, Mapping) and size.get("height") != size.get("width")


def read_tower(folder: Path, *, needed: bool = True) -> dict[str, LazyTensor]:
    """Returns a CLIP folder's tensors. Raises CheckpointError if any is unknown, or if `needed` and there are none."""
    weights = open_weights(folder)
    if not weights and needed:
        raise CheckpointError(
            f"{folder}: contains no vision tower weights; set vision_tower= (--vision-tower) to a folder with weights"
        )
    resolved = resolved_by(plan(weights, RULES), weights)
    if resolved.unknown:
        raise unknown_tensors(resolved.unknown)
    return resolved.tensors


def unknown_tensors(files: Mapping[str, Path]) -> CheckpointError:
    """Returns the error to raise for tensors that no rule matches. `files` maps tensor names to files."""
    names = list(files)
    return CheckpointError(f"{files[names[0]]}: contains tensors that are not part of this format: {some(names)}")


def some(names: Sequence[str]) -> str:
    """Returns the first names of a list, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ------------------------------------------------------------------------------------------------------------- sizes


def vision_config(
    tower: Mapping[str, Any], where: object, *, select_layer: int = -1, select_feature: str = "patch"
) -> VisionConfig:
    """Combines CLIP's config.json (or its vision_config) with LLaVA's feature selection. Raises ConfigError."""
    sizes = section(tower, "vision_config", where) or tower
    for part in (sizes,) if sizes is tower else (tower, sizes):
        if (model_type := part.get("model_type", "clip")) not in KEYS.only["model_type"]:
            raise ConfigError(
                f"{where}: the vision tower has model_type {model_type!r:.60}; this version supports only CLIP towers"
            )
        KEYS.check(part, where)
    if "model_type" in sizes:  # transformers may omit default values
        sizes = {**DEFAULTS, **sizes}
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
            select_layer=select_layer,
            select_feature=one_of(select_feature, ("patch", "cls_patch"), f"{where}: mm_vision_select_feature"),
        )
    except KeyError as key:
        raise ConfigError(
            f"{where}: is not a CLIP config ({key} is missing); set vision_tower= (--vision-tower) to a CLIP folder"
        ) from None


def published_id(sizes: Mapping[str, Any]) -> str | None:
    """Returns the hub id of the published CLIP model with these sizes, or None."""
    for name, known in PUBLISHED.items():
        if all(sizes.get(key, DEFAULTS[key]) == value for key, value in known.items()):
            return name
    return None


def tower_of_projector(in_dim: int, depth: int) -> str | None:
    """Returns the hub id of the CLIP tower used by published projectors with `depth` layers, or None if unknown."""
    if in_dim != _CLIP_L["hidden_size"]:
        return None
    return "openai/clip-vit-large-patch14" if depth == 1 else "openai/clip-vit-large-patch14-336"


def _config_from_shapes(shapes: Shapes) -> dict[str, Any] | None:
    """Returns CLIP-L's vision_config if the tower has CLIP-L's width and depth, else None.

    n_heads cannot be read from shapes, so other towers are not supported. The last layer may be missing: LLaVA does
    not use it, and towers saved after training do not contain it.
    """
    patch, positions = shapes.get("vision.patch.weight"), shapes.get("vision.pos")
    if not patch or not positions:
        return None
    n_layers = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"vision\.blocks\.(\d+)\.", name)))
    if _CLIP_L["num_hidden_layers"] not in (n_layers, n_layers + 1):
        return None
    if (patch[0], patch[2]) != (_CLIP_L["hidden_size"], _CLIP_L["patch_size"]):
        return None
    return _CLIP_L | {"image_size": round((positions[0] - 1) ** 0.5) * patch[2]}


# ----------------------------------------------------------------------------------------------------------- writing


def write_tower(folder: Path, config: LlavaConfig, tensors: Mapping[str, Tensor]) -> None:
    """Writes a model's vision tower (`vision.*` of `tensors`) to a CLIP folder that `mm_vision_tower` can refer to.

    The config counts all layers, even unused ones absent from `tensors`. Raises ConfigError or CheckpointError.
    """
    if config.vision is None or config.image is None:
        raise ConfigError(f"{folder}: cannot write a vision tower, because the model has none")
    tower = {n: InMemory(tensor=t, origin=n) for n, t in tensors.items() if n.startswith("vision.")}
    outputs = to_disk(tower, config, prefixed("vision_model.", TOWER))
    with new_folder(folder, sum(tensor.n_bytes for tensor in outputs)) as partial:
        write_shards(partial, outputs)
        write_json(partial / "config.json", clip_config(config.vision))
        write_json(partial / "preprocessor_config.json", clip_processor(config.image))


def clip_config(sizes: VisionConfig) -> dict[str, Any]:
    """Returns a CLIPVisionConfig with all sizes set explicitly."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.mlp_dim,
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": sizes.n_heads,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "layer_norm_eps": sizes.eps,
        "hidden_act": sizes.activation,
    }


def clip_processor(image: ImageConfig) -> dict[str, Any]:
    """Returns CLIP's preprocessor_config.json, which resizes the shortest edge and then crops the center."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image.size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image.size, "width": image.size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
