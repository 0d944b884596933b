"""The language model as a plain Llama folder in Hugging Face's layout, which any Llama loader opens."""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from llava.checkpoint import keymap
from llava.checkpoint.keymap import Rule
from llava.checkpoint.open import Checkpoint
from llava.checkpoint.source import Source
from llava.checkpoint.write import Item
from llava.config import LlavaConfig, RopeScaling
from llava.errors import CheckpointError
from llava.preprocess.tokenizer import Tokenizer


def items(checkpoint: Checkpoint) -> list[Item]:
    """Embedding, blocks, norm and head under the hub's names; what is stacked is taken apart."""
    require_llama(checkpoint)
    decoder = {ours: source for ours, source in checkpoint.sources.items() if ours.startswith("decoder.")}
    return taken_apart(decoder, checkpoint.config, keymap.HF_LLAMA)


def require_llama(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a language model that this layout, and gpt-fast's, have no place for."""
    if (kind := checkpoint.config.decoder.kind) != "llama":
        raise CheckpointError(f"{checkpoint.folder}: its language model is of kind {kind}; only a llama is written so")


def taken_apart(sources: Mapping[str, Source], config: LlavaConfig, rules: Iterable[Rule]) -> list[Item]:
    """Tensors under their names on disk, each as it is stored."""
    table = tuple(rules)
    written: list[Item] = []
    for ours, source in sources.items():
        names = keymap.disk_names(ours, table)
        ends = list(accumulate(part_rows(ours, source.shape[0], len(names), config), initial=0))
        for name, (start, stop) in zip(names, pairwise(ends), strict=True):
            parts = partial(source.pieces, start, stop)
            shape = (stop - start, *source.shape[1:])
            written.append(Item(name=name, dtype=source.dtype, shape=shape, where=source.where, parts=parts, ours=ours))
    return written


def part_rows(ours: str, rows: int, parts: int, config: LlavaConfig) -> list[int]:
    """Heights of the tensors that one of ours is stacked of: q, k and v."""
    if parts == 3 and ours.startswith("decoder."):
        sizes = config.decoder
        return [sizes.n_heads * sizes.head_dim] + 2 * [sizes.n_kv_heads * sizes.head_dim]
    return [rows // parts] * parts


def config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of that folder."""
    return settings(checkpoint.config, checkpoint.tokenizer)


def settings(config: LlavaConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A LlamaConfig, every size stated; without a tokenizer, Llama's own ids of <s> and </s>."""
    sizes = config.decoder
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
        "rope_scaling": _rope_scaling(scaling),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": sizes.tied,
        "bos_token_id": tokenizer.bos_id if tokenizer else 1,
        "eos_token_id": tokenizer.eos_id if tokenizer else 2,
        "torch_dtype": config.dtype,
        "use_cache": True,
    }


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
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
