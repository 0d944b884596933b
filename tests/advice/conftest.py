"""Checkpoints and data that the rows of the table read."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from llava.convert.convert import convert
from tests import tiny
from tests.conftest import Share
from tests.training import build_assets


@pytest.fixture(scope="session")
def shared_folders(
    share: Share, clip: Path, checkpoint: Path, base: Path, raw: Path, delta: Path, lora: Path
) -> Mapping[str, Path]:
    """The folders that rows use by name."""

    def build(folder: Path) -> None:
        folder.mkdir()
        build_assets(folder / "assets", clip, checkpoint)
        Image.linear_gradient("L").resize((90, 40)).convert("RGB").save(folder / "picture.png")

    data = share("advice", build)
    found = {
        "clip": clip,
        "llava": checkpoint,
        "llama": base,
        "raw": raw,
        "delta": delta,
        "lora": lora,
        "projector": share("projector", lambda folder: tiny.write_projector(folder, clip=clip)),
        "mpt": share("mpt", lambda folder: tiny.write_mpt(folder, clip=clip)),
        "sharded": share("sharded", lambda folder: tiny.write_llava(folder, clip=clip, layout="safetensors-shards")),
        "single": share("single", lambda folder: tiny.write_llava(folder, clip=clip, layout="safetensors")),
        "llava_hf": share("llava-hf", lambda folder: convert(checkpoint, folder, to="llava-hf")),
        "meta": share("meta", lambda folder: tiny.write_meta(folder / "7B")),
    }
    return {
        **found,
        "data": data / "assets" / "data.json",
        "images": data / "assets" / "images",
        "picture": data / "picture.png",
    }
