"""`llava convert` and `llava extract-projector`: back and forth to the same bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import rows, tiny
from tests.asking import asked, opened, pixels
from tests.command import Command, refused
from tests.expected import MARKS, V11, Tensors, assert_same, stored, without_rotary
from tests.tiny import PIECES


@pytest.mark.parametrize("kind", ["v1.5", "v1", "v1.6", "native", "delta"])
def test_a_projector_comes_out_as_it_was_and_goes_back(
    command: Command, clip: Path, raw: Path, delta: Path, next_: Path, tmp_path: Path, kind: str
) -> None:
    options: list[object] = []
    if kind == "v1.6":
        source = next_
    elif kind == "delta":
        source, options = delta, ["--base", raw]
    else:
        projector = "linear" if kind == "v1" else "mlp2x_gelu"
        source = tiny.write_llava(tmp_path / "source", clip=clip, mm_projector_type=projector)
    wanted = {name: value for name, value in stored(source).items() if "mm_projector" in name}
    if kind == "native":
        command("convert", source, tmp_path / "native", "--no-check")
        source = tmp_path / "native"
    command("extract-projector", source, tmp_path / "P", *options)
    found = torch.load(tmp_path / "P" / "mm_projector.bin", weights_only=True)
    kept = {name: value for name, value in found.items() if "mm_projector" in name}
    assert set(kept) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(kept[name].float(), value.float()), name
    if kind != "v1.5":
        return
    base = tmp_path / "llama"
    command("convert", source, base, "--to", "llama", "--no-check")
    text = "<image>\nA boat"
    pair, whole = (opened(path, **more) for path, more in ((tmp_path / "P", {"base": base}), (source, {})))
    image = Image.new("RGB", (70, 30), "red")
    assert torch.equal(pair.logits(text, images=[image]), whole.logits(text, images=[image]))


def back_and_forth(command: Command, source: Path, folder: Path, by: str, end: str) -> Path:
    command("convert", source, folder / "there", "--to", by, "--verify")
    report = (folder / "there" / "conversion.md").read_text()
    assert "logits" in report.lower()
    command("convert", folder / "there", folder / "back", "--to", end, "--no-check")
    return folder / "back"


def assert_back(source: Path, back: Path, clip: Path) -> None:
    """Asserts that every tensor of the source came back unchanged, and that an added tower is CLIP's."""
    found, expected = stored(back), without_rotary(stored(source))
    assert_same({name: value for name, value in found.items() if name in expected}, expected)
    theirs = torch.load(clip / "pytorch_model.bin", weights_only=True)
    for name in set(found) - set(expected):
        value = theirs[name[name.index("vision_tower.vision_model.") + len("vision_tower.") :]]
        assert torch.equal(found[name].float(), value.to(found[name].dtype).float()), name


@pytest.mark.parametrize("by", ["native", "llava-hf", "llava"])
@pytest.mark.parametrize("family", ["v1.5", "v1.6"])
def test_the_originals_layout_back_and_forth(
    command: Command, clip: Path, next_: Path, tmp_path: Path, by: str, family: str
) -> None:
    source = next_ if family == "v1.6" else tiny.write_llava(tmp_path / "source", clip=clip)
    assert_back(source, back_and_forth(command, source, tmp_path, by, "llava"), clip)


@pytest.mark.parametrize("by", ["native", "llava"])
def test_an_mpt_back_and_forth(command: Command, mpt: Path, clip: Path, tmp_path: Path, by: str) -> None:
    assert_back(mpt, back_and_forth(command, mpt, tmp_path, by, "llava"), clip)


@pytest.mark.parametrize("by", ["native", "llava"])
def test_a_v1_with_a_linear_projector_back_and_forth(command: Command, clip: Path, tmp_path: Path, by: str) -> None:
    source = tiny.write_llava(tmp_path / "source", clip=clip, added=MARKS, **V11)
    assert_back(source, back_and_forth(command, source, tmp_path, by, "llava"), clip)


