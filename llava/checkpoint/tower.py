"""Where a LLaVA's vision tower is described, and what stands in when that is out of reach."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava.checkpoint import published, settings
from llava.checkpoint.files import locate, read_json
from llava.checkpoint.settings import Shapes
from llava.errors import CheckpointError

OWN_TOWER = "vision_tower"  # folder inside a checkpoint that describes, or holds, a tower nobody has published

log = logging.getLogger(__name__)


class Tower(NamedTuple):
    """A CLIP repository's own words."""

    folder: Path | None  # None: described by what is published
    config: Mapping[str, Any]  # config.json or its vision_config
    processor: Mapping[str, Any]  # preprocessor_config.json; empty: CLIP's published values


def own_tower(folder: Path) -> Path | None:
    """The tower that a checkpoint's folder brings, wherever the folder has been moved to since."""
    return folder / OWN_TOWER if (folder / OWN_TOWER / "config.json").is_file() else None


def find_tower(name: str, found: Shapes, *, fetch: bool = True) -> Tower:
    """The tower of that folder or hub id, for a checkpoint with these tensors.

    Weights are fetched only where the checkpoint holds no tower. `fetch` False asks no hub: for looking, the published
    sizes of a published tower will do. If it is out of reach and the checkpoint holds a tower of CLIP-L's width and
    depth, CLIP-L's config stands in. Raises CheckpointError naming the option that mends it.
    """
    held = "vision.cls" in found
    if not fetch and not held and not Path(name).is_dir() and name in published.CLIP_CONFIGS:
        return Tower(None, published.CLIP_CONFIGS[name], {})
    try:
        folder = locate(name, weights=fetch and not held, what="vision tower")
    except CheckpointError as error:
        if held and (sizes := settings.tower_from_shapes(found)):
            log.warning("%s; the checkpoint's own tower has CLIP-L's sizes, so CLIP-L's config stands in", error)
            return Tower(None, sizes, {})
        heads = "; the checkpoint holds the tower, but only that config tells its number of heads" if held else ""
        raise CheckpointError(f"{error}{heads}: name a CLIP folder with vision_tower= (--vision-tower)") from None
    processor = folder / "preprocessor_config.json"
    return Tower(folder, read_json(folder / "config.json"), read_json(processor) if processor.is_file() else {})
