"""Opening checkpoints: what all layouts have in common, and folders with faults."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava
from llava.checkpoint.open import open_checkpoint
from llava.config import ImageConfig, LlavaConfig, LoadOptions
from llava.convert.convert import convert
from llava.convert.verify import check_equal
from llava.errors import CheckpointError, ConfigError, LlavaError
from llava.formats.llama import RULES as HF_LLAMA
from llava.preprocess.image import choose_canvas
from llava.tensors import keymap
from tests import tiny
from tests.checkpoints import assert_same, opened, tensors_of


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A plain Llama in one safetensors file, which the test may change."""
    return tiny.write_llama(tmp_path / "llama")


def test_all_layouts_hold_the_same_bits(tmp_path: Path, clip: Path) -> None:
    first = None
    for layout in tiny.LAYOUTS:
        folder = tiny.write_llava(tmp_path / layout, layout=layout, clip=clip)
        convert(folder, tmp_path / f"{layout}-native", verify=True)
        for written in (folder, tmp_path / f"{layout}-native"):
            found = open_checkpoint(written)
            first = first or found
            check_equal(first, found)


def test_the_config_survives_json(checkpoint: Path) -> None:
    config = open_checkpoint(checkpoint).config
    assert LlavaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("decoder", [None, 5, "llama"])
def test_a_config_without_a_decoder_is_refused(decoder: object) -> None:
    with pytest.raises(ConfigError, match="config: decoder is"):
        LlavaConfig.from_dict({} if decoder is None else {"decoder": decoder})


def test_a_table_read_back_and_forth_names_the_same_tensors() -> None:
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 11) for part in "qkvo"]
    planned = keymap.plan(names, HF_LLAMA)
    assert not planned.unknown
    back = [name for ours in planned.tensors for name in keymap.disk_names(ours, HF_LLAMA)]
    assert sorted(back) == sorted(names)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": [1]},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"num_key_value_heads": "4"},
        {"num_attention_heads": 3},
        {"head_dim": "x"},
        {"max_position_embeddings": -5},
        {"max_position_embeddings": "x"},
        {"rms_norm_eps": None},
        {"rope_theta": "x"},
        {"tie_word_embeddings": "no"},
        {"hidden_act": "gelu"},
        {"architectures": 5},
        {"mm_vision_select_layer": "-2"},
        {"mm_vision_select_layer": -9},
        {"mm_vision_select_feature": "cls"},
        {"image_grid_pinpoints": 5, "image_aspect_ratio": "anyres"},
        {"image_grid_pinpoints": [[1]], "image_aspect_ratio": "anyres"},
        {"image_aspect_ratio": "anyres"},
        {"image_aspect_ratio": "wide"},
        {"mm_projector_type": "ldp"},
        {"mm_projector_type": 5},
        {"mm_use_im_start_end": True},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_an_invalid_config_is_one_line(checkpoint: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    tiny.edit_json(tmp_path / "copy" / "config.json", **change)
    with pytest.raises(LlavaError) as caught:
        llava.load(tmp_path / "copy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {}}}'),
        ("added_tokens.json", '{"a": "x"}'),
        ("special_tokens_map.json", "{"),
        ("generation_config.json", '{"eos_token_id": "two"}'),
        ("tokenizer.model", "not a model"),
    ],
)
def test_invalid_tokenizer_files_are_one_line(plain: Path, name: str, content: str) -> None:
    (plain / name).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        llava.load(plain)
    assert str(plain) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_with_fewer_layers_than_the_weights_is_refused(plain: Path) -> None:
    tiny.edit_json(plain / "config.json", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers = 1"):
        llava.load(plain)


def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path, clip: Path) -> None:
    folder = tiny.write_llava(tmp_path / "llava", layout="safetensors-shards", clip=clip)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    name = next(iter(table["weight_map"]))
    table["weight_map"][name] = "../llava/" + table["weight_map"][name]
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="in the same folder"):
        llava.load(folder)


def test_safetensors_come_before_bin_whatever_is_sharded(base: Path, tmp_path: Path) -> None:
    other = tiny.write_llama(tmp_path / "other", layout="safetensors", seed=5)
    both = tiny.write_llama(tmp_path / "both", layout="bin-shards")
    shutil.copy(other / "model.safetensors", both)
    assert_same(tensors_of(opened(both)), tensors_of(opened(other)))
    for file in both.glob("pytorch_model-*.bin"):
        file.unlink()  # a download of only *.json and *.safetensors also contains the index of the .bin files
    assert_same(tensors_of(opened(both)), tensors_of(opened(other)))


