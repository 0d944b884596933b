"""Extracting the projector of a model."""

from pathlib import Path

import torch

from llava.checkpoint.consistency import check_headers
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.convert.split import extract_projector
from tests import tiny
from tests.command import assert_one_line_error, run, run_well

TOKENS = ("<im_patch>", "<im_start>", "<im_end>")


def test_an_extracted_projector_on_its_model_gives_the_same_tensors(clip: Path, tmp_path: Path) -> None:
    whole = tiny.write_llava(tmp_path / "whole", clip=clip, added=TOKENS, mm_use_im_start_end=True)
    run_well("extract-projector", whole, tmp_path / "projector")
    weights = torch.load(tmp_path / "projector" / "mm_projector.bin", weights_only=True)
    assert set(weights) == {"model.mm_projector.0.weight", "model.mm_projector.0.bias", "model.mm_projector.2.weight",
                            "model.mm_projector.2.bias", "model.embed_tokens.weight"}  # fmt: skip
    found = open_checkpoint(tmp_path / "projector", LoadOptions(base=whole))
    before = open_checkpoint(whole)
    assert found.format == "projector"
    assert found.config.start_end
    for name in ("projector.0.weight", "projector.2.bias", "decoder.embed.weight"):
        assert torch.equal(found.tensors[name].read(), before.tensors[name].read()), name


def test_a_tower_of_unpublished_sizes_is_copied(raw: Path, clip: Path, tmp_path: Path) -> None:
    whole = tiny.write_llava(tmp_path / "whole", clip=clip, tower_seed=5)
    extract_projector(whole, tmp_path / "p")
    moved = (tmp_path / "p").rename(tmp_path / "q")
    before = open_checkpoint(whole)
    for under in (raw, whole):
        found = open_checkpoint(moved, LoadOptions(base=under))
        check_headers(found)
        assert found.config.vision == before.config.vision
        for name in ("vision.cls", "vision.blocks.0.attn.qkv.weight"):
            assert torch.equal(found.tensors[name].read(), before.tensors[name].read()), name


def test_a_model_without_vision_has_no_projector_to_extract(raw: Path, tmp_path: Path) -> None:
    assert_one_line_error(run("extract-projector", raw, tmp_path / "p"), "but no projector")
    assert not (tmp_path / "p").exists()


def test_the_projector_of_a_llava_hf_export_is_the_same(clip: Path, tmp_path: Path) -> None:
    whole = tiny.write_llava(tmp_path / "whole", clip=clip)
    convert(whole, tmp_path / "hf", to="llava-hf")
    for folder in (whole, tmp_path / "hf"):
        extract_projector(folder, tmp_path / f"p-{folder.name}")
    one, other = (
        torch.load(tmp_path / f"p-{name}" / "mm_projector.bin", weights_only=True) for name in ("whole", "hf")
    )
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
