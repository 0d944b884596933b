"""transformers as a second oracle: it saves a random Llama, CLIP or LLaVA, and we load it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import llava
from llava.config import IMAGE
from tests import tiny
from tests.checkpoints import refused

transformers = pytest.importorskip("transformers")

PROMPT = "Once upon a time there was a painter who would only ever paint the sea. "
LLAMAS: dict[str, dict[str, Any]] = {
    "as many key-value heads as heads": {},
    "grouped-query": {"num_key_value_heads": 2},
    "one key-value head": {"num_key_value_heads": 1},
    "another theta": {"rope_theta": 1e6},
    "linear rope scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "grouped-query, theta and linear scaling": {
        "num_key_value_heads": 2,
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
}


def random_llama(folder: Path, **changes: Any) -> Any:
    """A Llama saved by transformers, with weights large enough for attention to matter, and our tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 4}
    changes = {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, **changes}
    scaling, theta = changes.pop("rope_scaling", None), changes.pop("rope_theta", 1e4)
    rope = {"rope_theta": theta, "rope_type": "default", **(scaling or {})}  # as transformers 5 stores both
    if int(transformers.__version__.split(".")[0]) >= 5:
        changes["rope_parameters"] = rope
    else:
        changes |= {"rope_theta": theta, "rope_scaling": scaling}
    config = transformers.LlamaConfig(vocab_size=tiny.PIECES, **sizes, **changes)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else torch.nn.init.normal_(parameter, 1, 0.1)
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return model


@pytest.mark.parametrize("case", LLAMAS)
def test_logits_of_a_llama_saved_by_transformers_are_the_same(tmp_path: Path, case: str) -> None:
    model = random_llama(tmp_path, **LLAMAS[case])
    ours = llava.load(tmp_path, dtype="float32", device="cpu")
    ids = ours.prepare(PROMPT * 4).ids
    assert len(ids) > 100
    with torch.no_grad():
        wanted = model(torch.tensor([list(ids)])).logits[0]
    torch.testing.assert_close(ours.logits(PROMPT * 4), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}])
