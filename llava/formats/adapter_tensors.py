"""The tensors that PEFT saves for a LoRA: factors A and B and tensors saved in full, without wrapper prefixes."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from llava.errors import CheckpointError
from llava.formats.adapter_config import LoraSettings
from llava.formats.on_base import PartTensors, non_empty, read_part
from llava.tensors.files import ADAPTER_FILES, Weights
from llava.tensors.keymap import Rule, target_of
from llava.tensors.lazy import LazyTensor


def without_wrappers(names: Weights) -> dict[str, str]:
    """Maps each tensor name, stripped of PEFT and DeepSpeed wrapper prefixes, to its name in the file.

    Raises CheckpointError if two names differ only in these prefixes.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(_WRAPPERS, "", name)
        if (other := found.setdefault(plain, name)) != name:
            raise CheckpointError(
                f"{names.headers[name].file}: {other} and {name} are names of the same tensor; save the LoRA again"
            )
    return found


_WRAPPED = r"(?:model|module|transformer|lm_head|language_model\.(?:model|lm_head))\."
_WRAPPERS = rf"^(?:(?:base_model|module|_forward_module)\.|model\.(?={_WRAPPED}))+"


def adapter_weights(folder: Path) -> Weights:
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return Weights([folder / name])
    raise CheckpointError(f"{folder}: has no {' or '.join(ADAPTER_FILES)}; download the LoRA again")


class FactorPair(NamedTuple):
    """The factors of one matrix, by letter (A or B), and the matrix's module in the model that PEFT wrapped."""

    module: str
    tensors: dict[str, LazyTensor]


class Adapter(NamedTuple):
    """The contents of adapter_model, without wrapper prefixes."""

    factors: dict[str, FactorPair]  # by matrix name
    full: PartTensors  # tensors that PEFT saved in full
    parts: dict[str, LazyTensor]  # saved in full too, but without the other parts of the same tensor of ours


def read_adapter(weights: Weights, settings: LoraSettings, rules: tuple[Rule, ...]) -> Adapter:
    """Classifies the tensors of adapter_model. Raises CheckpointError if any that `settings` promise are missing."""
    if not weights:
        raise CheckpointError(
            f"{settings.file.parent}: its adapter_model contains no tensors, as can happen after training with ZeRO-3; "
            "gather all parameters and save the LoRA again"
        )
    factors: dict[str, FactorPair] = {}
    full: dict[str, str] = {}
    for plain, name in without_wrappers(weights).items():
        if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", plain):
            module = re.sub(r"^base_model\.model\.|\.lora_[AB]\..*$", "", name)
            factors.setdefault(f"{match[1]}.weight", FactorPair(module, {})).tensors[match[2]] = non_empty(
                weights, name
            )
        elif "lora_" in plain:
            raise CheckpointError(
                f"{weights.headers[name].file}: contains {name}; only LoRAs with factors A and B of matrices are "
                "supported; merge the LoRA into its base with peft"
            )
        else:
            full[re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", plain)] = name
    for module in settings.modules_to_save:
        if not any(f".{module}." in f".{plain}" for plain in full):
            raise CheckpointError(
                f"{settings.file}: modules_to_save contains {module!r}, but the adapter has no tensors of this "
                "module; gather all parameters and save the LoRA again"
            )
    partial = _incomplete(full, rules)
    whole = {plain: name for plain, name in full.items() if plain not in partial}
    return Adapter(factors, read_part(weights, whole, rules), {n: non_empty(weights, full[n]) for n in partial})


def _incomplete(names: Iterable[str], rules: tuple[Rule, ...]) -> list[str]:
    """Returns the names of tensors such as a q_proj.bias that we store together with others that are not in `names`."""
    targets = {name: target for name in names if (target := target_of(name, rules)) and target.n_parts > 1}
    n_found = Counter(target.ours for target in targets.values())
    return [name for name, target in targets.items() if n_found[target.ours] < target.n_parts]
