"""InternLM2: a Llama model with different tensor names, in which q, k and v are interleaved per key/value head.

Reads plain language models and LLaVA models. Matches modeling_internlm2.py of internlm/internlm2-chat-7b.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.config import LlavaConfig, LoadOptions
from llava.formats import llama
from llava.formats.format import Checkpoint, CheckpointFiles, Format, ReadConfig, Resolved, shapes_of
from llava.formats.multimodal import VISION, read_model_config
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.files import parsing
from llava.tensors.keymap import Rule, prefixed
from llava.tensors.lazy import Derived, LazyTensor

RULES = (
    Rule("model.tok_embeddings.weight", "decoder.embed.weight"),
    Rule("model.layers.*.attention_norm.weight", "decoder.blocks.*.attn_norm.weight"),
    Rule("model.layers.*.attention.wqkv.weight", "decoder.blocks.*.attn.qkv.weight"),
    Rule("model.layers.*.attention.wo.weight", "decoder.blocks.*.attn.out.weight"),
    Rule("model.layers.*.ffn_norm.weight", "decoder.blocks.*.mlp_norm.weight"),
    Rule("model.layers.*.feed_forward.w1.weight", "decoder.blocks.*.mlp.gate.weight"),
    Rule("model.layers.*.feed_forward.w3.weight", "decoder.blocks.*.mlp.up.weight"),
    Rule("model.layers.*.feed_forward.w2.weight", "decoder.blocks.*.mlp.down.weight"),
    Rule("model.norm.weight", "decoder.norm.weight"),
    Rule("output.weight", "decoder.head.weight"),
    *prefixed("model.", VISION),
)


_TYPES = ("internlm2", "llava_internlm2")


class InternLM2(Format):
    """Format of InternLM2 models. Read-only; to write one, use `--to llava` or, without vision, `--to llama`."""

    name = "internlm2"
    tensor_keys = llama.TENSOR_KEYS

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        return RULES

    def detect(self, files: CheckpointFiles) -> list[str]:
        found = "model.layers.0.attention.wqkv.weight" in files.weights
        return ["tensors model.layers.*.attention.wqkv: InternLM2"] * found

    def published_config(self, files: CheckpointFiles) -> Mapping[str, Any]:
        is_own = files.config.get("model_type") in _TYPES
        return {**files.config, "model_type": "llama"} if is_own else files.config

    def resolve(self, files: CheckpointFiles, base: Checkpoint | None, tokenizer: Tokenizer) -> Resolved:
        resolved = super().resolve(files, base, tokenizer)
        with parsing(files.config_file):
            n_heads, n_kv_heads = (int(files.config[f"num_{key}_heads"]) for key in ("attention", "key_value"))
            head_dim = int(files.config["hidden_size"]) // n_heads
        tensors = {
            ours: Ungrouped(tensor, n_heads, n_kv_heads, head_dim) if ours.endswith("attn.qkv.weight") else tensor
            for ours, tensor in resolved.tensors.items()
            if not ours.startswith("vision.")
        }
        return resolved._replace(tensors={**resolved.tensors, **tensors})

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        config = self.published_config(files)
        decoder = llama.decoder_config(config, shapes_of(tensors), files.config_file)
        return read_model_config(files.path, config, decoder, tensors, options)


@dataclass(frozen=True)
class Ungrouped(Derived):
    """A qkv matrix with rows reordered to q, k, v. On disk, each group of q heads precedes its own k and v heads."""

    base: LazyTensor
    n_heads: int
    n_kv_heads: int
    head_dim: int

    def rows(self, start: int, stop: int) -> Tensor:
        first, last = start // self.head_dim, -(-stop // self.head_dim)  # reads whole heads
        stored = [self._stored_head(head) * self.head_dim for head in range(first, last)]
        heads = [self.base.rows(row, row + self.head_dim) for row in stored]
        offset = first * self.head_dim
        return torch.cat(heads)[start - offset : stop - offset] if heads else self.base.rows(0, 0)

    def _stored_head(self, head: int) -> int:
        """Maps the index of a head in our order to its index in the stored matrix."""
        per_group = self.n_heads // self.n_kv_heads
        if head < self.n_heads:
            group, within = divmod(head, per_group)
        else:
            kind, group = divmod(head - self.n_heads, self.n_kv_heads)  # 0: k, 1: v
            within = per_group + kind
        return group * (per_group + 2) + within