def test_rope_scaling_is_read_from_old_configs(tmp_path: Path, scaling: dict[str, Any]) -> None:
    folder = tiny.write_llama(tmp_path / "llama", rope_scaling=scaling, rope_theta=20000.0)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = llava.load(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        wanted = model(torch.tensor([list(ours.prepare(PROMPT).ids)])).logits[0]
    torch.testing.assert_close(ours.logits(PROMPT), wanted, rtol=0, atol=1e-4)


def test_greedy_answers_of_a_llama_are_the_same(tmp_path: Path) -> None:
    model = random_llama(tmp_path, num_key_value_heads=2)
    ours = llava.load(tmp_path, dtype="float32", device="cpu")
    ids = torch.tensor([list(ours.prepare(PROMPT).ids)])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert ours.generate(PROMPT, max_new_tokens=40).token_ids == wanted[0, ids.shape[1] :].tolist()


def test_hidden_states_are_numbered_as_in_transformers(tmp_path: Path) -> None:
    model = random_llama(tmp_path)
    ours = llava.load(tmp_path, dtype="float32", device="cpu")
    with torch.no_grad():
        wanted = model(torch.tensor([list(ours.prepare(PROMPT).ids)]), output_hidden_states=True).hidden_states
    for layer, state in ours.hidden_states(PROMPT, [0, 1, 2, 3, -1]).items():
        torch.testing.assert_close(state, wanted[layer][0], rtol=0, atol=1e-4)


def test_a_llava_without_vision_is_the_llama_that_transformers_loads(tmp_path: Path, clip: Path) -> None:
    """transformers loads the plain Llama folder; we load the same weights from the LLaVA folder."""
    plain = tiny.write_llama(tmp_path / "llama")
    model = transformers.LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    ours = llava.load(tiny.write_llava(tmp_path / "llava", clip=clip), vision=False, dtype="float32", device="cpu")
    with torch.no_grad():
        wanted = model(torch.tensor([list(ours.prepare(PROMPT).ids)])).logits[0]
    torch.testing.assert_close(ours.logits(PROMPT), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("image_size", [28, 56, 84])
@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
def test_features_of_a_clip_saved_by_transformers_are_the_same(tmp_path: Path, layer: int, image_size: int) -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = transformers.CLIPVisionConfig(image_size=image_size, patch_size=14, hidden_act="quick_gelu", **sizes)
    tower = transformers.CLIPVisionModel(config).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    tower.save_pretrained(tmp_path / "clip")
    tiny.write_clip(tmp_path / "other", image_size=image_size)
    (tmp_path / "other" / "preprocessor_config.json").rename(tmp_path / "clip" / "preprocessor_config.json")
    changes = {"mm_vision_select_layer": layer, "mm_vision_select_feature": "cls_patch"}
    folder = tiny.write_llava(tmp_path / "llava", clip=tmp_path / "clip", **changes)
    ours = llava.load(folder, dtype="float32", device="cpu")
    pixels = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        wanted = tower(pixels, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(ours.vision_features(pixels), wanted, rtol=0, atol=5e-5)


@pytest.mark.parametrize("size", [(90, 60), (61, 97), (56, 56), (300, 20)])
def test_cropped_pixels_are_those_of_transformers_image_processor(
    clip: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    processor_class = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = processor_class.from_pretrained(clip)
    noise = torch.randint(256, (7, 9, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy()).resize(size, Image.Resampling.BICUBIC)
    folder = tiny.write_llava(tmp_path / "square", clip=clip, image_aspect_ratio="square")
    ours = llava.load(folder).prepare("<image>", images=[picture]).pixels
    wanted = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


LLAVAS = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
PICTURE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")


def random_llava(folder: Path, kind: str, **saving: Any) -> Any:
    """A LLaVA that transformers built from a config and saved, with our tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = transformers.LlamaConfig(vocab_size=576, **sizes)
    vision = transformers.CLIPVisionConfig(image_size=tiny.IMAGE_SIZE, patch_size=tiny.PATCH, **sizes)
    more = {"image_grid_pinpoints": tiny.ANYRES["image_grid_pinpoints"]} if kind == "llava_next" else {}
    made = {"llava": transformers.LlavaConfig, "llava_next": transformers.LlavaNextConfig}[kind](
        text_config=text, vision_config=vision, image_token_index=tiny.PIECES, vision_feature_layer=-1, **more
    )
    model = getattr(transformers, LLAVAS[kind])(made).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else torch.nn.init.normal_(parameter, 1, 0.1)
    model.save_pretrained(folder, **saving)
    tiny.write_tokenizer(folder, added=("<image>", "<pad>"))
    return model


def renamed(folder: Path, old: str, new: str) -> int:
    """Changes a prefix of tensor names in a folder with one file; returns the number of changed names."""
    tensors = load_file(folder / "model.safetensors")
    changed = {re.sub(f"^{re.escape(old)}", new, name): tensor for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return len(set(tensors) - set(changed))


GENERATIONS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "as saved": ({}, []),
    "as saved before 5.0": ({}, [("vision_tower.", "vision_tower.vision_model.")]),
    "modules since 4.52": (
        {"save_original_format": False},
        [("model.vision_tower.", "model.vision_tower.vision_model.")],
    ),
    "modules since 5.0": ({"save_original_format": False}, []),
}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("kind", LLAVAS)
def test_a_freshly_built_llava_has_the_same_logits_under_the_names_of_any_version(
    tmp_path: Path, kind: str, generation: str
) -> None:
    saving, changes = GENERATIONS[generation]
    model = random_llava(tmp_path, kind, **saving)
    for old, new in changes:
        assert renamed(tmp_path, old, new)
    ours = llava.load(tmp_path, dtype="float32", device="cpu")
    prompt = "USER: <image>\nWhat is in the picture? ASSISTANT:"
    input = ours.prepare(prompt, images=[PICTURE])
    ids = torch.tensor([[tiny.PIECES if id == IMAGE else id for id in input.ids.tolist()]])
    assert input.pixels is not None
    pixels = {"pixel_values": input.pixels}
    if kind == "llava_next":
        pixels = {"pixel_values": input.pixels[None], "image_sizes": torch.tensor([[64, 96]])}
    with torch.no_grad():
        wanted = model(input_ids=ids, **pixels).logits[0]
    torch.testing.assert_close(ours.logits(prompt, images=[PICTURE]), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("part", ["language_model.model.", "vision_tower.", "multi_modal_projector.", "image_newline"])
def test_a_folder_with_files_of_two_layouts_is_refused(tmp_path: Path, part: str) -> None:
    random_llava(tmp_path, "llava_next")
    other = {"language_model.model.": "model.language_model."}.get(part, f"model.{part}")
    tensors = load_file(tmp_path / "model.safetensors")
    twice = {other + name.removeprefix(part): t.clone() for name, t in tensors.items() if name.startswith(part)}
    assert twice
    save_file(tensors | twice, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "names of the same tensor in two layouts" in refused(tmp_path)


def test_one_matrix_in_parts_of_two_layouts_is_refused(tmp_path: Path) -> None:
    random_llava(tmp_path, "llava")
    q = "layers.0.self_attn.q_proj"
    assert renamed(tmp_path, f"language_model.model.{q}", f"model.language_model.{q}") == 1
    assert "two layouts" in refused(tmp_path)