def test_grouped_heads_back_and_forth(command: Command, clip: Path, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 1e6}
    config = tiny.ANYRES | heads | {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"}
    source = tiny.write_llava(tmp_path / "x", layout="safetensors-shards", clip=clip, tower_seed=5, **config)
    back = back_and_forth(command, source, tmp_path, "llava-hf", "llava")
    assert_back(source, back, clip)
    kept = json.loads((back / "config.json").read_text())
    assert {key: kept[key] for key in heads} == heads
    assert opened(back).prepare(asked(None)).prompt == opened(source).prepare(asked(None)).prompt


def test_an_export_can_be_moved_and_needs_no_other_folder(command: Command, tmp_path: Path, picture: Path) -> None:
    clip = tiny.write_clip(tmp_path / "clip")
    source = tiny.write_llava(tmp_path / "x", layout="safetensors", clip=clip, tower_seed=5, **tiny.ANYRES)
    expected = opened(source).logits(asked(picture))
    for to in ("llava", "native", "llava-hf"):
        command("convert", source, tmp_path / "out", "--to", to, "--no-check")
        (tmp_path / "out").rename(tmp_path / f"moved-{to}")
    shutil.rmtree(clip)
    shutil.rmtree(source)
    for to in ("llava", "native", "llava-hf"):
        found = opened(tmp_path / f"moved-{to}", image_mode="original").logits(asked(picture))
        torch.testing.assert_close(found[:, :PIECES], expected, atol=1e-4, rtol=0)


def test_llava_hfs_layout_becomes_native_and_a_plain_llama(command: Command, next_: Path, tmp_path: Path) -> None:
    source = as_llava_hf(next_, tmp_path / "hf", new=False)
    command("convert", source, tmp_path / "llama", "--to", "llama", "--no-check")
    found, expected = stored(tmp_path / "llama"), stored(next_)
    assert set(found) == {name for name in expected if "layers." in name and "vision" not in name} | {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    for name, value in found.items():
        assert torch.equal(value[: len(expected[name])], expected[name]), name


@pytest.mark.parametrize("by", ["native", "llama"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_llama_back_and_forth(command: Command, tmp_path: Path, by: str, dtype: str) -> None:
    source = tiny.write_llama(tmp_path / "source", torch_dtype=dtype)
    assert_same(stored(back_and_forth(command, source, tmp_path, by, "llama")), without_rotary(stored(source)))


def as_llava_hf(source: Path, folder: Path, *, new: bool) -> Path:
    """Writes llava-hf's layout, with rows for `<image>` and `<pad>`, padded to 64 more rows."""
    folder.mkdir()
    lm = "model.language_model." if new else "language_model.model."
    top = "model." if new else ""
    made = {}
    for name, value in without_rotary(stored(source)).items():
        if name == "lm_head.weight":
            key = name if new else f"language_model.{name}"
        elif "vision_tower" in name:
            key = top + name.removeprefix("model.vision_tower.")
        elif "mm_projector" in name:
            layer, part = name.split(".")[-2:]
            key = f"{top}multi_modal_projector.linear_{int(layer) // 2 + 1}.{part}"
        elif name == "model.image_newline":
            key = f"{top}image_newline"
        else:
            key = lm + name.removeprefix("model.")
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            value = torch.cat([value, tiny.tensor(9, name, (64, value.shape[1]), 0.02).to(value.dtype)])
        made[key] = value
    own = json.loads((source / "config.json").read_text())
    text = {key: own[key] for key in (*rows.KEYS, "max_position_embeddings", "rms_norm_eps", "torch_dtype")}
    text |= {"model_type": "llama", "vocab_size": PIECES + 64}
    vision = json.loads((Path(own["mm_vision_tower"]) / "config.json").read_text())["vision_config"]
    vision |= {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "image_size": 56, "patch_size": 14}
    vision |= {"intermediate_size": 128, "model_type": "clip_vision_model", "projection_dim": 32}
    next_ = "image_grid_pinpoints" in own
    config: dict[str, Any] = {
        "architectures": [f"Llava{'Next' if next_ else ''}ForConditionalGeneration"],
        "text_config": text,
    }
    config |= {"vision_config": vision, "model_type": "llava_next" if next_ else "llava", "ignore_index": -100}
    config |= {"image_token_index": PIECES, "pad_token_id": PIECES + 1, "projector_hidden_act": "gelu"}
    config |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "torch_dtype": "bfloat16"}
    config |= {"tie_word_embeddings": False}
    if next_:
        pairs = [[high, wide] for wide, high in own["image_grid_pinpoints"]]
        config |= {"image_grid_pinpoints": pairs, "use_image_newline_parameter": True}
    tiny.save(made, folder, "safetensors-shards")
    tiny.write_json(folder / "config.json", config)
    shutil.copy(Path(own["mm_vision_tower"]) / "preprocessor_config.json", folder)
    tiny.write_tokenizer(folder, added=("<image>", "<pad>"), pad="<pad>")
    return folder


@pytest.mark.parametrize("new", [False, True], ids=["old keys", "new keys"])
@pytest.mark.parametrize("by", ["llava", "native"])
def test_llava_hfs_layout_back_and_forth(command: Command, next_: Path, tmp_path: Path, by: str, new: bool) -> None:
    source = as_llava_hf(next_, tmp_path / "hf", new=new)
    back = stored(back_and_forth(command, source, tmp_path, by, "llava-hf"))
    expected = stored(source)

    def plain(tensors: Tensors) -> Tensors:
        """Removes the prefixes in which old and new tensor names differ."""
        short = {}
        for name, value in tensors.items():
            key = name.removeprefix("model.").replace("language_model.model.", "language_model.")
            key = "lm_head.weight" if key.endswith("lm_head.weight") else key
            short[key] = value
        return short

    assert_same(plain(back), plain(expected))


@pytest.mark.parametrize("new", [False, True], ids=["old keys", "new keys"])
def test_llava_hfs_layout_answers_as_its_source_does(next_: Path, tmp_path: Path, picture: Path, new: bool) -> None:
    theirs = opened(as_llava_hf(next_, tmp_path / "hf", new=new), image_mode="original", template="llava_v1")
    ours = opened(next_)
    torch.testing.assert_close(
        theirs.logits(asked(picture))[:, :PIECES], ours.logits(asked(picture))[:, :PIECES], atol=1e-4, rtol=0
    )


def test_llava_hf_crops_unless_image_mode_says_otherwise(
    command: Command, clip: Path, tmp_path: Path, picture: Path
) -> None:
    source = tiny.write_llava(tmp_path / "source", clip=clip, tower_seed=2)
    folder = as_llava_hf(source, tmp_path / "hf", new=False)
    cropped = pixels(opened(folder), picture)
    padded = pixels(opened(folder, image_mode="original"), picture)
    assert cropped.shape == padded.shape
    assert not torch.equal(cropped, padded)
    square = tmp_path / "square.png"
    Image.open(picture).crop((25, 0, 65, 40)).save(square)
    by_hand = pixels(opened(folder), square)
    assert (cropped - by_hand).abs().mean() < (padded - by_hand).abs().mean()


@pytest.mark.parametrize("form", ["llava", "llava-hf", "llama", "native", "gguf"])
def test_failed_conversions_leave_no_files(command: Command, mpt: Path, next_: Path, tmp_path: Path, form: str) -> None:
    if form in ("llava-hf", "llama"):
        said = command("convert", mpt, tmp_path / "out", "--to", form, fails=True)
        refused(said)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    refused(command("convert", next_, tmp_path / "used", "--to", form, fails=True), "used")
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "notes.txt"]


def test_gguf_holds_the_same_bytes(command: Command, clip: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = tiny.write_llava(tmp_path / "source", clip=clip)
    command("convert", source, tmp_path / "out", "--to", "gguf", "--no-check")
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert [file.name.split("-")[0] for file in files] == ["mmproj", "model"]
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(files[1]).tensors}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    whole = stored(source)
    for i in range(2):
        for ours, theirs in names.items():
            block = "mlp" if "ffn" in theirs else "self_attn"
            value = whole[f"model.layers.{i}.{block}.{ours}.weight"]
            value = tiny.interleaved(value, 16) if ours in ("q_proj", "k_proj") else value
            assert held[f"blk.{i}.{theirs}.weight"].data.tobytes() == value.contiguous().numpy().tobytes()
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("lm_head", "output")):
        assert held[f"{theirs}.weight"].data.tobytes() == whole[f"{ours}.weight"].numpy().tobytes()
    assert len(held) == 2 * 9 + 3
    assert (tmp_path / "out" / "conversion.md").is_file()


def test_left_padding_is_a_fact_of_the_config(clip: Path, tmp_path: Path, command: Command) -> None:
    facts = tiny.ANYRES | {"tokenizer_padding_side": "left"}
    source = tiny.write_llava(tmp_path / "x", layout="safetensors", clip=clip, tower_seed=5, **facts)
    command("convert", source, tmp_path / "n", "--no-check")
    command("convert", tmp_path / "n", tmp_path / "o", "--to", "llava", "--no-check")
    assert json.loads((tmp_path / "o" / "config.json").read_text())["tokenizer_padding_side"] == "left"
