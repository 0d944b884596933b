"""Keys of config files: those that change the computation are used or refused, and unknown ones are reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.config import LoadOptions
from llava.convert.convert import convert
from tests import tiny
from tests.checkpoints import opened, refused
from tests.command import run_well

WINDOW = 6
TEXT = "Once upon a time there was a painter who would only ever paint the sea. "


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.write_llama(tmp_path / "llama")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "qwen2"),  # names its tensors like Llama
        ("model_type", "gemma"),
        ("model_type", "granite"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("partial_rotary_factor", 0.5),
        ("logits_scaling", 8.0),
        ("embedding_multiplier", 12.0),
        ("attn_logit_softcapping", 50.0),
        ("num_local_experts", 8),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "default", "partial_rotary_factor": 0.25}),
        ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0, "rope_theta_": 1}),
    ],
)
def test_a_key_that_changes_the_computation_is_refused_by_name(
    llama: Path, key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.edit_json(llama / "config.json", **{key: value}, **({"rope_theta": 1e4} if key == "rope_parameters" else {}))
    text = refused(llama)
    assert any(word in text for word in (key, "rope scaling", "rope_theta"))
    assert "config.json" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": False, "mlp_bias": False, "logits_scaling": 1.0, "attn_logit_softcapping": None},
        {"layer_types": ["full_attention"] * 2, "num_local_experts": 1, "partial_rotary_factor": 1.0},
        {"mm_tunable_parts": "mm_language_model", "temperature": 0.7, "_attn_implementation_autoset": True},
        {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"something_new": None, "another": False, "and_more": []},
    ],
)
def test_neutral_values_and_keys_without_effect_are_not_mentioned(
    llama: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tiny.edit_json(llama / "config.json", **changes)
    opened(llama)
    assert not caplog.records


def test_unknown_keys_are_named_in_one_warning(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.edit_json(llama / "config.json", residual_gate=0.5, twist={"by": 3})
    opened(llama)
    (record,) = caplog.records
    assert "residual_gate = 0.5, twist = {'by': 3}" in record.getMessage()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_resampler_type", "perceiver"),
        ("mm_projector_type", "cabstractor"),
        ("sep_image_conv_front", True),
        ("s2", True),
        ("image_aspect_ratio", "highres"),
    ],
)
def test_a_multimodal_key_that_is_not_implemented_is_refused(tmp_path: Path, clip: Path, key: str, value: Any) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=clip)
    tiny.edit_json(folder / "config.json", **{key: value})
    assert key in refused(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("no_bias", False),
        ("logit_scale", "inv_sqrt_d_model"),
        ("attn_config.alibi", False),
        ("attn_config.qk_ln", True),
        ("attn_config.rope", True),
        ("attn_config.sliding_window_size", 1024),
        ("attn_config.attn_uses_sequence_id", True),
        ("norm_type", "rmsnorm"),
    ],
)
def test_an_mpt_key_that_is_not_implemented_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    folder = tiny.write_mpt(tmp_path / "mpt")
    config = json.loads((folder / "config.json").read_text())
    *path, last = key.split(".")
    (config[path[0]] if path else config)[last] = value
    tiny.write_json(folder / "config.json", config)
    assert last in refused(folder)


def test_the_scaled_rope_of_llama_3_1_is_refused_in_metas_format(tmp_path: Path) -> None:
    folder = tiny.write_meta(tmp_path / "7B", params={"use_scaled_rope": True})
    assert "use_scaled_rope" in refused(folder)


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
@pytest.mark.parametrize("model_type", ["qwen2", "siglip_vision_model", "pixtral"])
def test_another_model_type_inside_llava_hf_is_refused(
    tmp_path: Path, clip: Path, section: str, model_type: str
) -> None:
    source = tiny.write_llava(tmp_path / "source", clip=clip)
    convert(source, tmp_path / "hf", to="llava-hf", check=False)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config[section]["model_type"] = model_type
    tiny.write_json(tmp_path / "hf" / "config.json", config)
    assert model_type in refused(tmp_path / "hf")


@pytest.mark.parametrize(
    ("key", "value"),
    [("multimodal_projector_bias", False), ("model_type", "vipllava"), ("projector_hidden_act", "relu")],
)
def test_a_top_level_key_of_llava_hf_that_is_not_implemented_is_refused(
    tmp_path: Path, clip: Path, key: str, value: Any
) -> None:
    source = tiny.write_llava(tmp_path / "source", clip=clip)
    convert(source, tmp_path / "hf", to="llava-hf", check=False)
    tiny.edit_json(tmp_path / "hf" / "config.json", **{key: value})
    assert key in refused(tmp_path / "hf")


@pytest.mark.parametrize(
    ("key", "value"), [("resample", 2), ("do_normalize", False), ("image_processor_type", "SiglipImageProcessor")]
)
def test_another_image_processor_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    clip = tiny.write_clip(tmp_path / "clip")
    tiny.edit_json(clip / "preprocessor_config.json", **{key: value})
    assert key in refused(tiny.write_llava(tmp_path / "llava", clip=clip))


def test_a_tower_that_is_not_clip_is_named_and_no_option_is_advised(tmp_path: Path) -> None:
    clip = tiny.write_clip(tmp_path / "tower")
    config = json.loads((clip / "config.json").read_text())
    tiny.write_json(clip / "config.json", {**config, "model_type": "siglip"})
    assert "'siglip'; this version supports only CLIP" in refused(tiny.write_llava(tmp_path / "a", clip=clip))
    folder = tiny.write_llava(tmp_path / "b", mm_vision_tower="google/siglip-so400m-patch14-384")
    assert "is a SigLIP model" in refused(folder)


# ---------------------------------------------------------------------------------------------------- sliding windows


def mistral(folder: Path, **config: Any) -> Path:
    values = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
    return tiny.write_llama(folder, **{**values, "sliding_window": WINDOW, **config})


def logits(folder: Path, text: str = TEXT) -> torch.Tensor:
    return llava.load(folder, dtype="float32", device="cpu").logits(text)


@pytest.mark.parametrize("stated", [WINDOW, None, tiny.ABSENT])
def test_a_sliding_window_gives_the_logits_of_transformers(tmp_path: Path, stated: int | None) -> None:
    transformers = pytest.importorskip("transformers")
    folder = mistral(tmp_path / "mistral", sliding_window=stated)
    theirs = transformers.MistralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    vlm = llava.load(folder, dtype="float32", device="cpu")
    ids = vlm.preprocessor.tokenizer.encode(TEXT)
    assert len(ids) > 4 * WINDOW
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
        ours = vlm.model.decoder.logits(vlm.model.decoder(vlm.model.embed(torch.tensor(ids))[None]))[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert opened(folder).config.decoder.sliding_window == (4096 if stated is tiny.ABSENT else stated)


def test_replies_longer_than_the_window_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = mistral(tmp_path / "mistral")
    theirs = transformers.MistralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    vlm = llava.load(folder, dtype="float32", device="cpu")
    prompts = [TEXT, "Once upon", TEXT * 2]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([vlm.preprocessor.tokenizer.encode(prompt)])
        for _ in range(12):  # without a cache
            with torch.inference_mode():
                ids = torch.cat([ids, theirs(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        expected.append(ids[0, -12:].tolist())
    assert [vlm.generate(prompt, max_new_tokens=12).token_ids for prompt in prompts] == expected
    assert [reply.token_ids for reply in vlm.generate_batch(prompts, max_new_tokens=12)] == expected


@pytest.mark.parametrize("to", ["llama", "native"])
def test_a_sliding_window_survives_a_conversion(tmp_path: Path, to: str) -> None:
    source = mistral(tmp_path / "mistral")
    convert(source, tmp_path / "out", to=to)
    assert opened(tmp_path / "out").config.decoder.sliding_window == WINDOW
    if to == "llama":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["model_type"], config["sliding_window"]) == ("mistral", WINDOW)


def test_a_program_without_windows_gets_a_context_of_one_window(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gguf = pytest.importorskip("gguf")
    convert(mistral(tmp_path / "mistral"), tmp_path / "out", to="gguf", check=False)
    assert f"correct up to {WINDOW} tokens" in caplog.text
    reader = gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    assert reader.get_field("llama.context_length").contents() == WINDOW


def test_a_window_is_ignored_with_a_warning_where_transformers_ignores_it(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.edit_json(llama / "config.json", sliding_window=WINDOW)
    assert opened(llama).config.decoder.sliding_window is None
    assert "sliding_window" in caplog.text


# ------------------------------------------------------------------------------------------ config against the tensors


@pytest.mark.parametrize("stated", ["linear", "identity", "mlp3x_gelu", None, tiny.ABSENT])
def test_the_tensors_decide_the_depth_of_the_projector(
    tmp_path: Path, clip: Path, stated: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=clip)
    tiny.edit_json(folder / "config.json", mm_projector_type=stated)
    config = opened(folder).config
    assert config.projector
    assert config.projector.depth == 2
    assert "mm_projector_type" in caplog.text
    assert "mlp2x_gelu, which is used" in caplog.text


def test_the_tensors_decide_the_width_of_the_projector(
    tmp_path: Path, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=clip)
    tiny.edit_json(folder / "config.json", mm_hidden_size=1024)
    opened(folder)
    assert "mm_hidden_size is 1024" in caplog.text


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def test_a_head_that_differs_from_the_table_is_used_although_the_config_ties_them(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    untied = logits(llama)
    tiny.edit_json(llama / "config.json", tie_word_embeddings=True)
    assert torch.equal(logits(llama), untied)
    assert "lm_head.weight: differs from the embedding table" in caplog.text
    caplog.clear()
    changed(llama, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert opened(llama).config.decoder.tied
    assert not caplog.records


def test_a_head_missing_because_the_config_does_not_tie_it_is_reported_with_the_key(llama: Path) -> None:
    changed(llama, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight), which config.json requires (tie_word_embeddings = False)" in refused(llama)
    tiny.edit_json(llama / "config.json", tie_word_embeddings=True)  # what the message advises
    opened(llama)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 1, "num_hidden_layers = 1"),
        ("num_hidden_layers", 3, "num_hidden_layers = 3"),
        ("intermediate_size", 100, "intermediate_size = 100"),
        ("num_key_value_heads", 2, "num_key_value_heads = 2"),
    ],
)
def test_sizes_that_contradict_the_tensors_are_reported_with_key_and_tensor(
    llama: Path, key: str, value: int, message: str
) -> None:
    tiny.edit_json(llama / "config.json", **{key: value})
    text = refused(llama)
    assert message in text
    assert "model.layers." in text


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight", "model.norm.bias", "extra"],
)
def test_a_tensor_outside_the_format_is_refused_with_force_too_and_can_be_left_out_by_name(
    llama: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = logits(llama)
    changed(llama, lambda tensors: tensors.update({name: torch.ones(64)}))
    text = refused(llama)
    assert name in text
    assert "--force" not in text
    assert name in refused(llama, force=True)
    convert(llama, tmp_path / "out", LoadOptions(ignore_tensors=(name,)), to="llama", check=False)
    assert f"1 tensor ignored as requested: {name}" in caplog.text
    assert torch.equal(logits(tmp_path / "out"), before)


def test_the_command_that_leaves_a_tensor_out_works_as_printed(llama: Path, tmp_path: Path) -> None:
    changed(llama, lambda tensors: tensors.update({"model.norm.bias": torch.ones(64)}))
    command = refused(llama).rsplit("llava convert ", 1)[1].replace(" OUT", f" {tmp_path / 'out'}")
    run_well("convert", *command.split())
    opened(tmp_path / "out")


def test_a_pattern_that_matches_no_tensor_is_an_error(llama: Path) -> None:
    assert "no tensor that matches 'model.x*'" in refused(llama, ignore_tensors=("model.x*",))


def test_a_newline_vector_is_an_error_for_anyres_images_without_it_and_a_warning_otherwise(
    tmp_path: Path, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=clip, **tiny.ANYRES)
    tiny.edit_json(folder / "config.json", mm_patch_merge_type="flat")
    assert "mm_patch_merge_type = 'flat'" in refused(folder)
    tiny.edit_json(folder / "config.json", image_aspect_ratio="pad")
    opened(folder)
    assert "image_newline: is not used, because image_aspect_ratio is pad" in caplog.text


def test_native_projector_layers_that_the_config_does_not_mention_are_refused(tmp_path: Path, clip: Path) -> None:
    convert(tiny.write_llava(tmp_path / "source", clip=clip), tmp_path / "native", check=False)
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    config["projector"]["depth"] = 1
    tiny.write_json(tmp_path / "native" / "config.json", config)
    assert "projector.2." in refused(tmp_path / "native")


# ----------------------------------------------------------------------------------------------------- image processors


def test_an_image_processor_inside_processor_config_is_used(tmp_path: Path, clip: Path) -> None:
    convert(tiny.write_llava(tmp_path / "source", clip=clip), tmp_path / "hf", to="llava-hf", check=False)
    values = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text()) | {"image_mean": [0.5, 0.4, 0.3]}
    (tmp_path / "hf" / "preprocessor_config.json").unlink()
    tiny.edit_json(tmp_path / "hf" / "processor_config.json", image_processor=values)
    image = opened(tmp_path / "hf").config.image
    assert image
    assert image.mean == (0.5, 0.4, 0.3)


# ----------------------------------------------------------------------------------------------------- left-over files


def test_a_copy_of_the_projector_beside_the_model_is_not_mentioned_and_another_projector_is(
    tmp_path: Path, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=clip)
    for seed, n_warnings in ((1, 0), (5, 1)):
        projector = tiny.write_projector(tmp_path / f"p{seed}", clip=clip, seed=seed)
        shutil.copy(projector / "mm_projector.bin", folder)
        opened(folder)
        assert len(caplog.records) == n_warnings
    assert "mm_projector.bin: is not used; it differs" in caplog.text


def test_fine_tuned_weights_of_a_lora_beside_a_whole_model_are_mentioned(
    tmp_path: Path, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=clip)
    shutil.copy(tiny.write_lora(tmp_path / "lora", clip=clip) / "non_lora_trainables.bin", folder)
    opened(folder)
    assert "non_lora_trainables.bin: is not used" in caplog.text


# ------------------------------------------------------------------------------------------------- legitimate folders


def test_keys_of_published_llava_hf_configs_are_not_mentioned(
    tmp_path: Path, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(tiny.write_llava(tmp_path / "source", clip=clip), tmp_path / "hf", to="llava-hf", check=False)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["vision_config"]["vocab_size"] = 32000
    tiny.write_json(tmp_path / "hf" / "config.json", {**config, "hidden_size": 64})
    caplog.clear()
    opened(tmp_path / "hf")
    assert not caplog.records


def test_the_keys_of_a_newer_mpt_are_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.write_mpt(tmp_path / "mpt")
    config = json.loads((folder / "config.json").read_text())
    config["attn_config"] |= {"rope": False, "rope_theta": 10000, "rope_impl": "dail", "rope_hf_config": {"factor": 1}}
    tiny.write_json(folder / "config.json", config | {"ffn_config": {"ffn_type": "mptmlp"}})
    opened(folder)
    assert not caplog.records


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"shortest_edge": 64}},
        {"size": {"height": 56, "width": 56}},
        {"size": {"shortest_edge": 56, "longest_edge": 100}},
        {"crop_size": {"height": 56, "width": 28}},
    ],
)
def test_a_resize_that_clip_does_not_do_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    clip = tiny.write_clip(tmp_path / "clip", layout="safetensors")
    tiny.edit_json(clip / "preprocessor_config.json", **changes)
    assert "a resize of the shortest edge" in refused(tiny.write_llava(tmp_path / "llava", clip=clip))


def test_a_trained_tower_that_is_absent_is_mentioned(
    tmp_path: Path, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(tiny.write_llava(tmp_path / "llava", clip=clip, unfreeze_mm_vision_tower=True))
    assert "states that the vision tower was trained" in caplog.text
    caplog.clear()
    opened(tiny.write_llava(tmp_path / "whole", clip=clip, tower_seed=3, unfreeze_mm_vision_tower=True))
    assert not caplog.records


def test_a_chat_template_with_other_role_marks_is_mentioned(
    tmp_path: Path, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=clip)
    tiny.edit_json(folder / "tokenizer_config.json", chat_template="{{ '<|start_header_id|>' + messages[0].role }}")
    llava.load(folder, device="cpu")
    assert "llava_v1 (no other rule applies) differ in <|start_header_id|>" in caplog.text
    caplog.clear()
    tiny.edit_json(folder / "config.json", llava_template="llava_v1")
    llava.load(folder, device="cpu")
    assert not caplog.records


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_the_prefix_of_a_wrapper_is_named(llama: Path, prefix: str) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    assert f"all tensor names start with {prefix!r}" in refused(changed(llama, wrap))


def test_a_folder_above_the_checkpoint_names_it(llama: Path) -> None:
    assert f"such as {llama}" in refused(llama.parent)
