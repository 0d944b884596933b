"""A base and what was trained on it, opened side by side: a checkpoint for each adapter and one for the base alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.checkpoint.detect import Kind
from llava.checkpoint.open import Checkpoint, open_checkpoint
from llava.errors import ConfigError

DEFAULT = "default"  # the name of a LoRA that is kept apart without another
_ADAPTERS: tuple[Kind, ...] = ("lora", "projector")  # a delta would be a second whole model


def open_apart(
    path: str | Path,
    *,
    base: str | Path | None,
    merge: bool,
    adapters: Mapping[str, str | Path],
    revision: str | None,
    **options: Any,
) -> dict[str | None, Checkpoint]:
    """The adapters by name, in order, then under None the base alone.

    The base is what lies at `path`; with `merge` False that is the first adapter, and `base` what it is put on.
    `revision` is of `path`. Options as for `open_checkpoint`. Raises CheckpointError, ConfigError.
    """
    opened: dict[str | None, Checkpoint] = {}
    if not merge:
        # a folder that needs no base, or misses it, is refused here
        opened[DEFAULT] = _adapter(DEFAULT, path, base=base, revision=revision, **options)
        assert base is not None
        path, base, revision = base, None, None
    for name, folder in adapters.items():
        if not name or name in opened:
            raise ConfigError(f"adapters: {name!r} is no name for {folder}; each needs a name of its own")
        opened[name] = _adapter(name, folder, base=path, **options)
    return {**opened, None: open_checkpoint(path, base=base, revision=revision, **options)}


def _adapter(name: str, folder: str | Path, **options: Any) -> Checkpoint:
    checkpoint = open_checkpoint(folder, **options)
    if checkpoint.kind not in _ADAPTERS:
        raise ConfigError(
            f"{folder}: {checkpoint.kind} ({checkpoint.evidence[0]}): can not be kept apart as the adapter {name!r}; "
            f"only {' or '.join(_ADAPTERS)} can"
        )
    return checkpoint
