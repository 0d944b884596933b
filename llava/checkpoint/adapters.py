"""A base and the adapters trained on it, opened side by side: one checkpoint for each adapter and one for the base."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.errors import ConfigError
from llava.formats.format import Checkpoint

DEFAULT = "default"  # the name of a LoRA that is kept separate without a name of its own
_ADAPTERS = ("lora", "projector")  # a delta would be a second whole model


def open_separately(
    source: str | Path, adapters: Mapping[str, str | Path], options: LoadOptions, *, merge: bool
) -> dict[str | None, Checkpoint]:
    """The adapters by name, in order, then the base without an adapter under None.

    `source` is the base; with `merge` False it is the first adapter, and `options.base` its base. `options.revision`
    belongs to `source`. Raises CheckpointError, ConfigError.
    """
    opened: dict[str | None, Checkpoint] = {}
    if not merge:
        # raises if the folder needs no base or has none
        opened[DEFAULT] = _open_adapter(DEFAULT, source, options)
        assert options.base is not None
        source, options = options.base, replace(options, base=None, revision=None)
    for name, folder in adapters.items():
        if not name or name in opened:
            raise ConfigError(f"adapters: {name!r} cannot be the name of {folder}; each needs a distinct name")
        opened[name] = _open_adapter(name, folder, replace(options, base=source, revision=None))
    return {**opened, None: open_checkpoint(source, options)}


def _open_adapter(name: str, folder: str | Path, options: LoadOptions) -> Checkpoint:
    checkpoint = open_checkpoint(folder, options)
    if checkpoint.format not in _ADAPTERS:
        raise ConfigError(
            f"{folder}: {checkpoint.format} ({checkpoint.evidence[0]}): cannot be the adapter {name!r}; "
            f"expected {' or '.join(_ADAPTERS)}"
        )
    return checkpoint
