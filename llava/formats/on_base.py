"""Shared code for LoRAs, projectors and deltas: parts of a model that are loaded together with a base model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llava.config import LlavaConfig, LoadOptions
from llava.errors import CheckpointError
from llava.formats import llama, llava, llava_hf, mpt
from llava.formats.format import Checkpoint, CheckpointFiles, Format, ReadConfig, resolved_by, shapes_of
from llava.formats.multimodal import read_model_config
from llava.formats.native import VERSION_KEY, native_config
from llava.tensors.files import Weights
from llava.tensors.keymap import Rule, plan
from llava.tensors.lazy import FromFile, LazyTensor


class PartOfModel(Format):
    """Base class of formats that need a base model: `base` is never None in `resolve` and `read_config`."""

    needs_base = True

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        """Returns the key table of the whole model."""
        return llava.RULES if config is None else llava.rules_for(config)

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        """Reads the part's config.json or, for a LoRA that PEFT saved without a config.json, the base model's."""
        assert base
        own = described_by_itself(files)
        config, path = (files.config, files.path) if own else (base.source_config, base.path)
        if VERSION_KEY in config:
            native = native_config(config, options, path / "config.json")
            decoder = replace(native.decoder, vocab_size=tensors["decoder.embed.weight"].shape[0])
            return ReadConfig(replace(native, decoder=decoder), config, path)
        read = mpt.decoder_config if base.config.decoder.kind == "mpt" else llama.decoder_config
        return read_model_config(path, config, read(config, shapes_of(tensors), path / "config.json"), tensors, options)


def described_by_itself(files: CheckpointFiles) -> bool:
    """Whether the part has its own config.json. If not, that of the base applies.

    A copy of the config.json of a llava-hf base does not count: trainers save it without the base's preprocessor.
    """
    return bool(files.config) and "text_config" not in files.config


def llava_rules(base: Checkpoint) -> tuple[Rule, ...]:
    """Returns the key table of LLaVA models that are based on this language model."""
    return mpt.RULES if base.config.decoder.kind == "mpt" else llava.RULES


def adapter_rules(base: Checkpoint) -> tuple[Rule, ...]:
    """Returns the key table of adapters: names as in LLaVA's own code and, for Llama, as in transformers' models."""
    if base.config.decoder.kind == "mpt":
        return mpt.RULES
    return (*llava.RULES, *llava_hf.RULES)


def base_tensors(base: Checkpoint) -> dict[str, LazyTensor]:
    """Returns all tensors of a base model, including any that its language model does not use."""
    return {**base.unused, **base.tensors}


class PartTensors(NamedTuple):
    """The tensors of one file, keyed by our names."""

    tensors: dict[str, LazyTensor]
    dropped: tuple[str, ...]  # on-disk names of known tensors that are not needed
    unknown: dict[str, Path]


def read_part(weights: Weights, names: Mapping[str, str], rules: tuple[Rule, ...]) -> PartTensors:
    """Looks up a file's tensors in a key table. `names` maps names in the table to names in the file."""
    planned = plan(names, rules)
    stored = {ours: tuple(names[name] for name in parts) for ours, parts in planned.tensors.items()}
    for parts in stored.values():
        for name in parts:
            non_empty(weights, name)
    planned = planned._replace(
        tensors=stored,
        dropped=tuple(names[name] for name in planned.dropped),
        unknown=tuple(names[name] for name in planned.unknown),
    )
    resolved = resolved_by(planned, weights)
    return PartTensors(resolved.tensors, resolved.dropped, dict(resolved.unknown))


def non_empty(weights: Weights, name: str) -> LazyTensor:
    """Returns the tensor `name`. Raises CheckpointError if it is empty, as can happen after training with ZeRO-3."""
    header = weights.headers[name]
    if not header.numel:
        raise CheckpointError(
            f"{header.file}: {name} is empty; gather all ZeRO-3 parameters and save the checkpoint again"
        )
    return FromFile(weights, name)
