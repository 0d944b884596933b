"""The same models in transformers, sharing the memory of our weights, and a check that the results agree."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from result import OURS, PEER
from shapes import hub_sizes
from timing import Target
from torch import Tensor

from llava.config import LlavaConfig, VisionConfig
from llava.formats.clip import RULES as CLIP
from llava.formats.llama import RULES as HF_LLAMA
from llava.tensors import keymap

_PROJECTOR = tuple(
    keymap.Rule(f"multi_modal_projector.linear_{i + 1}.{kind}", f"projector.{2 * i}.{kind}")
    for i in range(2)
    for kind in ("weight", "bias")
)


def hub_tensors(ours: Mapping[str, Tensor], n_blocks: int = 0) -> dict[str, Tensor]:
    """Views of our tensors under the hub's names, without the prefixes of a complete model.

    transformers runs all `n_blocks` blocks of the tower, ours only those that LLaVA needs: the missing blocks are
    views of our last one.
    """
    found: dict[str, Tensor] = {}
    rules = (*_PROJECTOR, *HF_LLAMA, *CLIP)
    for name, tensor in ours.items():
        names = keymap.disk_names(name, rules)
        found |= {_without_prefix(hub): part for hub, part in zip(names, tensor.chunk(len(names)), strict=True)}
    blocks = [int(match[1]) for name in found if (match := re.match(r"encoder\.layers\.(\d+)\.", name))]
    for i in range(max(blocks, default=0) + 1, n_blocks):
        last = f"encoder.layers.{max(blocks)}."
        found |= {name.replace(last, f"encoder.layers.{i}."): t for name, t in found.items() if name.startswith(last)}
    if blocks:
        found |= {f"post_layernorm.{kind}": found[f"pre_layrnorm.{kind}"] for kind in ("weight", "bias")}
    return found


def _without_prefix(name: str) -> str:
    """A tensor name without the prefixes that differ between releases and classes of transformers."""
    return re.sub(r"^(model\.)?(language_model\.|vision_tower\.)?(model\.)?(vision_model\.)?", "", name)


def peer_configs(config: LlavaConfig) -> tuple[Any, Any]:
    """transformers' LlamaConfig and CLIPVisionConfig; the latter is None without a tower."""
    from transformers import CLIPVisionConfig, LlamaConfig

    sizes = config.decoder
    llama = LlamaConfig(
        **hub_sizes(sizes),
        max_position_embeddings=sizes.max_seq,
        rms_norm_eps=sizes.eps,
        tie_word_embeddings=False,
    )
    return llama, CLIPVisionConfig(**clip_settings(config.vision)) if config.vision else None


def clip_settings(tower: VisionConfig) -> dict[str, Any]:
    """The sizes of a tower as keys of a CLIPVisionConfig."""
    return {
        "hidden_size": tower.dim,
        "intermediate_size": tower.mlp_dim,
        "num_hidden_layers": tower.n_layers,
        "num_attention_heads": tower.n_heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.eps,
    }


def peer(cls: Any, settings: Any, tensors: Mapping[str, Tensor], target: Target) -> Any:
    """Builds a transformers model with its default attention and `tensors` as its weights."""
    with torch.device("meta"):
        model = cls(settings)
    state = {name: tensors[_without_prefix(name)] for name in model.state_dict()}
    model.load_state_dict(state, strict=True, assign=True)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                setattr(module, name, type(child)(child.config).to(target.device))
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=target.device)[None]
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"still on the meta device: {left}"
    return model.requires_grad_(False).eval()


TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-2}


def check_agreement(ours: Tensor, theirs: Tensor, target: Target) -> float:
    """Returns |ours - theirs| / |theirs|; ends the program if it exceeds the tolerance of the dtype."""
    a, b = ours.float(), theirs.float()
    assert a.shape == b.shape, f"{OURS} gives {list(a.shape)}, {PEER} {list(b.shape)}"
    error = float((a - b).norm() / b.norm())
    limit = TOLERANCES[target.dtype]
    print(f"relative difference of {OURS} and {PEER}: {error:.2e} (limit {limit:.0e})")
    if not error <= limit:
        raise SystemExit("the results disagree; nothing is timed")
    return error
