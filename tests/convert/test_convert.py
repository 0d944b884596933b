"""Conversions: the target folder, and the vision tower that goes into it."""

from pathlib import Path

import pytest

import llava
from llava.convert import native
from llava.convert.merge import merge_lora
from tests import tiny
from tests.checkpoints import assert_same, opened


@pytest.mark.parametrize("to", ["native", "original", "hf"])
def test_a_given_tower_need_not_exist_under_its_recorded_name(to: str, clip: Path, base: Path, tmp_path: Path) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip, mm_vision_tower="nobody/clip")
    native.convert(lora, tmp_path / to, to=to, base=base, vision_tower=clip)
    found = opened(tmp_path / to, vision_tower=clip if to == "original" else None)
    assert "nobody/clip" in (found.vision_tower or "") if to == "original" else found.tower_inside
    tower = [name for name in found.sources if name.startswith("vision.")]
    expected = opened(lora, base=base, vision_tower=clip)
    assert_same(*({name: of.sources[name].read() for name in tower} for of in (found, expected)))


@pytest.mark.parametrize("dangling", [False, True])
def test_a_target_may_be_a_link(dangling: bool, clip: Path, base: Path, tmp_path: Path) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    for job in ("convert", "merge"):
        disk, link = tmp_path / f"{job}-disk", tmp_path / job
        if not dangling:
            disk.mkdir()
        link.symlink_to(disk)
        if job == "convert":
            native.convert(lora, link, base=base)
        else:
            merge_lora(base, link, lora)
        assert link.is_symlink()
        assert not disk.is_symlink()
        assert opened(disk).sources
        assert {path.name for path in tmp_path.iterdir() if job in path.name} == {job, disk.name}


def test_a_target_that_is_a_file_has_its_own_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(llava.LlavaError, match="is a file; name a folder"):
        native.convert(checkpoint, tmp_path / "out")
