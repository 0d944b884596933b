"""GGUF files, read back with the gguf package. tests/oracles/test_llama_cpp.py opens them in llama.cpp."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.convert.verify import check_equal
from llava.errors import CheckpointError
from llava.formats.gguf import Gguf
from llava.formats.gguf_read import read_gguf
from tests import tiny

package = pytest.importorskip("gguf")
MODEL, MMPROJ = "model-f16.gguf", "mmproj-f16.gguf"


class File:
    """Keys and tensors of a GGUF file as the gguf package reads them."""

    def __init__(self, path: Path):
        reader = package.GGUFReader(path)
        self.keys: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors: dict[str, Tensor] = {}
        for tensor in reader.tensors:
            values = package.quants.dequantize(tensor.data, tensor.tensor_type)
            shape = [int(size) for size in reversed(tensor.shape)]
            self.tensors[tensor.name] = torch.from_numpy(values.copy()).view(shape)


@pytest.fixture(scope="module")
def written(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gguf") / "out"
    convert(checkpoint, target, to="gguf", verify=True, check=True)
    return target


def test_keys_tell_the_sizes_of_the_language_model(written: Path) -> None:
    keys = File(written / MODEL).keys
    expected = {
        "general.architecture": "llama",
        "general.file_type": int(package.LlamaFileType.MOSTLY_F16),
        "llama.vocab_size": tiny.PIECES,
        "llama.context_length": 4096,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 172,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
    }
    assert {key: keys[key] for key in expected} == expected


def test_keys_tell_the_sizes_of_the_tower(written: Path) -> None:
    keys = File(written / MMPROJ).keys
    expected = {
        "general.architecture": "clip",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        "clip.vision.image_size": tiny.IMAGE_SIZE,
        "clip.vision.patch_size": tiny.PATCH,
        "clip.vision.embedding_length": tiny.CLIP_DIM,
        "clip.vision.feed_forward_length": tiny.CLIP_MLP,
        "clip.vision.attention.head_count": tiny.CLIP_HEADS,
        "clip.vision.block_count": tiny.CLIP_BLOCKS - 1,  # LLaVA does not read the last one
        "clip.vision.feature_layer": [tiny.CLIP_BLOCKS - 1],
        "clip.vision.projection_dim": 64,
        "clip.vision.image_mean": pytest.approx(tiny.MEAN),
        "clip.vision.image_std": pytest.approx(tiny.STD),
    }
    assert {key: keys[key] for key in expected} == expected
    assert "clip.vision.image_grid_pinpoints" not in keys


def test_tensors_are_those_of_the_source_with_q_and_k_in_pairs(written: Path) -> None:
    source = tiny.llama_tensors(tiny.llava_config(), 1, inv_freq=False)
    file, layer = File(written / MODEL), "model.layers.1."
    assert len(file.tensors) == 2 * 9 + 3
    for name, ours in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj")):
        expected = tiny.interleaved(source[f"{layer}{ours}.weight"], 16)
        assert torch.equal(file.tensors[f"blk.1.{name}.weight"], expected.float())
    for name, ours in (
        ("attn_v", "self_attn.v_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("ffn_norm", "post_attention_layernorm"),
    ):
        assert torch.equal(file.tensors[f"blk.1.{name}.weight"], source[f"{layer}{ours}.weight"].float())
    assert torch.equal(file.tensors["output.weight"], source["lm_head.weight"].float())
    assert {kind for name, kind in file.types.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in file.types.items() if "norm" not in name} == {"F16"}


def test_tower_and_projector_are_those_of_the_source(written: Path) -> None:
    clip, file = tiny.clip_tensors(2, prefix=""), File(written / MMPROJ)
    projector = tiny.projector_tensors(tiny.llava_config(), 1)
    for name, expected in (
        ("v.class_embd", clip["embeddings.class_embedding"]),
        ("v.patch_embd.weight", clip["embeddings.patch_embedding.weight"]),
        ("v.position_embd.weight", clip["embeddings.position_embedding.weight"]),
        ("v.pre_ln.bias", clip["pre_layrnorm.bias"]),
        ("v.blk.1.attn_k.weight", clip["encoder.layers.1.self_attn.k_proj.weight"]),  # CLIP has no rotary embedding
        ("v.blk.0.attn_v.bias", clip["encoder.layers.0.self_attn.v_proj.bias"]),
        ("v.blk.1.ln2.weight", clip["encoder.layers.1.layer_norm2.weight"]),
        ("v.blk.1.ffn_up.weight", clip["encoder.layers.1.mlp.fc1.weight"]),
        ("v.blk.1.ffn_down.bias", clip["encoder.layers.1.mlp.fc2.bias"]),
        ("mm.0.weight", projector["model.mm_projector.0.weight"]),
        ("mm.2.bias", projector["model.mm_projector.2.bias"]),
    ):
        assert torch.equal(file.tensors[name], expected.float()), name
    assert not any(name.startswith("v.blk.2.") or "post_ln" in name for name in file.tensors)


def test_the_report_lists_checks_and_caveats(written: Path) -> None:
    text = (written / "conversion.md").read_text()
    for line in (
        "`blk.N.attn_q.weight`",
        "every tensor has the same bits",
        "Logits of both",
        "Rounded from float32 to float16: ",
        "25814",
    ):
        assert line in text, line


def test_the_vocabulary_has_pieces_scores_types_and_ids(tmp_path: Path) -> None:
    model = tiny.write_llava(
        tmp_path / "m", clip=tiny.write_clip(tmp_path / "clip"), added=("<one>", "<two>"), vocab_size=tiny.PIECES + 6
    )
    config = {"added_tokens_decoder": {str(tiny.PIECES): {"content": "<one>", "special": True}}}
    tiny.edit_json(model / "tokenizer_config.json", **config)
    convert(model, tmp_path / "out", LoadOptions(vision=False), to="gguf")
    keys = File(tmp_path / "out" / MODEL).keys
    pieces = SentencePieceProcessor(model_proto=tiny.sentencepiece_model())
    tokens, scores, types = (keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    n = tiny.PIECES
    assert tokens[:n] == [pieces.id_to_piece(i) for i in range(n)]
    assert scores[:n] == pytest.approx([pieces.get_score(i) for i in range(n)])
    assert tokens[n:] == ["<one>", "<two>", *(f"[PAD{n + i}]" for i in range(2, 6))]
    assert types[:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    assert types[n:] == [3, 4, 5, 5, 5, 5]  # special, added, rows without a token
    ids = {name: keys.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id", "unknown_token_id")}
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.add_bos_token"]) == ("llama", True)
    assert keys["tokenizer.ggml.padding_token_id"] == 0


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": 2, "rope_theta": 1e6},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"tie_word_embeddings": True},
        {"torch_dtype": "bfloat16"},
        {"torch_dtype": "float32"},
    ],
)
def test_what_was_written_reads_back_as_the_same_model(tmp_path: Path, config: dict[str, Any]) -> None:
    model = tiny.write_llama(tmp_path / "m", **config)
    convert(model, tmp_path / "out", to="gguf", verify=True, check=True)
    ours = open_checkpoint(model)
    again = read_gguf(tmp_path / "out", ours)
    sizes = again.config.decoder
    assert sizes.eps == pytest.approx(ours.config.decoder.eps)
    assert {k: v for k, v in vars(sizes).items() if k != "eps"} == {
        k: v for k, v in vars(ours.config.decoder).items() if k != "eps"
    }
    wide = config.get("torch_dtype") == "bfloat16"
    assert [file.name for file in (tmp_path / "out").glob("*.gguf")] == ["model-bf16.gguf" if wide else MODEL]


def test_anyres_is_recorded_with_its_newline(tmp_path: Path, clip: Path) -> None:
    model = tiny.write_llava(tmp_path / "m", clip=clip, tower_seed=5, **tiny.ANYRES)
    convert(model, tmp_path / "out", to="gguf", verify=True, check=True)
    file = File(tmp_path / "out" / "mmproj-bf16.gguf")
    assert file.keys["clip.vision.image_grid_pinpoints"] == [
        side for size in tiny.ANYRES["image_grid_pinpoints"] for side in size
    ]
    assert file.keys["clip.vision.mm_patch_merge_type"] == "spatial_unpad"
    assert (file.types["v.image_newline"], file.types["v.patch_embd.weight"]) == ("F32", "F32")
    assert file.types["v.blk.0.ffn_up.weight"] == "BF16"


def test_a_lora_on_a_base_in_metas_format_goes_straight_into_a_gguf(tmp_path: Path, clip: Path) -> None:
    lora, base = tiny.write_lora(tmp_path / "lora", clip=clip), tiny.write_meta(tmp_path / "bases" / "7B")
    convert(lora, tmp_path / "out", LoadOptions(base=base), to="gguf", verify=True)
    assert (tmp_path / "out" / MODEL).is_file()


def test_mpt_is_written_as_a_language_model_only(tmp_path: Path, clip: Path) -> None:
    model = tiny.write_mpt(tmp_path / "m", clip=clip)
    convert(model, tmp_path / "out", LoadOptions(vision=False), to="gguf", verify=True, check=True)
    keys = File(tmp_path / "out" / "model-bf16.gguf").keys
    assert keys["general.architecture"] == "mpt"
    assert keys["mpt.attention.max_alibi_bias"] == 8.0
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "mpt")
    assert keys["tokenizer.ggml.tokens"][-5:] == list(tiny.MPT_ADDED)
    assert all(pair.count(" ") == 1 for pair in keys["tokenizer.ggml.merges"])


def test_small_pieces_make_the_same_file(checkpoint: Path, written: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("llava.formats.gguf.CHUNK_BYTES", 1000)
    convert(checkpoint, tmp_path / "out", to="gguf", check=False)
    for name in (MODEL, MMPROJ):
        assert (tmp_path / "out" / name).read_bytes() == (written / name).read_bytes()


def test_a_changed_byte_is_noticed(checkpoint: Path, written: Path, tmp_path: Path) -> None:
    data = bytearray((written / MODEL).read_bytes())
    data[-100] ^= 1
    (tmp_path / MODEL).write_bytes(data)
    (tmp_path / MMPROJ).symlink_to(written / MMPROJ)
    held = Gguf().prepare(open_checkpoint(checkpoint))
    with pytest.raises(CheckpointError, match="differs from"):
        check_equal(held, read_gguf(tmp_path, held))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"mm_projector_type": "linear"}, "linear layer as its projector"),
        ({"mm_projector_type": "mlp3x_gelu"}, "3 layers as its projector"),
        ({"mm_vision_select_feature": "cls_patch"}, "class token in its image features"),
        ({"mm_use_im_start_end": True}, "<im_start>"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_what_llama_cpp_has_no_form_for_is_refused_in_one_line(
    tmp_path: Path, clip: Path, config: dict[str, Any], why: str
) -> None:
    model = tiny.write_llava(tmp_path / "m", clip=clip, added=("<im_start>", "<im_end>"), **config)
    with pytest.raises(CheckpointError) as error:
        convert(model, tmp_path / "out", to="gguf")
    assert why in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    if "rope_scaling" not in config:
        assert "--no-vision" in str(error.value)
        convert(model, tmp_path / "out", LoadOptions(vision=False), to="gguf", verify=True)


def test_a_tokenizer_that_may_be_read_in_another_way_is_refused(tmp_path: Path) -> None:
    model = tiny.write_llama(tmp_path / "m")
    (model / "tokenizer.model").unlink()
    tiny.write_neox_tokenizer(model)
    tiny.edit_json(model / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(CheckpointError, match="put the base model's tokenizer"):
        convert(model, tmp_path / "out", to="gguf")


@pytest.mark.parametrize(("value", "why"), [(float("nan"), "NaN or Inf"), (1e6, "outside the float16 range")])
def test_values_that_cannot_be_written_leave_no_files(tmp_path: Path, value: float, why: str) -> None:
    model = tiny.write_llama(tmp_path / "m", torch_dtype="float32")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=why):
        convert(model, tmp_path / "out", to="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_without_the_package_one_line_says_how_to_get_it(checkpoint: Path, tmp_path: Path) -> None:
    lines = ["import sys", "sys.modules['gguf'] = None", "from llava.cli import main", "raise SystemExit(main())"]
    command = [
        sys.executable,
        "-c",
        "; ".join(lines),
        "convert",
        str(checkpoint),
        str(tmp_path / "out"),
        "--to",
        "gguf",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install 'llava-native[gguf]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_command_line_writes_both_files(checkpoint: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "llava.cli",
        "convert",
        str(checkpoint),
        str(tmp_path / "out"),
        "--to",
        "gguf",
        "--verify",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "as gguf" in done.stdout
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["conversion.md", MMPROJ, MODEL]


def test_an_end_id_that_no_row_has_is_left_out(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "llama")
    tiny.write_json(folder / "generation_config.json", {"eos_token_id": [2, -1, 70_000, 7]})
    convert(folder, tmp_path / "out", to="gguf")
    assert File(tmp_path / "out" / MODEL).keys["tokenizer.ggml.eot_token_id"] == 7


def test_a_tokenizer_whose_pieces_are_no_utf8_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "llama")
    file = folder / "tokenizer.model"
    piece = SentencePieceProcessor(model_proto=file.read_bytes()).id_to_piece(300).encode()
    spoilt = b"\xfe" * len(piece)
    file.write_bytes(file.read_bytes().replace(bytes([len(piece)]) + piece, bytes([len(piece)]) + spoilt, 1))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: piece 300 is not UTF-8"):
        convert(folder, tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_a_gguf_is_no_input_and_the_line_says_so(written: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"written but not read; use the checkpoint that it was converted from"):
        convert(written / MODEL, tmp_path / "out")
