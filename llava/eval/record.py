"""run.json: which model a run asked, with what settings, versions and machine."""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import llava
from llava.assistant import Assistant
from llava.checkpoint.detect import detect, read_files
from llava.eval.runs import RUN, SCHEMA
from llava.tensors.atomic import replacing
from llava.zoo.match import match

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".json", ".model")
_SAMPLES, _SAMPLE_BYTES = 17, 2**16  # of a file: after training, all of its tensors are others


def write_record(folder: Path, assistant: Assistant, model: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Writes run.json. model: name, path and base; a path of None is the included model. Raises OSError."""
    device = assistant.device
    value = {
        "schema": SCHEMA,
        "model": {**model, "zoo": zoo_entries(model["path"], settings.get("--revision"))},
        "settings": dict(settings),
        "versions": {"llava": llava.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "machine": {
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{device} ({platform.machine()})",
            "dtype": str(assistant.model.dtype).removeprefix("torch."),
            "template": assistant.preprocessor.template,
        },
    }
    with replacing(folder / RUN) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def weights_digest(sources: Iterable[str | None]) -> str:
    """Returns a digest by which other weights in the same folders are recognised: samples of each file, and its size.

    Hub ids count by their name.
    """
    digest = hashlib.sha256()
    for source in sources:
        folder = Path(source or "").expanduser()
        files = sorted(folder.glob("*")) if source and folder.is_dir() else [folder]
        for file in files if source else ():
            digest.update(file.name.encode(errors="surrogateescape"))
            if file.is_file() and file.suffix in _WEIGHTS:
                _sample(file, digest)
    return digest.hexdigest()


def _sample(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    digest.update(str(size).encode())
    with file.open("rb") as data:
        for i in range(_SAMPLES):
            data.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(data.read(_SAMPLE_BYTES))


def zoo_entries(path: str | None, revision: str | None) -> list[str]:
    """Returns the ids of the published checkpoints which these files can be, by their content."""
    if path is None:
        return []
    files = read_files(path, revision)
    return [str(one.entry["id"]) for one in match(files, detect(files)).candidates]
