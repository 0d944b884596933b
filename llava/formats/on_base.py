"""What LoRAs, projectors and deltas share: they are parts of a model, read together with their base."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llava.config import LoadOptions
from llava.errors import CheckpointError
from llava.formats import llama, llava, mpt
from llava.formats.format import Checkpoint, CheckpointFiles, Format, ReadConfig, resolved_by, shapes_of
from llava.formats.multimodal import read_model_config
from llava.formats.native import VERSION_KEY, native_config
from llava.tensors.files import Weights
from llava.tensors.keymap import Rule, plan
from llava.tensors.lazy import FromFile, LazyTensor


class PartOfModel(Format):
    """A format that needs a base: its `resolve` and `read_config` are always given one."""

    needs_base = True

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        """From the part's own config.json; a LoRA that only PEFT wrote has none, and the base's describes it."""
        assert base
        config, path = (files.config, files.path) if files.config else (base.source_config, base.path)
        if VERSION_KEY in config:
            return ReadConfig(native_config(config, options, path / "config.json"), config, path)
        read = mpt.decoder_config if base.config.decoder.kind == "mpt" else llama.decoder_config
        return read_model_config(path, config, read(config, shapes_of(tensors), path / "config.json"), tensors, options)


def llava_rules(base: Checkpoint) -> tuple[Rule, ...]:
    """The key table of a LLaVA on this language model."""
    return mpt.RULES if base.config.decoder.kind == "mpt" else llava.RULES


def base_tensors(base: Checkpoint) -> dict[str, LazyTensor]:
    """All tensors of a base, also those that it does not need as a language model."""
    return {**base.unused, **base.tensors}


class PartTensors(NamedTuple):
    """The tensors of one file under our names."""

    tensors: dict[str, LazyTensor]
    dropped: tuple[str, ...]  # names in the file that are known and not needed
    unknown: dict[str, Path]


def read_part(weights: Weights, names: Mapping[str, str], rules: tuple[Rule, ...]) -> PartTensors:
    """Reads tensors by a key table. `names`: the name that the table knows -> the name in the file."""
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
    """A tensor that has values: training with ZeRO-3 may leave empty ones. Raises CheckpointError."""
    header = weights.headers[name]
    if not header.numel:
        raise CheckpointError(
            f"{header.file}: {name} is empty, as ZeRO-3 leaves tensors that were not gathered; save the training again"
        )
    return FromFile(weights, name)
