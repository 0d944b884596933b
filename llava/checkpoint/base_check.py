"""Checks a base before the LoRA, projector or delta that needs it is downloaded, which can take hours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.checkpoint.detect import detect, read_files
from llava.errors import CheckpointError
from llava.formats import FORMATS
from llava.tensors.files import read_json_if_present
from llava.tensors.hub import locate

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def check_base_before_download(base: str | Path, source: str | Path, revision: str | None) -> None:
    """Checks that `base` exists, can be read and has the sizes in the config of `source`, a checkpoint on the hub.

    Downloads only config and tokenizer files. Does nothing if `source` is on this machine. Raises CheckpointError.
    """
    if Path(source).expanduser().exists():
        return
    known = _base_config(base)
    small = locate(str(source).partition("#")[0], revision=revision, weights=False)
    asked = read_json_if_present(small / "config.json")
    for key in _SIZES:
        if key in known and key in asked and known[key] != asked[key]:
            raise CheckpointError(
                f"{base}: {key} is {known[key]}, but {source} needs {asked[key]}, so it is not its base; pass the base "
                "model of this checkpoint as base= (--base)"
            )


def _base_config(base: str | Path) -> Mapping[str, Any]:
    """Returns the base's config under the keys of published checkpoints. Raises CheckpointError."""
    if not Path(base).expanduser().is_dir():
        config = read_json_if_present(locate(base, weights=False, what="base") / "config.json")
        nested = config.get("text_config")
        return nested if isinstance(nested, Mapping) else config
    files = read_files(base)
    detection = detect(files)
    format = FORMATS.get(detection.format)
    if format is None or not format.reads or format.needs_base:
        raise CheckpointError(
            f"{base}: has format {detection.format} ({detection.evidence[0]}), which cannot be a base; pass a language "
            "model as base= (--base)"
        )
    return format.published_config(files)
