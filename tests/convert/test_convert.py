"""Conversions: the target folder, and the vision tower that goes into it."""

import shutil
from pathlib import Path

import pytest

import llava
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.convert.merge import merge_lora
from llava.convert.split import extract_projector
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


def test_what_the_target_cannot_hold_is_refused_before_anything_is_written(clip: Path, tmp_path: Path) -> None:
    model = tiny.write_llava(tmp_path / "model", clip=clip, mm_use_im_start_end=True, added=("<im_start>", "<im_end>"))
    told: list[int] = []
    for to, why in (("llava-hf", "does not support"), ("nonsense", "cannot convert to")):
        with pytest.raises(llava.LlavaError, match=why):
            convert(model, tmp_path / "out", to=to, progress=lambda done, total: told.append(done))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(llava.LlavaError, match="is not empty"):
        convert("no/such-model", tmp_path / "out")  # the target first: a model may have to be downloaded
    assert not told


def test_the_room_for_a_tower_beside_the_shards_is_counted(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tiny.write_llava(tmp_path / "x", clip=clip), tmp_path / "native", check=False)
    usage, shards = shutil.disk_usage(tmp_path), (tmp_path / "native" / "model.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=shards + 100_000))
    with pytest.raises(llava.LlavaError, match=r"out: needs \d\.\d\d MB, but the disk has only"):
        convert(tmp_path / "native", tmp_path / "out", to="llava", check=False)
    convert(tmp_path / "native", tmp_path / "out", to="llama", check=False)


def test_a_tower_inside_is_recorded_as_such_and_survives_moves_conversions_and_merges(
    clip: Path, base: Path, tmp_path: Path
) -> None:
    """`mm_vision_tower` of a folder with its own tower is relative, and every copy of the folder brings the tower."""
    convert(tiny.write_llava(tmp_path / "x", clip=clip), tmp_path / "native", check=False)
    extract_projector(tmp_path / "native", tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "projector")
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    shutil.copytree(tmp_path / "projector" / "vision_tower", lora / "vision_tower")
    tiny.edit_json(lora / "config.json", mm_vision_tower="./vision_tower")
    convert(tmp_path / "projector", tmp_path / "converted", LoadOptions(base=base), to="llava", check=False)
    merge_lora(base, tmp_path / "merged", lora)
    expected = opened(tmp_path / "native")
    shutil.rmtree(lora)
    for name in ("converted", "merged"):
        found = opened((tmp_path / name).rename(tmp_path / f"moved-{name}"))
        assert found.source_config["mm_vision_tower"] == "./vision_tower"
        tower = [name for name in found.tensors if name.startswith("vision.")]
        assert_same(*({name: of.tensors[name].read().half() for name in tower} for of in (found, expected)))


def test_a_language_model_keeps_the_template_in_every_format(clip: Path, tmp_path: Path) -> None:
    source = tiny.write_llava(tmp_path / "x", clip=clip, llava_template="vicuna_v1")
    for to in ("llama", "llava", "native"):
        convert(source, tmp_path / to, LoadOptions(vision=False), to=to, check=False)
        assert opened(tmp_path / to).config.template == "vicuna_v1"
