"""What is known of published CLIPs and base models and can not be read from a checkpoint's own files."""

from collections.abc import Mapping
from typing import Any

_CLIP_L = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
CLIP_CONFIGS: dict[str, dict[str, Any]] = {  # their vision_config, by hub id
    "openai/clip-vit-large-patch14": _CLIP_L | {"image_size": 224},
    "openai/clip-vit-large-patch14-336": _CLIP_L | {"image_size": 336},
}
CLIP_DEFAULTS: dict[str, Any] = {  # of transformers' CLIPVisionConfig, for what a config.json leaves out
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 32,
    "image_size": 224,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of both repositories' preprocessor_config.json
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_like(dim: int, n_layers: int, image_size: int, patch_size: int) -> dict[str, Any] | None:
    """The published CLIP-L config that a tower of these sizes follows, None if none does.

    Tensors do not show the number of heads; width and depth do where they are CLIP-L's. The last layer may be missing:
    LLaVA does not read it, and what we write of a trained tower has none.
    """
    deep = _CLIP_L["num_hidden_layers"] in (n_layers, n_layers + 1)
    if not deep or (dim, patch_size) != (_CLIP_L["hidden_size"], _CLIP_L["patch_size"]):
        return None
    return _CLIP_L | {"image_size": image_size}


def clip_id(sizes: Mapping[str, Any]) -> str | None:
    """The published CLIP of these sizes, None if there is none."""
    for name, known in CLIP_CONFIGS.items():
        if all(sizes.get(key, CLIP_DEFAULTS[key]) == value for key, value in known.items()):
            return name
    return None


def tower_of(in_dim: int, depth: int) -> str | None:
    """The tower of published projectors of that input width: linear ones from the time of 224 pixels, or MLPs."""
    if in_dim != _CLIP_L["hidden_size"]:
        return None
    return "openai/clip-vit-large-patch14" if depth == 1 else "openai/clip-vit-large-patch14-336"


def is_llama_2_chat(repository: str) -> bool:
    """Whether a repository id written inside a file names Meta's Llama-2-chat: weak evidence, to break a tie."""
    name = repository.lower().rsplit("/", 1)[-1]
    return name.startswith("llama-2-") and "-chat" in name
