"""The layout of the published LLaVAs, written: names of tensors, config.json with every key, tokenizer files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llava.checkpoint import keymap, published
from llava.checkpoint.detect import TEMPLATE_KEY, is_mistral
from llava.checkpoint.keymap import Rule
from llava.checkpoint.open import Checkpoint
from llava.checkpoint.source import Given, Source
from llava.checkpoint.tower import OWN_TOWER
from llava.checkpoint.write import (
    MAX_SHARD_BYTES,
    Item,
    Progress,
    new_folder,
    silent,
    write_json,
    write_safetensors,
    write_shards,
)
from llava.config import ImageConfig, LlavaConfig, ProjectorConfig, VisionConfig
from llava.convert import llama
from llava.convert.tokenizer import copy_tokenizer
from llava.convert.torchzip import write_torch
from llava.errors import CheckpointError, ConfigError
from llava.formats.tokenizer import load_tokenizer
from llava.model.llava import shapes
from llava.preprocess.tokenizer import Tokenizer

Form = Literal["safetensors", "bin"]
WRITERS = {"safetensors": write_safetensors, "bin": write_torch}


def write_merged(
    folder: Path,
    config: LlavaConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer_from: Path,
    vision_tower: str | None,
    tower_inside: bool = False,
    form: Form = "safetensors",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    recorded: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> None:
    """A model in memory as a merged LLaVA, in the type that `config` names; a plain language model if it has no tower.

    tensors: by our names, on any device. tokenizer_from: a folder with the tokenizer's files. vision_tower: CLIP's
    folder or hub id, which config.json names. tower_inside: `vision.*` goes into the shards, as where it was trained.
    recorded: further keys of config.json. Raises ConfigError, CheckpointError; a folder that failed is not left behind.
    """
    settings = llava_settings(config, load_tokenizer(tokenizer_from), vision_tower)
    settings |= {"unfreeze_mm_vision_tower": True} if tower_inside else {}
    inside = [name for name in shapes(config) if tower_inside or not name.startswith("vision.")]
    if lacking := [name for name in inside if name not in tensors]:
        raise CheckpointError(f"{folder}: can not be written: {lacking[0]} is not among the tensors given")
    # blocks behind the selected layer may come along: CLIP's own loaders want them
    inside += [name for name in tensors if tower_inside and name.startswith("vision.") and name not in inside]
    dtype = getattr(torch, config.dtype)
    written = [replace(item, dtype=dtype) for item in named({name: tensors[name] for name in inside}, config)]
    with new_folder(folder, sum(item.n_bytes for item in written)) as partial:
        write_shards(partial, written, progress, max_bytes=max_shard_bytes, writer=WRITERS[form])
        write_json(partial / "config.json", settings | dict(recorded or {}))
        copy_tokenizer(tokenizer_from, partial)
        write_json(partial / "generation_config.json", _generation_settings(config, settings))


def write_tower(folder: Path, config: LlavaConfig, tensors: Mapping[str, Tensor]) -> None:
    """A model's vision tower as a CLIP folder, for `vision_tower=` and `mm_vision_tower`; `vision.*` of `tensors`.

    Of a tower that LLaVA read up to some layer, the config tells all layers and the weights hold what there is.
    """
    if config.vision is None or config.image is None:
        raise ConfigError(f"{folder}: can not be written: this model has no vision tower")
    tower = {name: _given(name, tensor) for name, tensor in tensors.items() if name.startswith("vision.")}
    written = llama.taken_apart(tower, config, keymap.prefixed("vision_model.", keymap.CLIP_TOWER))
    with new_folder(folder, sum(item.n_bytes for item in written)) as partial:
        write_shards(partial, written)
        write_json(partial / "config.json", clip_settings(config.vision))
        write_json(partial / "preprocessor_config.json", processor_settings(config.image))


def items(checkpoint: Checkpoint) -> list[Item]:
    """All tensors under the layout's names; the tower's where the folder itself holds them."""
    kept = {name: source for name, source in checkpoint.sources.items() if not name.startswith("vision.")}
    if checkpoint.tower_inside:
        kept = checkpoint.sources | checkpoint.rest_of_tower
    return llama.taken_apart(kept, checkpoint.config, rules_of(checkpoint.config))


def config(checkpoint: Checkpoint, target: Path) -> dict[str, Any]:
    """config.json of a checkpoint that is written into `target`."""
    settings = llava_settings(checkpoint.config, checkpoint.tokenizer, tower_name(checkpoint, target))
    return settings | {"unfreeze_mm_vision_tower": checkpoint.tower_inside}


def tower_name(checkpoint: Checkpoint, target: Path, *, beside: bool = False) -> str | None:
    """What `mm_vision_tower` is to say: the tower named, or one that `write_own_tower` puts into `target`.

    A tower inside the shards needs only its config from there: of published sizes, a published CLIP tells it as well.
    `beside`: the shards do not come along, so its weights are needed too.
    """
    if checkpoint.config.vision is None:
        return None
    if not checkpoint.tower_inside:
        return checkpoint.vision_tower
    known = None if beside else published.clip_id(clip_settings(checkpoint.config.vision))
    return known or str(target.expanduser().absolute() / OWN_TOWER)


def write_own_tower(checkpoint: Checkpoint, folder: Path, *, beside: bool = False) -> None:
    """The folder inside `folder` that `tower_name` names, where it names one."""
    vision = checkpoint.config.vision
    if vision and checkpoint.tower_inside and (beside or published.clip_id(clip_settings(vision)) is None):
        every = checkpoint.sources | checkpoint.rest_of_tower
        write_tower(
            folder / OWN_TOWER, checkpoint.config, {n: s.read() for n, s in every.items() if n.startswith("vision.")}
        )


def named(tensors: Mapping[str, Tensor], config: LlavaConfig) -> list[Item]:
    """Tensors in memory under the layout's names, each in its own type; a tied head is left out."""
    sources = {name: _given(name, tensor) for name, tensor in tensors.items()}
    if config.decoder.tied:
        sources.pop("decoder.head.weight", None)
    return llama.taken_apart(sources, config, rules_of(config))


