"""Names of tensors on disk and ours, as tables. Code that reads a table does not know one format from another."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from llava.errors import CheckpointError


@dataclass(frozen=True)
class Rule:
    """Tensors on disk that make one of ours. `*` is a number, `**` anything; of {q,k,v} all are stacked by rows."""

    disk: str
    ours: str | None  # None: known, and not needed

    def parts(self) -> list[str]:
        """The patterns of the tensors that are stacked, in order; one where nothing is."""
        if not (braces := re.search(r"{(.*)}", self.disk)):
            return [self.disk]
        return [self.disk.replace(braces[0], part) for part in braces[1].split(",")]


def prefixed(prefix: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same table for tensors that lie deeper on disk."""
    return tuple(replace(rule, disk=prefix + rule.disk) for rule in rules)


HF_LLAMA_LAYERS = (
    Rule("embed_tokens.weight", "decoder.embed.weight"),
    Rule("layers.*.input_layernorm.weight", "decoder.blocks.*.attn_norm.weight"),
    Rule("layers.*.self_attn.{q,k,v}_proj.weight", "decoder.blocks.*.attn.qkv.weight"),
    Rule("layers.*.self_attn.o_proj.weight", "decoder.blocks.*.attn.out.weight"),
    Rule("layers.*.self_attn.rotary_emb.inv_freq", None),  # recomputed; rounded to 16 bits or zero in some checkpoints
    Rule("layers.*.post_attention_layernorm.weight", "decoder.blocks.*.mlp_norm.weight"),
    Rule("layers.*.mlp.gate_proj.weight", "decoder.blocks.*.mlp.gate.weight"),
    Rule("layers.*.mlp.up_proj.weight", "decoder.blocks.*.mlp.up.weight"),
    Rule("layers.*.mlp.down_proj.weight", "decoder.blocks.*.mlp.down.weight"),
    Rule("norm.weight", "decoder.norm.weight"),
)
HF_LLAMA = (*prefixed("model.", HF_LLAMA_LAYERS), Rule("lm_head.weight", "decoder.head.weight"))

META = (  # Meta's own; what model-parallel shards hold parts of is joined in meta.py
    Rule("tok_embeddings.weight", "decoder.embed.weight"),
    Rule("layers.*.attention_norm.weight", "decoder.blocks.*.attn_norm.weight"),
    Rule("layers.*.attention.w{q,k,v}.weight", "decoder.blocks.*.attn.qkv.weight"),
    Rule("layers.*.attention.wo.weight", "decoder.blocks.*.attn.out.weight"),
    Rule("layers.*.attention.inner_attention.rope.freqs", None),  # recomputed
    Rule("layers.*.ffn_norm.weight", "decoder.blocks.*.mlp_norm.weight"),
    Rule("layers.*.feed_forward.w1.weight", "decoder.blocks.*.mlp.gate.weight"),
    Rule("layers.*.feed_forward.w3.weight", "decoder.blocks.*.mlp.up.weight"),
    Rule("layers.*.feed_forward.w2.weight", "decoder.blocks.*.mlp.down.weight"),
    Rule("norm.weight", "decoder.norm.weight"),
    Rule("output.weight", "decoder.head.weight"),
    Rule("rope.freqs", None),
)

MPT = (
    *prefixed(
        "transformer.",
        (
            Rule("wte.weight", "decoder.embed.weight"),
            Rule("blocks.*.norm_1.weight", "decoder.blocks.*.attn_norm.weight"),
            Rule("blocks.*.attn.Wqkv.weight", "decoder.blocks.*.attn.qkv.weight"),
            Rule("blocks.*.attn.out_proj.weight", "decoder.blocks.*.attn.out.weight"),
            Rule("blocks.*.norm_2.weight", "decoder.blocks.*.mlp_norm.weight"),
            Rule("blocks.*.ffn.up_proj.weight", "decoder.blocks.*.mlp.up.weight"),
            Rule("blocks.*.ffn.down_proj.weight", "decoder.blocks.*.mlp.down.weight"),
            Rule("norm_f.weight", "decoder.norm.weight"),
        ),
    ),
    Rule("lm_head.weight", "decoder.head.weight"),  # the embedding table again, in copies saved anew
)

