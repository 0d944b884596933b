"""run.json: which model a run asked, with what settings, versions and machine."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import llava
from llava.assistant import Assistant
from llava.checkpoint.detect import detect, read_files
from llava.eval.runs import RUN, SCHEMA
from llava.tensors.atomic import replacing
from llava.zoo.match import match


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


def zoo_entries(path: str | None, revision: str | None) -> list[str]:
    """Returns the ids of the published checkpoints which these files can be, by their content."""
    if path is None:
        return []
    files = read_files(path, revision)
    return [str(one.entry["id"]) for one in match(files, detect(files)).candidates]
