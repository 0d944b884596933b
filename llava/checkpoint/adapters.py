"""Opens a base model and its adapters without merging them: one checkpoint per adapter and one for the base."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llava.checkpoint.detect import detect, read_files
from llava.checkpoint.open import base_source, open_checkpoint
from llava.config import LoadOptions
from llava.errors import ConfigError
from llava.formats.format import Checkpoint

DEFAULT = "default"  # name of the adapter that `load(merge=False)` keeps separate
_ADAPTERS = ("lora", "projector")  # deltas are excluded: each would need a second full-size model in memory


def open_separately(
    source: str | Path, adapters: Mapping[str, str | Path], options: LoadOptions, *, merge: bool
) -> dict[str | None, Checkpoint]:
    """Returns {name: checkpoint} with the adapters in the given order, followed by the base under the key None.

    If `merge` is true, `source` is the base; otherwise, `source` is the first adapter and `options.base` is the base.
    `options.revision` applies only to `source`. Raises CheckpointError, ConfigError.
    """
    opened: dict[str | None, Checkpoint] = {}
    if not merge:
        files = read_files(source, options.revision)
        detection = detect(files)
        if detection.format in _ADAPTERS:
            options = replace(options, base=base_source(files, detection, options))
        opened[DEFAULT] = _open_adapter(DEFAULT, source, options)  # raises an error for any other format
        assert options.base is not None
        source, options = options.base, replace(options, base=None, revision=None)
    for name, folder in adapters.items():
        if not name or name in opened:
            raise ConfigError(
                f"adapters: {name!r} cannot be used as the name of {folder}; names must be unique and not empty"
            )
        opened[name] = _open_adapter(name, folder, replace(options, base=source, revision=None))
    return {**opened, None: open_checkpoint(source, options)}


def _open_adapter(name: str, folder: str | Path, options: LoadOptions) -> Checkpoint:
    checkpoint = open_checkpoint(folder, options)
    if checkpoint.format not in _ADAPTERS:
        raise ConfigError(
            f"{folder}: has format {checkpoint.format} ({checkpoint.evidence[0]}), which cannot be used as adapter "
            f"{name!r}; expected {' or '.join(_ADAPTERS)}"
        )
    return checkpoint
