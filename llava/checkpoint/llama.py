"""The language model as a plain Llama folder in Hugging Face's layout, which any Llama loader opens."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from llava.checkpoint import keymap
from llava.checkpoint.open import Checkpoint, Source
from llava.checkpoint.write import Item


def items(checkpoint: Checkpoint) -> list[Item]:
    """Embedding, blocks, norm and head under the hub's names; what is stacked is taken apart."""
    written: list[Item] = []
    for ours, source in checkpoint.sources.items():
        if not ours.startswith("decoder."):
            continue
        names = keymap.disk_names(ours, keymap.HF_LLAMA)
        for i, (name, rows) in enumerate(zip(names, _rows(checkpoint, ours, source, len(names)), strict=True)):
            shape, parts = (rows, *source.shape[1:]), partial(_part, checkpoint, ours, i)
            written.append(Item(name=name, dtype=source.dtype, shape=shape, where=source.where, parts=parts))
    return written


def _rows(checkpoint: Checkpoint, ours: str, source: Source, n: int) -> list[int]:
    if n == 1:
        return [source.shape[0]]
    config = checkpoint.config.decoder
    return [config.n_heads * config.head_dim] + 2 * [config.n_kv_heads * config.head_dim]


def _part(checkpoint: Checkpoint, ours: str, i: int) -> Iterator[Tensor]:
    source = checkpoint.sources[ours]
    names = keymap.disk_names(ours, keymap.HF_LLAMA)
    if len(source.names) == len(names):
        yield source.weights[source.names[i]]
    else:
        yield source.read().split(_rows(checkpoint, ours, source, len(names)))[i]


def config(checkpoint: Checkpoint) -> dict[str, Any]:
    """A LlamaConfig, every size stated."""
    sizes, tokenizer = checkpoint.config.decoder, checkpoint.tokenizer
    scaling = sizes.rope_scaling
    stretched = scaling is not None and scaling.kind in ("linear", "dynamic")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.mlp_dim,
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": sizes.n_heads,
        "num_key_value_heads": sizes.n_kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": scaling.original_max_seq if scaling and stretched else sizes.max_seq,
        "rms_norm_eps": sizes.eps,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": _rope_scaling(checkpoint),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": sizes.tied,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "torch_dtype": checkpoint.config.dtype,
        "use_cache": True,
    }


def _rope_scaling(checkpoint: Checkpoint) -> dict[str, Any] | None:
    scaling = checkpoint.config.decoder.rope_scaling
    if scaling is None:
        return None
    values: dict[str, Any] = {"type": scaling.kind, "rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        values |= {
            "original_max_position_embeddings": scaling.original_max_seq,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    return values
