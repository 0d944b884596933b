"""Plain Llama models in Hugging Face's format: key table, and conversion from and to config.json."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.config import DecoderConfig, LlavaConfig, LoadOptions, RopeScaling
from llava.errors import ConfigError
from llava.formats import multimodal
from llava.formats.added_rows import copy_plain_tokenizer, without_added_rows
from llava.formats.config_keys import ConfigKeys, words
from llava.formats.format import (
    TEMPLATE_KEY,
    Checkpoint,
    CheckpointFiles,
    Format,
    ReadConfig,
    Shapes,
    TensorKeys,
    one_of,
    require_llama,
    section,
    shapes_of,
    to_disk,
)
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.keymap import Rule, prefixed
from llava.tensors.lazy import LazyTensor
from llava.tensors.writer import OutputTensor

log = logging.getLogger(__name__)

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


TENSOR_KEYS = (
    TensorKeys(
        r"decoder\.blocks\.\d+\.attn\.",
        "num_hidden_layers",
        "hidden_size num_attention_heads num_key_value_heads head_dim",
    ),
    TensorKeys(r"decoder\.blocks\.\d+\.mlp\.", "num_hidden_layers", "hidden_size intermediate_size"),
    TensorKeys(r"decoder\.blocks\.", "num_hidden_layers", "hidden_size"),
    TensorKeys(r"decoder\.head", "tie_word_embeddings", "vocab_size hidden_size"),
    TensorKeys(r"decoder\.", "model_type", "vocab_size hidden_size"),
    *multimodal.TENSOR_KEYS,
)


class Llama(Format):
    """A plain Llama checkpoint that any Llama loader can open."""

    name = "llama"
    writes = True
    holds_vision = False
    tensor_keys = TENSOR_KEYS

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        return RULES

    def detect(self, files: CheckpointFiles) -> list[str]:
        found = "model.embed_tokens.weight" in files.weights
        return ["tensors model.layers.*, no projector, no mm_vision_tower: a plain Llama"] * found

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        decoder = decoder_config(files.config, shapes_of(tensors), files.config_file)
        return multimodal.read_model_config(files.path, files.config, decoder, tensors, options)

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


_MISTRAL_TYPES = ("mistral", "llava_mistral")
_LLAMA_TYPES = ("llama", "llava", "llava_llama", "llava_next", "Yi")
# Keys of models that name their tensors like Llama, but compute something else unless the key has one of these values.
_VARIANTS: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "hidden_act": ("silu",),
    "hidden_activation": ("silu",),
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "rope_interleaved": (False,),
    "no_rope_layers": ([],),
    "alibi": (False,),
    "use_sliding_window": (False, True),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "scale_emb": (1.0,),
    "scale_depth": (),
    "clip_qkv": (),
    "use_parallel_residual": (False,),
    "parallel_attn": (False,),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "n_routed_experts": (0,),
}
KEYS = ConfigKeys(
    used=words(
        "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
        "vocab_size max_position_embeddings max_sequence_length rms_norm_eps rope_theta rope_scaling rope_parameters "
        "tie_word_embeddings sliding_window layer_types quantization_config compression_config"
    ),
    only=_VARIANTS,
    no_effect=words("max_window_layers"),  # of Qwen2, which `model_type` excludes
)
_ROPE_KEYS = ConfigKeys(
    used=words("type rope_type factor rope_theta original_max_position_embeddings low_freq_factor high_freq_factor"),
    only={"partial_rotary_factor": (1.0,)},
)
# Defaults of LlamaConfig in transformers 4.37.2 and of MistralConfig in 5.24; saved configs may omit default values.
_LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "intermediate_size": 11008,
    "rms_norm_eps": 1e-6,
}
_MISTRAL = _LLAMA | {
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def decoder_config(config: Mapping[str, Any], shapes: Shapes, where: object) -> DecoderConfig:
    """Reads config.json with the defaults of transformers. Raises ConfigError for models other than Llama and Mistral.

    The number of vocabulary rows is taken from the embedding table if there is one.
    """
    model_type = config.get("model_type")
    if model_type not in (None, *_LLAMA_TYPES, *_MISTRAL_TYPES):
        raise ConfigError(
            f"{where}: model_type is {model_type!r:.60}, whose computation this version does not implement; the "
            f"language model must be one of {', '.join((*_LLAMA_TYPES, *_MISTRAL_TYPES))}, MPT or InternLM2"
        )
    (KEYS | multimodal.KEYS).check(config, where)
    config = {**(_MISTRAL if model_type in _MISTRAL_TYPES else _LLAMA), **config}
    dim, n_heads = config["hidden_size"], config["num_attention_heads"]
    max_seq = config.get("max_position_embeddings") or config.get("max_sequence_length") or 2048
    rope = section(config, "rope_parameters", where)  # transformers 5 stores rope_theta and the scaling together
    scaling = _read_rope_scaling(section(config, "rope_scaling", where) or rope, max_seq, where)
    extended = scaling is not None and scaling.kind in ("linear", "dynamic")
    return DecoderConfig(
        kind="llama",
        n_layers=config["num_hidden_layers"],
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=config.get("num_key_value_heads") or n_heads,
        head_dim=config.get("head_dim") or dim // n_heads,
        mlp_dim=config["intermediate_size"],
        vocab_size=shapes["decoder.embed.weight"][0] if "decoder.embed.weight" in shapes else config["vocab_size"],
        max_seq=int(max_seq * scaling.factor) if scaling and extended else max_seq,
        eps=config["rms_norm_eps"],
        rope_theta=_rope_theta(config, rope, where),
        rope_scaling=scaling,
        tied=config.get("tie_word_embeddings", False),
        sliding_window=_sliding_window(config, where),
    )


def _sliding_window(config: Mapping[str, Any], where: object) -> int | None:
    """Returns the window in tokens, which transformers and the original code apply only in Mistral models."""
    window, layers = config.get("sliding_window"), set(config.get("layer_types") or ())
    if layers - {"full_attention", "sliding_attention"} or len(layers) > 1:
        raise ConfigError(f"{where}: layer_types mixes {', '.join(sorted(map(str, layers)))}; expected a single type")
    if window is None or layers == {"full_attention"} or config.get("use_sliding_window") is False:
        return None
    if config.get("model_type") in _LLAMA_TYPES:
        log.warning("%s: sliding_window = %s is ignored, as in transformers, because model_type is %s", where, window,
                    config["model_type"])  # fmt: skip
        return None
    return int(window)


def _rope_theta(config: Mapping[str, Any], rope: Mapping[str, Any], where: object) -> float:
    stated, nested = config.get("rope_theta"), rope.get("rope_theta")
    if stated and nested and stated != nested:
        raise ConfigError(f"{where}: rope_theta is {stated!r}, but {nested!r} in rope_parameters; expected one value")
    return stated or nested or 10000.0


def with_full_attention(checkpoint: Checkpoint, program: str) -> Checkpoint:
    """Limits the context to the sliding window, for a program without windows. Within it, attention is the same."""
    decoder = checkpoint.config.decoder
    if decoder.sliding_window is None:
        return checkpoint
    log.warning(
        "%s: %s does not support sliding windows; its answers are correct up to %d tokens",
        checkpoint.path, program, decoder.sliding_window,
    )  # fmt: skip
    decoder = replace(decoder, max_seq=min(decoder.max_seq, decoder.sliding_window), sliding_window=None)
    return replace(checkpoint, config=replace(checkpoint.config, decoder=decoder))


def is_mistral(decoder: DecoderConfig) -> bool:
    """Whether the decoder has a sliding window, or the n_kv_heads and rope_theta of Mistral.

    InternLM2 has the same values; Yi does not.
    """
    if decoder.kind != "llama":
        return False
    return decoder.sliding_window is not None or (decoder.n_kv_heads == 8 and decoder.rope_theta == 1e6)


def _read_rope_scaling(values: Mapping[str, Any], max_seq: int, where: object) -> RopeScaling | None:
    kind = values.get("rope_type") or values.get("type") or "default"
    if nested := [key for key, value in values.items() if isinstance(value, Mapping)]:
        raise ConfigError(f"{where}: rope_parameters differ between layers ({', '.join(nested)}); expected one set")
    _ROPE_KEYS.check(values, f"{where}: rope scaling")
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
    """Returns a LlamaConfig with all sizes set explicitly, or a MistralConfig if there is a sliding window.

    Without a tokenizer, BOS and EOS use Llama's defaults.
    """
    sizes = config.decoder
    family = "Llama" if sizes.sliding_window is None else "Mistral"
    scaling = sizes.rope_scaling
    extended = scaling is not None and scaling.kind in ("linear", "dynamic")
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
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
        "sliding_window": sizes.sliding_window,
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