def spoiled(folder: Path) -> str:
    """Puts a NaN into the final norm and returns the tensor's name."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    return "model.norm.weight"


def test_force_continues_in_spite_of_nan(plain: Path, tmp_path: Path) -> None:
    name = spoiled(plain)
    for refused in (lambda: llava.load(plain), lambda: convert(plain, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=name):
            refused()
    assert not (tmp_path / "out").exists()
    llava.load(plain, force=True)
    convert(plain, tmp_path / "out", LoadOptions(force=True))
    assert open_checkpoint(tmp_path / "out").tensors


def test_a_token_without_a_row_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "llama")
    tiny.write_tokenizer(folder, added=("[PAD]",))  # its id is one past the last row, as in LLaVA-13b-delta-v0
    with pytest.raises(llava.PromptError, match=r"\[PAD\]"):
        llava.load(folder).generate("hi [PAD]")


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_batches_equal_single_answers_when_positions_are_stretched(tmp_path: Path, kind: str) -> None:
    scaling = {"rope_scaling": {"type": kind, "factor": 4.0}, "max_position_embeddings": 32}
    llama = llava.load(tiny.write_llama(tmp_path / "llama", **scaling), dtype="float32")
    prompts = ["Once", "Once upon a time there was a painter who would only ever paint the sea. " * 2, "The sea"]
    alone = [llama.generate(prompt, max_new_tokens=12).token_ids for prompt in prompts]
    assert [reply.token_ids for reply in llama.generate_batch(prompts, max_new_tokens=12)] == alone


def test_a_tower_of_other_width_than_the_projector_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    wide = tiny.write_clip(tmp_path / "clip")
    tiny.edit_json(wide / "config.json", vision_config=json.loads((wide / "config.json").read_text())["vision_config"])
    config = json.loads((wide / "config.json").read_text())
    config["vision_config"]["hidden_size"] *= 2
    (wide / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="vision_tower"):
        llava.load(checkpoint, vision_tower=wide)


def test_clip_l_sizes_replace_a_tower_that_cannot_be_found() -> None:
    from llava.formats.clip import find_tower

    found = {"vision.cls": (1024,), "vision.patch.weight": (1024, 3, 14, 14), "vision.pos": (577, 1024)}
    found |= {f"vision.blocks.{i}.mlp.up.weight": (4096, 1024) for i in range(24)}
    tower = find_tower("nobody/has-this", found)
    assert tower.folder is None
    assert (tower.config["num_attention_heads"], tower.config["image_size"]) == (16, 336)
    with pytest.raises(CheckpointError, match="--vision-tower"):
        find_tower("nobody/has-this", {**found, "vision.cls": (512,), "vision.patch.weight": (512, 3, 14, 14)})


def test_original_and_hf_arithmetic_break_a_tie_of_canvases_differently(tmp_path: Path, clip: Path) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=clip, tower_seed=3, **tiny.ANYRES)
    images: list[ImageConfig] = []
    for mode in ("original", "hf"):
        config = open_checkpoint(folder, LoadOptions(image_mode=mode)).config
        assert config.image
        images.append(config.image)
    assert [choose_canvas((40, 40), image) for image in images] == [(56, 112), (112, 56)]
    assert set(images[0].pinpoints) == set(images[1].pinpoints)


WITHOUT_ZOO = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("llava.zoo"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from llava.checkpoint.consistency import check_headers
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.errors import CheckpointError

whole, lora, base = sys.argv[1:]
check_headers(open_checkpoint(whole))
check_headers(open_checkpoint(lora, LoadOptions(base=base)))
try:
    open_checkpoint(lora)
except CheckpointError as error:
    print(error)
"""


def test_opening_works_without_the_catalogue(checkpoint: Path, clip: Path, tmp_path: Path) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    base = tiny.write_llama(tmp_path / "base", seed=7)
    command = [sys.executable, "-c", WITHOUT_ZOO, checkpoint, lora, base]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    # the base that the LoRA itself records
    assert "needs its base, lmsys/vicuna-13b-v1.3 (adapter_config.json: base_model_name_or_path" in done.stdout
