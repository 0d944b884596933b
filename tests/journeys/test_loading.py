"""Loading: any folder name, adapters, old projector files, a re-saved MPT, a tower in the shards."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from tests import tiny
from tests.asking import asked, opened
from tests.command import Command
from tests.expected import MARKS, assert_same, merged, stored, summed
from tests.tiny import PIECES

NONSENSE = ("llava-mpt-7b-lora-delta-v0", "llama-2-13b-chat.partial", "clip mm_projector.bin")


@pytest.mark.parametrize("name", NONSENSE)
def test_names_of_folders_decide_nothing(
    clip: Path, raw: Path, delta: Path, lora: Path, vicuna: Path, mpt: Path, tmp_path: Path, picture: Path, name: str
) -> None:
    merged_ = tiny.write_llava(tmp_path / "m", clip=clip)
    for i, (folder, base) in enumerate(((merged_, None), (delta, raw), (lora, vicuna), (mpt, None))):
        under = {"base": base} if base else {}
        right = opened(folder, **under)
        there = tmp_path / str(i) / name
        there.parent.mkdir()
        there.symlink_to(folder)
        if base:
            (tmp_path / f"b{i}").mkdir()
            under = {"base": (tmp_path / f"b{i}" / "vicuna-llama-2-llava").absolute()}
            under["base"].symlink_to(base)
        other = opened(there, **under)
        first, second = right.prepare(asked(picture)), other.prepare(asked(picture))
        assert first.prompt == second.prompt
        assert torch.equal(right.logits(asked(picture)), other.logits(asked(picture)))


@pytest.mark.parametrize("name", ["x#y", "a b", "x\ny", "model.safetensors", "[red]%s{}", "name=value"])
def test_odd_names_are_names(
    command: Command, vicuna: Path, lora: Path, raw: Path, delta: Path, tmp_path: Path, name: str
) -> None:
    copies = {}
    for kind, folder in (("base", vicuna), ("lora", lora), ("raw", raw), ("delta", delta)):
        copies[kind] = tmp_path / kind / name
        shutil.copytree(folder, copies[kind])
    line = ("--max-new-tokens", 2)
    command("ask", "Hi", "--model", copies["lora"], "--base", copies["base"], *line)
    command("ask", "Hi", "--model", copies["base"], "--adapter", f"one={copies['lora']}", *line)
    command("merge-lora", "--base", copies["base"], "--target", tmp_path / name, "--lora", copies["lora"])
    assert_same(stored(tmp_path / name), merged(vicuna, lora, precise=False))
    command("convert", tmp_path / name, tmp_path / f"{name}-hf", "--to", "llava-hf", "--no-check")
    command("inspect", tmp_path / f"{name}-hf")
    command("apply-delta", "--base", copies["raw"], "--target", tmp_path / f"{name}-sum", "--delta", copies["delta"])
    assert_same(stored(tmp_path / f"{name}-sum"), summed(stored(raw), stored(delta)))


def test_loras_are_not_merged_and_can_be_switched(
    vicuna: Path, lora: Path, clip: Path, tmp_path: Path, picture: Path
) -> None:
    second = tiny.write_lora(tmp_path / "second", clip=clip, seed=9, mm_projector_type="linear")
    vlm = opened(vicuna, adapters={"one": lora, "two": second})
    assert vlm.adapters == ["one", "two"]
    bare = opened(vicuna).logits("Once upon a time")
    for name, folder in (("two", second), ("one", lora), ("two", second)):
        vlm.adapter(name)
        assert vlm.active == name
        alone = opened(folder, base=vicuna)
        torch.testing.assert_close(vlm.logits(asked(picture)), alone.logits(asked(picture)), atol=1e-3, rtol=0)
    vlm.adapter(None)
    assert vlm.active is None
    assert torch.equal(vlm.logits("Once upon a time"), bare)
    with pytest.raises(llava.LlavaError, match="three"):
        vlm.adapter("three")


def test_a_lora_with_its_own_rows_and_a_single_one_are_not_merged_either(
    vicuna: Path, lora: Path, clip: Path, tmp_path: Path, picture: Path
) -> None:
    config: dict[str, Any] = {"vocab_size": PIECES + 3, "mm_use_im_start_end": True}
    june = tiny.write_lora(tmp_path / "june", clip=clip, seed=8, rows=True, added=MARKS, **config)
    vlm = opened(vicuna, adapters={"june": june, "one": lora})
    assert vlm.active == "june"  # the first one
    for name, folder, rows_ in (("june", june, PIECES + 3), ("one", lora, PIECES), ("june", june, PIECES + 3)):
        vlm.adapter(name)
        found, expected = vlm.logits(asked(picture)), opened(folder, base=vicuna).logits(asked(picture))
        assert found.shape[1] == rows_
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    apart = opened(lora, base=vicuna, merge=False)
    vlm.adapter("one")
    torch.testing.assert_close(apart.logits(asked(picture)), vlm.logits(asked(picture)), atol=1e-4, rtol=0)
    assert apart.adapters == ["default"]


@pytest.mark.parametrize("n_rows", [2, PIECES + 2], ids=["two rows", "the whole table"])
def test_an_old_projector_file_brings_its_two_rows(
    clip: Path, tmp_path: Path, vicuna: Path, picture: Path, n_rows: int
) -> None:
    folder = tiny.write_projector(tmp_path / "p", clip=clip, start_end=True, mm_projector_type="linear")
    tiny.write_tokenizer(folder, added=("<im_start>", "<im_end>"), legacy=None)
    held = torch.load(folder / "mm_projector.bin", weights_only=True)
    two = held["model.embed_tokens.weight"]
    assert len(two) == 2
    if n_rows > 2:
        noise = tiny.tensor(4, "noise", (PIECES, two.shape[1]), 0.5).to(two.dtype)
        held["model.embed_tokens.weight"] = torch.cat([noise, two])
        torch.save(held, folder / "mm_projector.bin")
    vlm = opened(folder, base=vicuna)
    given = vlm.prepare(asked(picture))
    at = given.token_ids.index(-200)
    assert given.token_ids[at - 1 : at + 2] == [PIECES, -200, PIECES + 1]
    table = dict(vlm.model.state_dict())["decoder.embed.weight"]
    assert torch.equal(table[PIECES : PIECES + 2].float(), two.float())
    under = stored(vicuna)["model.embed_tokens.weight"]
    assert torch.equal(table[:PIECES].float(), under.float())


def test_an_mpt_saved_again_loads(mpt: Path, clip: Path, tmp_path: Path, picture: Path) -> None:
    again = tmp_path / "x"
    shutil.copytree(mpt, again)
    tiny.edit_json(again / "config.json", attn_config={"model_type": ""})
    index = json.loads((again / "pytorch_model.bin.index.json").read_text())
    torch.save({"lm_head.weight": stored(mpt)["transformer.wte.weight"]}, again / "pytorch_model-head.bin")
    index["weight_map"]["lm_head.weight"] = "pytorch_model-head.bin"
    tiny.write_json(again / "pytorch_model.bin.index.json", index)
    assert torch.equal(opened(again).logits(asked(picture)), opened(mpt).logits(asked(picture)))


def test_the_tower_in_the_shards_is_used(clip: Path, next_: Path, tmp_path: Path, picture: Path) -> None:
    other = tiny.write_clip(tmp_path / "clip", seed=11)
    assert torch.equal(opened(next_).logits(asked(picture)), opened(next_, vision_tower=other).logits(asked(picture)))
