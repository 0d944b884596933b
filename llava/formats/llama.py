"""Plain Llama models in Hugging Face's format: key table, and conversion from and to config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.config import DecoderConfig, LlavaConfig, LoadOptions, RopeScaling
from llava.errors import ConfigError
from llava.formats.added_rows import copy_plain_tokenizer, without_added_rows
from llava.formats.format import (
    TEMPLATE_KEY,
    Checkpoint,
    CheckpointFiles,
    Format,
    ReadConfig,
    Shapes,
    one_of,
    require_llama,
    section,
    shapes_of,
    to_disk,
)
from llava.formats.multimodal import read_model_config
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.keymap import Rule, prefixed
from llava.tensors.lazy import LazyTensor
from llava.tensors.writer import OutputTensor

LAYERS = (
    Rule("embed_tokens.weight", "decoder.embed.weight"),
    Rule("layers.*.input_layernorm.weight", "decoder.blocks.*.attn_norm.weight"),
    Rule("layers.*.self_attn.{q,k,v}_proj.weight", "decoder.blocks.*.attn.qkv.weight"),
    Rule("layers.*.self_attn.o_proj.weight", "decoder.blocks.*.attn.out.weight"),
    Rule("layers.*.self_attn.rotary_emb.inv_freq", None),  # recomputed, because some files store it rounded or zeroed
    Rule("layers.*.post_attention_layernorm.weight", "decoder.blocks.*.mlp_norm.weight"),
    Rule("layers.*.mlp.gate_proj.weight", "decoder.blocks.*.mlp.gate.weight"),
    Rule("layers.*.mlp.up_proj.weight", "decoder.blocks.*.mlp.up.weight"),
    Rule("layers.*.mlp.down_proj.weight", "decoder.blocks.*.mlp.down.weight"),
    Rule("norm.weight", "decoder.norm.weight"),
)
RULES = (*prefixed("model.", LAYERS), Rule("lm_head.weight", "decoder.head.weight"))


class Llama(Format):
    """A plain Llama checkpoint that any Llama loader can open."""

    name = "llama"
    writes = True
    holds_vision = False

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        return RULES

    def detect(self, files: CheckpointFiles) -> list[str]:
        found = "model.embed_tokens.weight" in files.weights
        return ["tensors model.layers.*, no projector, no mm_vision_tower: a plain Llama"] * found

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        decoder = decoder_config(files.config, shapes_of(tensors), files.config_file)
        return read_model_config(files.path, files.config, decoder, tensors, options)

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        return without_added_rows(checkpoint)

    def outputs(self, checkpoint: Checkpoint) -> list[OutputTensor]:
        require_llama(checkpoint, "this format")
        decoder = {ours: tensor for ours, tensor in checkpoint.tensors.items() if ours.startswith("decoder.")}
        return to_disk(decoder, checkpoint.config, RULES)

    def write_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        template = checkpoint.template.template
        return llama_config(checkpoint.config, checkpoint.tokenizer) | ({TEMPLATE_KEY: template} if template else {})

    def write_extra(self, source: Checkpoint, folder: Path) -> None:
        copy_plain_tokenizer(source, folder)


def decoder_config(config: Mapping[str, Any], shapes: Shapes, where: object) -> DecoderConfig:
    """Reads config.json, with the defaults of LlamaConfig in transformers 4.37.2. Raises ConfigError.

    The number of vocabulary rows is taken from the embedding table if there is one.
    """
    dim = config.get("hidden_size", 4096)
    n_heads = config.get("num_attention_heads", 32)
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ConfigError(f"{where}: attention_bias or mlp_bias is true; biases are not supported")
    one_of(config.get("hidden_act", "silu"), ("silu",), f"{where}: hidden_act")
    max_seq = config.get("max_position_embeddings") or config.get("max_sequence_length") or 2048
    rope = section(config, "rope_parameters", where)  # transformers 5 stores rope_theta and the scaling together
    scaling = _read_rope_scaling(section(config, "rope_scaling", where) or rope, max_seq, where)
    extended = scaling is not None and scaling.kind in ("linear", "dynamic")
    return DecoderConfig(
        kind="llama",
        n_layers=config.get("num_hidden_layers", 32),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=config.get("num_key_value_heads") or n_heads,
        head_dim=config.get("head_dim") or dim // n_heads,
        mlp_dim=config.get("intermediate_size", 11008),
        vocab_size=shapes["decoder.embed.weight"][0] if "decoder.embed.weight" in shapes else config["vocab_size"],
        max_seq=int(max_seq * scaling.factor) if scaling and extended else max_seq,
        eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=config.get("rope_theta") or rope.get("rope_theta") or 10000.0,
        rope_scaling=scaling,
        tied=config.get("tie_word_embeddings", False),
    )


def is_mistral(decoder: DecoderConfig) -> bool:
    """Whether n_kv_heads and rope_theta have the values of Mistral. InternLM2 has the same values; Yi does not."""
    return decoder.kind == "llama" and decoder.n_kv_heads == 8 and decoder.rope_theta == 1e6


def _read_rope_scaling(values: Mapping[str, Any], max_seq: int, where: object) -> RopeScaling | None:
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return None
    return RopeScaling(
        kind=one_of(kind, ("linear", "dynamic", "llama3"), f"{where}: rope scaling"),
        factor=float(values["factor"]),
        original_max_seq=values.get("original_max_position_embeddings") or max_seq,
        low_freq_factor=values.get("low_freq_factor", 1.0),
        high_freq_factor=values.get("high_freq_factor", 4.0),
    )


def llama_config(config: LlavaConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns a LlamaConfig with all sizes set explicitly. Without a tokenizer, BOS and EOS use Llama's defaults."""
    sizes = config.decoder
    scaling = sizes.rope_scaling
    extended = scaling is not None and scaling.kind in ("linear", "dynamic")
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
        "max_position_embeddings": scaling.original_max_seq if scaling and extended else sizes.max_seq,
        "rms_norm_eps": sizes.eps,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": _rope_scaling_config(scaling),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": sizes.tied,
        "bos_token_id": tokenizer.bos_id if tokenizer else 1,
        "eos_token_id": tokenizer.eos_id if tokenizer else 2,
        "torch_dtype": config.dtype,
        "use_cache": True,
    }


def _rope_scaling_config(scaling: RopeScaling | None) -> dict[str, Any] | None:
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
