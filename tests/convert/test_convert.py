"""Conversions: the target folder, and the vision tower that goes into it."""

from pathlib import Path

import pytest

import llava
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.convert.merge import merge_lora
from tests import tiny
from tests.checkpoints import assert_same, opened


@pytest.mark.parametrize("to", ["native", "llava", "llava-hf"])
def test_a_given_tower_need_not_exist_under_its_recorded_name(to: str, clip: Path, base: Path, tmp_path: Path) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip, mm_vision_tower="nobody/clip")
    convert(lora, tmp_path / to, LoadOptions(base=base, vision_tower=clip), to=to)
    found = opened(tmp_path / to, vision_tower=clip if to == "llava" else None)
    assert "nobody/clip" in (found.vision_tower or "") if to == "llava" else found.tower_inside
    tower = [name for name in found.tensors if name.startswith("vision.")]
    expected = opened(lora, base=base, vision_tower=clip)
    assert_same(*({name: of.tensors[name].read() for name in tower} for of in (found, expected)))


@pytest.mark.parametrize("dangling", [False, True])
def test_a_target_may_be_a_link(dangling: bool, clip: Path, base: Path, tmp_path: Path) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    for job in ("convert", "merge"):
        disk, link = tmp_path / f"{job}-disk", tmp_path / job
        if not dangling:
            disk.mkdir()
        link.symlink_to(disk)
        if job == "convert":
            convert(lora, link, LoadOptions(base=base))
        else:
            merge_lora(base, link, lora)
        assert link.is_symlink()
        assert not disk.is_symlink()
        assert opened(disk).tensors
        assert {path.name for path in tmp_path.iterdir() if job in path.name} == {job, disk.name}


def test_a_target_that_is_a_file_has_its_own_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(llava.LlavaError, match="is a file; specify the path of a folder"):
        convert(checkpoint, tmp_path / "out")
