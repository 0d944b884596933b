"""MPT, as a plain language model or within a LLaVA model: key table, and conversion to and from config.json."""

from collections.abc import Mapping
from typing import Any

from llava.config import DecoderConfig, LlavaConfig, LoadOptions
from llava.formats import multimodal
from llava.formats.config_keys import ConfigKeys, words
from llava.formats.format import Checkpoint, CheckpointFiles, Format, ReadConfig, Shapes, TensorKeys, section, shapes_of
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


_NORMS = ("low_precision_layernorm", "layernorm")
KEYS = ConfigKeys(
    used=words(
        "d_model n_layers n_heads expansion_ratio max_seq_len vocab_size layer_norm_epsilon attn_config "
        "quantization_config"
    ),
    only={
        "model_type": ("mpt", "llava_mpt"),
        "no_bias": (True,),
        "logit_scale": (),
        "embedding_fraction": (1.0,),
        "norm_type": _NORMS,
        "tie_word_embeddings": (True,),
    },
    no_effect=words("hidden_size learned_pos_emb fc_type ffn_config"),  # copies, or replaced by ALiBi
)
ATTENTION_KEYS = ConfigKeys(
    used=words("alibi_bias_max clip_qkv model_type"),
    only={
        "alibi": (True,),
        "qk_ln": (False,),
        "qk_gn": (False,),
        "prefix_lm": (False,),
        "softmax_scale": (),
        "attn_type": ("multihead_attention",),
        "attn_uses_sequence_id": (False,),
        "rope": (False,),
        "sliding_window_size": (-1,),
    },
    no_effect=words("rope_impl rope_theta rope_dail_config rope_hf_config"),  # without `rope`
)


TENSOR_KEYS = (
    TensorKeys(r"decoder\.blocks\.\d+\.mlp\.", "n_layers", "d_model expansion_ratio"),
    TensorKeys(r"decoder\.blocks\.", "n_layers", "d_model n_heads"),
    TensorKeys(r"decoder\.", "model_type", "vocab_size d_model"),
    *multimodal.TENSOR_KEYS,
)


class Mpt(Format):
    """Format of MPT models and MPT-based LLaVA models. Read-only; to write such models, use `--to llava`."""

    name = "mpt"
    tensor_keys = TENSOR_KEYS

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
    (KEYS | multimodal.KEYS).check(config, where)
    ATTENTION_KEYS.check(attention, f"{where}: attn_config")
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
