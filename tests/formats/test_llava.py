"""The original's layout, written from tensors in memory: complete models and towers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.formats.clip import write_tower
from llava.formats.format import Checkpoint
from llava.formats.llava import write_llava
from tests import tiny
from tests.checkpoints import assert_same, opened, tensors_of

TOKENS = ("<im_start>", "<im_end>")
SHAPES: dict[str, dict[str, Any]] = {
    "v1.5": {},
    "linear": {"mm_projector_type": "linear"},
    "anyres": {**tiny.ANYRES, "mm_projector_type": "mlp2x_gelu"},
    "start and end": {"mm_use_im_start_end": True, "added": TOKENS},
    "shared heads": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "class token": {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1},
    "stretched": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
}


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest, clip: Path, tmp_path: Path) -> Checkpoint:
    return opened(tiny.write_llava(tmp_path / "source", clip=clip, **SHAPES[request.param]), force=True)


def write_as_it_was(folder: Path, model: Checkpoint, clip: Path, **options: Any) -> Path:
    common = {"tokenizer_from": model.tokenizer_folder, "vision_tower": str(clip)}
    write_llava(folder, model.config, tensors_of(model), **{**common, **options})
    return folder


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_written_model_opens_unchanged(model: Checkpoint, clip: Path, tmp_path: Path, form: Any) -> None:
    folder = write_as_it_was(tmp_path / "out", model, clip, file_type=form, max_shard_bytes=150_000)
    assert len(list(folder.glob(f"*-of-*.{form}"))) >= 2
    found = opened(folder)
    assert found.format == "llava"
    assert found.config == model.config
    assert all(
        name.startswith("vision_model.") for name in found.unused_names
    )  # the blocks of CLIP after the selected layer
    assert_same(tensors_of(found), tensors_of(model))


def test_a_written_mpt_opens_unchanged(clip: Path, tmp_path: Path) -> None:
    model = opened(tiny.write_mpt(tmp_path / "source", clip=clip))
    found = opened(write_as_it_was(tmp_path / "out", model, clip))
    assert found.format == "mpt"
    assert found.config == model.config
    assert_same(tensors_of(found), tensors_of(model))


def test_a_merged_model_has_the_published_names_keys_and_types(clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = opened(checkpoint)
    folder = write_as_it_was(tmp_path / "out", model, clip, file_type="bin", recorded={"mm_projector_lr": 2e-5})
    written = torch.load(folder / "pytorch_model.bin", weights_only=True)
    published = {
        **tiny.llama_tensors(tiny.llava_config(), 1, inv_freq=False),
        **tiny.projector_tensors(tiny.llava_config(), 1),
    }
    assert_same(dict(written), published)
    config, original = (json.loads((path / "config.json").read_text()) for path in (folder, checkpoint))
    own = {key for key in original if config.get(key) != original[key]}
    assert own <= {"_name_or_path", "initializer_range", "max_length", "pad_token_id", "pretraining_tp",
                   "transformers_version", "freeze_mm_vision_resampler", "tune_mm_vision_resampler"}  # fmt: skip
    assert config["mm_projector_lr"] == 2e-5


def test_a_trained_tower_is_saved_inside_and_takes_precedence_over_clip(
    clip: Path, checkpoint: Path, tmp_path: Path
) -> None:
    model = opened(checkpoint)
    tensors = tensors_of(model)
    tensors["vision.blocks.0.attn.qkv.weight"] += 1
    folder = tmp_path / "out"
    write_llava(folder, model.config, tensors, tokenizer_from=checkpoint, vision_tower=str(clip), tower_inside=True)
    assert json.loads((folder / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    found = opened(folder)
    assert found.config == model.config
    assert_same(tensors_of(found), {name: tensor.half() for name, tensor in tensors.items()})
    (clip_less := tmp_path / "clip").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(clip / name, clip_less)
    assert opened(folder, vision_tower=clip_less).missing == ()


def test_a_tower_written_is_a_clip_folder(clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = opened(checkpoint)
    write_tower(tmp_path / "tower", model.config, tensors_of(model))
    found = opened(checkpoint, vision_tower=tmp_path / "tower")
    assert found.config == model.config
    assert_same(tensors_of(found), tensors_of(model))
    transformers = pytest.importorskip("transformers")
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "tower").eval()
    pixels = torch.randn(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    with torch.no_grad():
        wanted = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    ours = llava.load(checkpoint, vision_tower=tmp_path / "tower", dtype="float32").vision_features(pixels)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=5e-5)


def test_a_model_without_vision_is_a_llama_that_transformers_opens(base: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = opened(base)
    folder = tmp_path / "out"
    write_llava(folder, model.config, tensors_of(model), tokenizer_from=base, vision_tower=None)
    ours = llava.load(folder, dtype="float32")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = "Once upon a time there was a painter."
    with torch.no_grad():
        wanted = theirs(torch.tensor([list(ours.prepare(prompt).ids)])).logits[0]
    torch.testing.assert_close(ours.logits(prompt), wanted, rtol=0, atol=1e-4)


def test_the_template_of_a_training_is_kept(clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = opened(checkpoint)
    config = replace(model.config, template="vicuna_v1")
    write_llava(tmp_path / "out", config, tensors_of(model), tokenizer_from=checkpoint, vision_tower=str(clip))
    assert opened(tmp_path / "out").config == config


def test_a_failed_write_leaves_no_files(clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = opened(checkpoint)
    tensors = tensors_of(model)
    del tensors["projector.2.bias"]
    with pytest.raises(llava.LlavaError, match=r"projector\.2\.bias"):
        write_llava(tmp_path / "out", model.config, tensors, tokenizer_from=checkpoint, vision_tower=str(clip))
    tensors = tensors_of(model)
    tensors["decoder.norm.weight"][3] = torch.nan
    with pytest.raises(llava.LlavaError, match="NaN"):
        write_llava(tmp_path / "out", model.config, tensors, tokenizer_from=checkpoint, vision_tower=str(clip))
    assert list(tmp_path.iterdir()) == []


def test_padding_side_and_trained_length_are_kept(clip: Path, tmp_path: Path) -> None:
    facts = {"tokenizer_padding_side": "left", "tokenizer_model_max_length": 1024}
    folder = tiny.write_llava(tmp_path / "llava", clip=clip, **facts)
    convert(folder, tmp_path / "native", check=False)
    convert(tmp_path / "native", tmp_path / "original", LoadOptions(vision_tower=clip), to="llava", check=False)
    written = json.loads((tmp_path / "original" / "config.json").read_text())
    assert {key: written[key] for key in facts} == facts
    plain = tiny.write_llava(tmp_path / "plain", clip=clip)
    assert torch.equal(llava.load(folder).logits("Hi"), llava.load(plain).logits("Hi"))