def _given(name: str, tensor: Tensor) -> Source:
    return Given(tensor=tensor, what=name)


def rules_of(config: LlavaConfig, linear: bool | None = None) -> tuple[Rule, ...]:
    """Names on disk for this model. The only layer of a `linear` projector (default: the config's) is not numbered."""
    rules = keymap.LLAVA_MPT if config.decoder.kind == "mpt" else keymap.LLAVA
    if linear is None:
        linear = config.projector is not None and config.projector.depth == 1
    return tuple(rule for rule in rules if not (linear and rule.ours and rule.ours.startswith("projector.*")))


# -------------------------------------------------------------------------------------------------- config.json


def llava_settings(config: LlavaConfig, tokenizer: Tokenizer | None, vision_tower: str | None) -> dict[str, Any]:
    """config.json of a LLaVA with every key that the original and we read. Raises ConfigError.

    `llava_template`, which others pass over, keeps the template: the original guesses it from the folder's name.
    """
    mpt = config.decoder.kind == "mpt"
    settings = _mpt_settings(config) if mpt else llama.settings(config, tokenizer)
    if config.template:
        settings[TEMPLATE_KEY] = config.template
    if config.vision is None or config.projector is None or config.image is None:
        return settings
    if vision_tower is None:
        raise ConfigError("a LLaVA's config.json names its vision tower: pass vision_tower=, a CLIP folder or hub id")
    if config.image.mode != "original":
        raise ConfigError(
            f"image mode {config.image.mode!r} can not be written in the original's layout, which has no key"
        )
    family = "Mpt" if mpt else "Mistral" if is_mistral(config.decoder) else "Llama"
    return settings | {
        "architectures": [f"Llava{family}ForCausalLM"],
        "model_type": {"Mpt": "llava_mpt", "Mistral": "llava_mistral"}.get(family, "llava"),
        "use_mm_proj": True,
        "mm_vision_tower": vision_tower,
        "mm_hidden_size": config.projector.in_dim,
        "mm_projector_type": _projector_type(config.projector),
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


def _projector_type(projector: ProjectorConfig) -> str:
    return {0: "identity", 1: "linear"}.get(projector.depth, f"mlp{projector.depth}x_gelu")


def _mpt_settings(config: LlavaConfig) -> dict[str, Any]:
    sizes = config.decoder
    return {
        "architectures": ["MPTForCausalLM"],
        "model_type": "mpt",
        "d_model": sizes.dim,
        "n_layers": sizes.n_layers,
        "n_heads": sizes.n_heads,
        "expansion_ratio": sizes.mlp_dim // sizes.dim,
        "max_seq_len": sizes.max_seq,
        "vocab_size": sizes.vocab_size,
        "no_bias": True,
        "layer_norm_epsilon": sizes.eps,
        "attn_config": {"alibi": True, "alibi_bias_max": sizes.alibi_bias_max, "clip_qkv": sizes.clip_qkv},
        "torch_dtype": config.dtype,
    }


def _generation_settings(config: LlavaConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: the ids that end an answer besides the tokenizer's own."""
    ends = list(config.eos_ids)
    known = {key: settings[key] for key in ("bos_token_id",) if settings.get(key) is not None}
    return {"_from_model_config": True, **known} | (
        {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    )


def clip_settings(sizes: VisionConfig) -> dict[str, Any]:
    """A CLIPVisionConfig."""
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


def processor_settings(image: ImageConfig) -> dict[str, Any]:
    """preprocessor_config.json of a CLIP: shortest edge, then the middle square."""
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
