"""Every row of the zoo: scaled down it loads as the row says, under any folder name; at full size it is recognised."""

from pathlib import Path
from typing import Any

import pytest

import llava
from llava.checkpoint.consistency import check_headers
from llava.checkpoint.detect import detect, read_files
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.errors import CheckpointError
from llava.zoo import catalogue as zoo
from llava.zoo.match import Matches, match
from tests import rows, tiny

ROWS = {entry["id"]: entry for entry in zoo.entries()}
FOLDERS = [id for id, entry in ROWS.items() if not rows.bare(entry)]
NEEDY = [id for id in FOLDERS if ROWS[id]["format"] in ("delta", "lora", "projector")]


def template(entry: Any) -> str:
    start = zoo.origin(entry)
    return str(start.get("conversation", {"serve": "llava_v1"})["serve"] or "plain").split()[0]


def written(folder: Path, entry: Any, clip: Path) -> tuple[Path, Path | None]:
    """Writes a row and its base and returns their folders."""
    rows.write_published(folder / "nonsense", entry, clip)
    needs_base = entry["format"] in ("delta", "lora", "projector")
    return folder / "nonsense", rows.write_base(folder / "mpt-lora", entry) if needs_base else None


def match_files(folder: Path) -> Matches:
    files = read_files(folder)
    return match(files, detect(files))


@pytest.mark.parametrize("id", FOLDERS)
def test_a_row_opens_under_any_name_as_the_zoo_says(id: str, clip: Path, tmp_path: Path, caplog: Any) -> None:
    entry = ROWS[id]
    folder, base = written(tmp_path, entry, clip)
    found = open_checkpoint(folder, LoadOptions(base=base))
    check_headers(found)
    config, tokenizer, start = found.config, found.tokenizer, zoo.origin(entry)
    assert config.template == template(entry)
    assert config.image
    assert config.image.mode == ("hf" if entry["format"] == "hf-reexport" else "original")
    aspect = start.get("image_aspect_ratio", "square")
    assert config.image.aspect == ("square" if aspect.startswith("absent") else aspect)
    assert config.start_end == rows.marks(entry)
    if config.start_end:
        last = config.decoder.vocab_size
        assert (tokenizer.id_of("<im_start>"), tokenizer.id_of("<im_end>")) == (last - 2, last - 1)
    if entry["format"] != "hf-reexport":
        assert config.padding_side == entry.get("tokenizer_padding_side", "right")
        assert found.tower_inside == (entry.get("vision_tower_in_checkpoint") is True)
        assert entry["family"] == "mpt" or config.decoder.vocab_size == rows.scaled(entry)["vocab_size"]
    else:
        assert found.tower_inside
    assert not caplog.records  # the base is the recorded one
    assert not any(name in found.evidence[0] for name in ("nonsense", "mpt-lora"))


@pytest.mark.parametrize("id", sorted(set(ROWS) - set(FOLDERS)))
def test_a_row_that_is_a_lone_file_opens_under_any_name(id: str, clip: Path, tmp_path: Path) -> None:
    entry = ROWS[id]
    folder = tiny.write_projector(
        tmp_path / "x", clip=clip, start_end=rows.marks(entry), mm_projector_type="linear", **tiny.LLAMA_1
    )
    file = (folder / "mm_projector.bin").rename(tmp_path / "mpt-lora.bin")
    base = rows.write_base(tmp_path / "delta", entry)
    found = open_checkpoint(file, LoadOptions(base=base, vision_tower=clip))
    check_headers(found)
    assert found.config.template == template(entry)
    assert found.config.start_end == rows.marks(entry)
    assert found.config.decoder.vocab_size == tiny.PIECES + 2 * rows.marks(entry)
    assert not found.tower_inside


@pytest.mark.parametrize("id", NEEDY)
def test_a_row_without_its_base_names_it_with_the_command(id: str, clip: Path, tmp_path: Path) -> None:
    folder = rows.write_scaled(tmp_path / "nonsense", ROWS[id], clip)
    with pytest.raises(CheckpointError) as error:
        llava.load(folder)
    expected = zoo.base_id(ROWS[id]) or ""
    assert expected in str(error.value)
    assert "pass its folder or hub id as base= (--base), e.g. base='" in str(error.value)
    assert ("raw LLaMA-1" in str(error.value)) == (ROWS[id]["format"] == "delta")


def test_at_full_size_every_row_is_recognised_from_its_headers(tmp_path: Path) -> None:
    for i, (id, entry) in enumerate(ROWS.items()):
        found = match_files(rows.write_headers(tmp_path / f"folder-{i}", entry))
        names = [one.entry["id"] for one in found.candidates]
        assert id in names, (id, [one.differs for one in found.nearest])
        if not rows.bare(entry):  # the tensors of a single file fit several rows
            assert names == [id]


def test_the_tokenizer_of_13b_v0_uses_its_own_bos_and_never_looks_up_the_padding(clip: Path, tmp_path: Path) -> None:
    entry = zoo.find("LLaVA-13b-delta-v0")
    folder, base = written(tmp_path, entry, clip)
    found = open_checkpoint(folder, LoadOptions(base=base))
    assert found.tokenizer.bos_id == 2
    assert found.tokenizer.id_of("[PAD]") == found.config.decoder.vocab_size == found.tokenizer.size - 1
    assert found.tokenizer.eos_id == 2  # config.json says 1
    assert found.config.eos_ids in ((), (2,))


@pytest.mark.parametrize("id", ["LLaVA-7b-delta-v0", "LLaVA-13b-delta-v0", "LLaVA-13b-delta-v0-science_qa"])
def test_a_v0_delta_with_an_upgraded_config_is_still_of_v0(id: str, clip: Path, tmp_path: Path) -> None:
    folder, base = written(tmp_path, zoo.find(id), clip)
    tiny.edit_json(folder / "config.json", architectures=["LlavaLlamaForCausalLM"], model_type="llava")
    assert open_checkpoint(folder, LoadOptions(base=base)).config.template == "llava_v0"
    tiny.edit_json(folder / "config.json", _name_or_path=tiny.ABSENT)
    assert open_checkpoint(folder, LoadOptions(base=base)).config.template == "llava_v0"


def test_the_science_qa_row_opens_with_the_tower_inside_or_not(clip: Path, tmp_path: Path) -> None:
    entry = zoo.find("llava-lcs558k-scienceqa-vicuna-13b-v1.3")
    config = {**rows.settings(entry), **rows.scaled(entry), "mm_vision_tower": str(clip)}
    for seed in (None, 5):
        found = open_checkpoint(tiny.write_llava(tmp_path / f"x{seed}", clip=clip, tower_seed=seed, **config))
        assert found.tower_inside == (seed is not None)
        assert found.config.template == "llava_v1"
