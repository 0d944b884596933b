"""Opens a base and the adapters trained on it side by side: one checkpoint per adapter and one for the base."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.errors import ConfigError
from llava.formats.format import Checkpoint

DEFAULT = "default"  # name of an adapter that is kept separate but was not given a name
_ADAPTERS = ("lora", "projector")  # not delta, which would be a second whole model


def open_separately(
    source: str | Path, adapters: Mapping[str, str | Path], options: LoadOptions, *, merge: bool
) -> dict[str | None, Checkpoint]:
    """Returns the adapters by name, in order, then the base without an adapter under the key None.

    `source` is the base if `merge`, else the first adapter, whose base is `options.base`. `options.revision` applies
    to `source`. Raises CheckpointError, ConfigError.
    """
    opened: dict[str | None, Checkpoint] = {}
    if not merge:
        # raises if the checkpoint needs no base or none was given
        opened[DEFAULT] = _open_adapter(DEFAULT, source, options)
        assert options.base is not None
        source, options = options.base, replace(options, base=None, revision=None)
    for name, folder in adapters.items():
        if not name or name in opened:
            raise ConfigError(f"adapters: {name!r} cannot be the name of {folder}; each adapter needs a distinct name")
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
