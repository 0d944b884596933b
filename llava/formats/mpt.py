"""MPT, as a plain language model or within a LLaVA model: key table, and conversion to and from config.json."""

from collections.abc import Mapping
from typing import Any

from llava.config import DecoderConfig, LlavaConfig, LoadOptions
from llava.errors import ConfigError
from llava.formats.format import Checkpoint, CheckpointFiles, Format, ReadConfig, Shapes, one_of, section, shapes_of
from llava.formats.multimodal import VISION, read_model_config
from llava.tensors.keymap import Rule, prefixed
from llava.tensors.lazy import LazyTensor

LANGUAGE = (
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
    Rule("lm_head.weight", "decoder.head.weight"),  # only in re-saved checkpoints; duplicates the embedding table
)
RULES = (*LANGUAGE, *prefixed("transformer.", VISION))


class Mpt(Format):
    """Format of MPT models and MPT-based LLaVA models. Read-only; to write such models, use `--to llava`."""

    name = "mpt"

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        return RULES

    def detect(self, files: CheckpointFiles) -> list[str]:
        if files.config.get("model_type") == "llava_mpt":
            return ["config.json: model_type = llava_mpt"]
        found = any(name.startswith("transformer.") for name in files.weights)
        return ["tensors are named transformer.*"] * found

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        decoder = decoder_config(files.config, shapes_of(tensors), files.config_file)
        return read_model_config(files.path, files.config, decoder, tensors, options)


def decoder_config(config: Mapping[str, Any], shapes: Shapes, where: object) -> DecoderConfig:
    """Reads config.json. Raises ConfigError if the config requires a feature that this decoder does not support.

    Missing keys default to MPT-7B's values, because transformers 4.37 and later may save an empty attn_config.
    """
    attention = section(config, "attn_config", where)
    for values, key, supported in (
        (config, "no_bias", True),
        (config, "logit_scale", None),
        (config, "embedding_fraction", 1.0),
        (attention, "alibi", True),
        (attention, "qk_ln", False),
        (attention, "prefix_lm", False),
        (attention, "softmax_scale", None),
        (attention, "attn_type", "multihead_attention"),
    ):
        if (value := values.get(key, supported)) != supported:
            raise ConfigError(f"{where}: {key} is {value!r}; this decoder supports only {supported!r}")
    norms = ("low_precision_layernorm", "layernorm")
    one_of(config.get("norm_type", norms[0]), norms, f"{where}: norm_type")
    dim, n_heads = config["d_model"], config["n_heads"]
    return DecoderConfig(
        kind="mpt",
        n_layers=config["n_layers"],
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        mlp_dim=dim * config.get("expansion_ratio", 4),
        vocab_size=shapes["decoder.embed.weight"][0] if "decoder.embed.weight" in shapes else config["vocab_size"],
        max_seq=config.get("max_seq_len", 2048),
        eps=config.get("layer_norm_epsilon", 1e-5),
        rope_theta=None,
        alibi_bias_max=attention.get("alibi_bias_max", 8),
        clip_qkv=attention.get("clip_qkv"),
        tied=True,
    )


def mpt_config(config: LlavaConfig) -> dict[str, Any]:
    """Returns the config.json of an MPT model, with all sizes set explicitly."""
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
