"""PEFT's adapter_config.json: which settings of a LoRA are computed and which are refused, and the scaling factors.

r rank
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.tensors.files import parsing, read_json

log = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
_READ = {
    "alpha_pattern",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "init_lora_weights",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
}
_IN_THE_TENSORS = {  # settings whose result shows in the names and shapes of the tensors
    "bias",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "target_modules",
}
_TRAINING_ONLY = {  # settings of the initialisation, the backward pass or the framework
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
}
_UNSUPPORTED = {  # settings that change what is computed
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
}
_INITS_THAT_KEEP_THE_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraSettings:
    """The settings that determine which tensors a LoRA must contain, and how they are added to the base."""

    file: Path
    alpha: float
    rslora: bool
    alpha_pattern: Mapping[str, float]  # regular expression for the end of a module's name -> its own alpha
    modules_to_save: tuple[str, ...]  # modules that PEFT saved in full
    ties_weights: bool  # whether tables saved in full stay tied to each other
    rank: int | None  # r; None if it is not stated
    rank_pattern: Mapping[str, int]  # like alpha_pattern

    def scale(self, module: str, r: int) -> float:
        """Returns the scaling factor of B @ A for a module, given by its name in the model that PEFT wrapped.

        Raises CheckpointError if the factors have another rank than the settings: alpha / r would be a guess.
        """
        ranks = (rank for key, rank in self.rank_pattern.items() if re.fullmatch(_module_pattern(key), module))
        if (stated := next(ranks, self.rank)) is not None and stated != r:
            raise CheckpointError(
                f"{self.file}: r is {stated} for {module}, but its factors have rank {r}; adapter_config.json and "
                "adapter_model belong to different LoRAs"
            )
        own = (alpha for key, alpha in self.alpha_pattern.items() if re.fullmatch(_module_pattern(key), module))
        return next(own, self.alpha) / (r**0.5 if self.rslora else r)


def read_settings(file: Path) -> LoraSettings:
    """Reads adapter_config.json. Raises CheckpointError for settings that are not supported."""
    config = read_json(file)
    if (peft_type := config.get("peft_type", "LORA")) != "LORA":
        raise CheckpointError(f"{file}: peft_type is {peft_type!r}; expected LORA")
    _check_supported(config, file)
    with parsing(file):
        own = {str(key): float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()}
        settings = LoraSettings(
            file=file,
            alpha=float(config["lora_alpha"]),
            rslora=bool(config.get("use_rslora")),
            alpha_pattern=own,
            modules_to_save=tuple(map(str, config.get("modules_to_save") or ())),
            ties_weights=bool(config.get("ensure_weight_tying")),
            rank=None if config.get("r") is None else int(config["r"]),
            rank_pattern={str(key): int(rank) for key, rank in (config.get("rank_pattern") or {}).items()},
        )
    for name, pattern in (("alpha_pattern", own), ("rank_pattern", settings.rank_pattern)):
        for key in pattern:
            _check_pattern(name, key, file)
    return settings


def _check_supported(config: Mapping[str, Any], file: Path) -> None:
    for key in sorted(_UNSUPPORTED & set(config)):
        if config[key]:
            raise CheckpointError(
                f"{file}: {key} is {config[key]!r:.80}, which is not supported; merge the LoRA into its base with peft"
            )
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in _INITS_THAT_KEEP_THE_BASE:
        raise CheckpointError(
            f"{file}: init_lora_weights is {init!r:.80}, which changes the base weights, so the LoRA does not match "
            "the original base; save the LoRA with peft's path_initial_model_for_weight_conversion, or merge it with "
            "peft"
        )
    known = _READ | _IN_THE_TENSORS | _TRAINING_ONLY | _UNSUPPORTED
    if unknown := sorted(key for key, value in config.items() if value and key not in known):
        log.warning("%s: ignores the unknown keys %s, which may change the result", file, ", ".join(unknown))


def _check_pattern(name: str, key: str, file: Path) -> None:
    why = "it repeats a repetition, which can take forever" if re.search(_NESTED_REPETITION, key) else ""
    try:
        re.compile(_module_pattern(key))
    except (re.error, RecursionError, OverflowError) as error:
        why = str(error)
    if why:
        raise CheckpointError(
            f"{file}: {name} key {key!r:.80} is not a usable regular expression ({why}); "
            "use the names of modules as keys"
        )


_NESTED_REPETITION = r"[+*}]\)*\)[+*{]"


def _module_pattern(key: str) -> str:
    """Returns a regex that matches module names whose last components match `key`, as in PEFT."""
    return rf"(.*\.)?({key})"
