"""`llava merge-lora`: exact results, prefixes, forms of the base."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from tests import tiny
from tests.asking import asked, opened
from tests.command import Command, refused
from tests.expected import MARKS, assert_same, merged, stored
from tests.tiny import PIECES


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"form": "safetensors"},
        {"wrapper": "base_model.model.", "adapter": ".default"},
        {"wrapper": "base_model."},
        {"rows": True, "added": MARKS, "vocab_size": PIECES + 3, "mm_use_im_start_end": True},
    ],
    ids=["bin", "safetensors", "default", "short prefix", "June 2023"],
)
@pytest.mark.parametrize("precise", [False, True], ids=["as the original", "precise"])
def test_a_lora_is_merged(
    command: Command, vicuna: Path, clip: Path, tmp_path: Path, form: dict[str, Any], precise: bool
) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip, **form)
    line = ["--base", vicuna, "--target", tmp_path / "T", "--lora", lora, *(["--precise"] if precise else [])]
    said = command("merge-lora", *line)
    expected = merged(vicuna, lora, precise=precise)
    found = stored(tmp_path / "T")
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert hashlib.sha256((tmp_path / "T" / "model.safetensors").read_bytes()).hexdigest() in said.out
    assert not (tmp_path / "T.partial").exists()
    own, after = (json.loads((folder / "config.json").read_text()) for folder in (lora, tmp_path / "T"))
    assert all(after[key] == own[key] for key in ("vocab_size", "mm_projector_type", "rms_norm_eps"))
    tokenizer = lora if "added" in form else vicuna
    assert (tmp_path / "T" / "tokenizer.model").read_bytes() == (tokenizer / "tokenizer.model").read_bytes()
    assert (tmp_path / "T" / "added_tokens.json").exists() == ("added" in form)
    if precise:  # loading merges precisely too
        torch.testing.assert_close(
            opened(tmp_path / "T").logits(asked(None)), opened(lora, base=vicuna).logits(asked(None)), atol=0.3, rtol=0
        )


def test_alpha_and_rank_are_read_from_the_folder(vicuna: Path, clip: Path, tmp_path: Path, command: Command) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    tiny.edit_json(lora / "adapter_config.json", lora_alpha=1)
    command("merge-lora", "--base", vicuna, "--target", tmp_path / "T", "--lora", lora)
    expected = merged(vicuna, lora, precise=False)
    assert_same(stored(tmp_path / "T"), expected)
    tiny.edit_json(lora / "adapter_config.json", lora_alpha=8)
    assert not torch.equal(
        merged(vicuna, lora, precise=False)["model.layers.0.mlp.up_proj.weight"],
        expected["model.layers.0.mlp.up_proj.weight"],
    )


@pytest.mark.parametrize("kind", ["a merged LLaVA", "Meta's files"])
def test_a_lora_merges_with_other_forms_of_its_base(
    command: Command, vicuna: Path, lora: Path, clip: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "a merged LLaVA":
        base = tiny.write_llava(tmp_path / "base", clip=clip)
    else:
        base = tiny.write_meta(tmp_path / "base" / "13B", shards=2)
    command("merge-lora", "--base", base, "--target", tmp_path / "T", "--lora", lora)
    assert_same(stored(tmp_path / "T"), merged(vicuna, lora, precise=False))


def test_an_empty_tensor_of_zero_3_is_refused_by_its_name(
    command: Command, vicuna: Path, clip: Path, tmp_path: Path
) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    held = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
    name = next(name for name in held if name.endswith("mm_projector.0.weight"))
    torch.save(held | {name: torch.zeros(0)}, lora / "non_lora_trainables.bin")
    line = ("--base", vicuna, "--target", tmp_path / "T", "--lora", lora)
    refused(command("merge-lora", *line, fails=True), "mm_projector.0.weight")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    with pytest.raises(llava.LlavaError, match=r"mm_projector\.0\.weight"):
        opened(lora, base=vicuna)
