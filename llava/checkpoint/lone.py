"""A projector that lies alone in a file, without a config.json: what that would say is seen of its tensors."""

import logging
import re
from pathlib import Path
from typing import Any

from llava.checkpoint import published
from llava.checkpoint.detect import Facts
from llava.checkpoint.files import Weights, read_json
from llava.errors import CheckpointError

log = logging.getLogger(__name__)


def look_at(file: Path) -> Facts:
    """The file in a folder's place. A config.json of LLaVA's beside it counts. Raises CheckpointError."""
    weights = Weights([file])
    layers = [name for name in weights if re.search(r"mm_projector\.(\d+\.)?weight$", name)]
    if not layers:
        raise CheckpointError(
            f"{file}: holds no mm_projector; of single files only projectors load: give the checkpoint's folder"
        )
    if odd := [name for name in layers if len(weights.entries[name].shape) != 2]:
        shape = list(weights.entries[odd[0]].shape)
        raise CheckpointError(f"{file}: {odd[0]} has shape {shape}, a projector's layer is a matrix; fetch it again")
    beside = file.parent / "config.json"
    settings = read_json(beside) if beside.is_file() else {}
    return Facts(file, settings if "mm_vision_tower" in settings else {}, weights)


def seen(facts: Facts, vision_tower: str | Path | None) -> dict[str, Any]:
    """LLaVA's keys of a config.json; the tower, if none is given, is that of published projectors of such a shape."""
    widths = [
        facts.weights.entries[name].shape[1]
        for name in sorted(facts.weights)
        if re.search(r"mm_projector\.(\d+\.)?weight$", name)
    ]
    tower = vision_tower or published.tower_of(widths[0], len(widths))
    if tower and not vision_tower:
        log.warning("%s: its shape is that of projectors of %s; vision_tower= names another", facts.folder, tower)
    return {
        "mm_vision_tower": str(tower) if tower else None,
        "mm_hidden_size": widths[0],
        "mm_projector_type": "linear" if len(widths) == 1 else f"mlp{len(widths)}x_gelu",
        "mm_vision_select_layer": -2,  # of every published LLaVA
    }