CLIP_TOWER = (
    Rule("embeddings.class_embedding", "vision.cls"),
    Rule("embeddings.patch_embedding.weight", "vision.patch.weight"),
    Rule("embeddings.position_embedding.weight", "vision.pos"),
    Rule("embeddings.position_ids", None),  # 0, 1, 2, …
    Rule("pre_layrnorm.weight", "vision.pre_norm.weight"),  # the misspelling is CLIP's
    Rule("pre_layrnorm.bias", "vision.pre_norm.bias"),
    *(
        Rule(f"encoder.layers.*.{disk}.{kind}", f"vision.blocks.*.{ours}.{kind}")
        for disk, ours in (
            ("layer_norm1", "attn_norm"),
            ("self_attn.{q,k,v}_proj", "attn.qkv"),
            ("self_attn.out_proj", "attn.out"),
            ("layer_norm2", "mlp_norm"),
            ("mlp.fc1", "mlp.up"),
            ("mlp.fc2", "mlp.down"),
        )
        for kind in ("weight", "bias")
    ),
    Rule("post_layernorm.weight", "vision.post_norm.weight"),  # behind the layer that LLaVA reads
    Rule("post_layernorm.bias", "vision.post_norm.bias"),
)
CLIP = (  # a CLIP repository; transformers 5 may leave out `vision_model.`
    *prefixed("vision_model.", CLIP_TOWER),
    *CLIP_TOWER,
    Rule("text_model.**", None),
    Rule("visual_projection.weight", None),
    Rule("text_projection.weight", None),
    Rule("logit_scale", None),
)
VISION = (  # what LLaVA puts beside a language model's layers
    Rule("mm_projector.*.weight", "projector.*.weight"),  # an MLP
    Rule("mm_projector.*.bias", "projector.*.bias"),
    Rule("mm_projector.weight", "projector.0.weight"),  # linear
    Rule("mm_projector.bias", "projector.0.bias"),
    Rule("image_newline", "newline"),
    *prefixed("vision_tower.vision_tower.vision_model.", CLIP_TOWER),
    *prefixed("vision_tower.vision_tower.", CLIP_TOWER),
)
LLAVA = (*HF_LLAMA, *prefixed("model.", VISION))  # the merged layout of liuhaotian/llava-*
LLAVA_MPT = (*MPT, *prefixed("transformer.", VISION))
HF_PROJECTOR = tuple(
    Rule(f"multi_modal_projector.linear_{i + 1}.{kind}", f"projector.{2 * i}.{kind}")
    for i in (0, 1)
    for kind in ("weight", "bias")
)
LLAVA_HF = (  # up to transformers 4.51, then from 4.52 on
    *prefixed("language_model.", HF_LLAMA),
    *prefixed("vision_tower.vision_model.", CLIP_TOWER),
    *HF_PROJECTOR,
    Rule("image_newline", "newline"),
    *prefixed("model.language_model.", HF_LLAMA_LAYERS),
    Rule("lm_head.weight", "decoder.head.weight"),
    *prefixed("model.vision_tower.vision_model.", CLIP_TOWER),
    *prefixed("model.vision_tower.", CLIP_TOWER),
    *prefixed("model.", HF_PROJECTOR),
    Rule("model.image_newline", "newline"),
)
NATIVE = (Rule("decoder.**", "decoder.**"), Rule("vision.**", "vision.**"), Rule("projector.**", "projector.**"),
          Rule("newline", "newline"))  # fmt: skip


class Plan(NamedTuple):
    """What becomes of the tensors on disk."""

    sources: dict[str, tuple[str, ...]]  # our name -> names on disk, to be stacked by rows
    dropped: tuple[str, ...]  # known, and not needed
    unknown: tuple[str, ...]  # no rule fits


def plan(disk: Iterable[str], rules: Iterable[Rule]) -> Plan:
    """Every name on disk is used by a rule, dropped by one, or unknown.

    Raises CheckpointError naming a tensor of which a part is missing.
    """
    table = [(re.compile(_pattern(part)), i, rule) for rule in rules for i, part in enumerate(rule.parts())]
    found: dict[str, dict[int, str]] = {}
    dropped, unknown = [], []
    for name in disk:
        for pattern, i, rule in table:
            if match := pattern.fullmatch(name):
                if rule.ours is None:
                    dropped.append(name)
                else:
                    found.setdefault(_filled(rule.ours, match), {})[i] = name
                break
        else:
            unknown.append(name)
    wanted = {_normal(rule.ours): len(rule.parts()) for rule in rules if rule.ours}
    for ours, parts in found.items():
        if len(parts) < wanted.get(_normal(ours), 1):
            raise CheckpointError(f"{ours} needs more than {', '.join(parts.values())}; a tensor is missing")
    sources = {ours: tuple(parts[i] for i in sorted(parts)) for ours, parts in found.items()}
    return Plan(sources, tuple(dropped), tuple(unknown))


class Place(NamedTuple):
    """Where a tensor on disk goes."""

    ours: str
    part: int  # which of the tensors that are stacked
    of: int  # so many


def place(name: str, rules: Iterable[Rule]) -> Place | None:
    """Where one tensor goes, the others that are stacked with it being there or not; None: no rule wants it."""
    for rule in rules:
        for i, part in enumerate(rule.parts()):
            if rule.ours and (match := re.fullmatch(_pattern(part), name)):
                return Place(_filled(rule.ours, match), i, len(rule.parts()))
    return None


def read(weights: Mapping[str, Tensor], sources: tuple[str, ...]) -> Tensor:
    """One of our tensors: mapped as it is, or stacked by rows."""
    if len(sources) == 1:
        return weights[sources[0]]
    return torch.cat([weights[name] for name in sources])


def rename(disk: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """All tensors under our names. Raises CheckpointError on a name that no rule knows."""
    planned = plan(disk, tuple(rules))
    if planned.unknown:
        raise CheckpointError(f"no rule knows {', '.join(planned.unknown)}")
    return {ours: read(disk, sources) for ours, sources in planned.sources.items()}


def disk_names(ours: str, rules: Iterable[Rule]) -> list[str]:
    """The table read backwards: the names under which one of our tensors is saved, in the order of its rows."""
    for rule in rules:
        if rule.ours and (match := re.fullmatch(_pattern(rule.ours), ours)):
            return [_filled(part, match) for part in rule.parts()]
    raise KeyError(ours)


def _pattern(text: str) -> str:
    return re.escape(text).replace(r"\*\*", "(.+)").replace(r"\*", r"(\d+)")


def _filled(text: str, match: re.Match[str]) -> str:
    for value in match.groups():
        text = text.replace("**" if "**" in text else "*", value, 1)
    return text


def _normal(ours: str) -> str:
    return re.sub(r"\d+", "*", ours)
