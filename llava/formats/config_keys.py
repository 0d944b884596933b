"""Which keys of a config file a format understands.

Almost every key that transformers stores in config.json is without effect on the logits, and a few change them
completely. A format therefore lists its keys in a `ConfigKeys`; a key that is in no list is reported.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llava.errors import ConfigError

log = logging.getLogger(__name__)

# Keys without effect on the logits, by the reason.
_FILES = """
    _name_or_path architectures auto_map custom_pipelines transformers_version torch_dtype dtype torchscript
    transformers.js_config tokenizer_class tokenizer_name name pad_token_id bos_token_id eos_token_id sep_token_id
    decoder_start_token_id unk_token_id id2label label2id finetuning_task task_specific_params problem_type
    use_bfloat16 tf_legacy_loss return_dict output_attentions output_hidden_states output_router_logits use_cache
    is_decoder is_encoder_decoder tie_encoder_decoder add_cross_attention cross_attention_hidden_size pruned_heads
    chunk_size_feed_forward pretraining_tp attn_implementation _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal _flash_attn_2_enabled use_flash_attn use_flash_attention
    _experts_implementation attn_impl verbose unsloth_version unsloth_fixed model_name use_kernels
    gradient_checkpointing _commit_hash adapters is_llama_config model_max_length
"""
_GENERATION = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix
    max_new_tokens
"""
_TRAINING = """
    initializer_range initializer_factor init_config init_device init_std attention_dropout hidden_dropout dropout
    embd_pdrop resid_pdrop emb_pdrop attn_pdrop classifier_dropout router_aux_loss_coef
    neftune_noise_alpha
"""
NO_EFFECT = frozenset(f"{_FILES} {_GENERATION} {_TRAINING}".split())
_OURS = "llava_"  # prefix of the keys that this package adds


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True, kw_only=True)
class ConfigKeys:
    """The keys of one object in a config file."""

    used: frozenset[str]  # read by the format
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # implemented only for these values, and for null
    no_effect: frozenset[str] = frozenset()  # in addition to `NO_EFFECT`

    def __or__(self, other: "ConfigKeys") -> "ConfigKeys":
        return ConfigKeys(
            used=self.used | other.used,
            only={**self.only, **other.only},
            no_effect=self.no_effect | other.no_effect,
        )

    def check(self, config: Mapping[str, Any], where: object) -> None:
        """Raises ConfigError if a key has a value that is not implemented. Logs a warning about unknown keys."""
        for key, values in self.only.items():
            if (value := config.get(key)) is not None and not _is_one_of(value, values):
                raise ConfigError(f"{where}: {key} is {value!r:.60}; this version supports only {_listed(values)}")
        known = self.used | set(self.only) | self.no_effect | NO_EFFECT
        unknown = {key: value for key, value in config.items() if key not in known and not key.startswith(_OURS)}
        if unknown := {key: value for key, value in unknown.items() if value not in (None, False, "", [], {})}:
            listed = ", ".join(f"{key} = {value!r:.40}" for key, value in [*unknown.items()][:6])
            rest = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
            log.warning(
                "%s: unknown keys are ignored: %s%s; if one of them changes the computation, answers are wrong",
                where, listed, rest,
            )  # fmt: skip


def _is_one_of(value: Any, values: Iterable[Any]) -> bool:
    """Whether `value` equals one of `values`; unlike `in`, does not take True for 1."""
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, values)) if values else "null"
