"""Adapters that PEFT makes on a transformers LLaVA give the same logits here, on the same weights in any layout."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import llava
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.convert.merge import MergeOptions, merge_lora
from llava.train.start import start
from tests import tiny
from tests.checkpoints import opened, refused
from tests.training import Assets, build_assets, recipe

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

PICTURE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"
FLOAT32: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
KINDS = {"1.5": "LlavaForConditionalGeneration", "1.6": "LlavaNextForConditionalGeneration"}
FORMS: dict[str, dict[str, Any]] = {"1.5": {}, "1.6": tiny.ANYRES}
DECODER = ["q_proj", "v_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "decoder": {"target_modules": r".*language_model.*\.(q_proj|v_proj|down_proj)"},
    "everything": {"target_modules": "all-linear"},
    "projector": {"target_modules": ["linear_1", "linear_2"]},
    "tower": {"target_modules": r".*vision_tower.*\.(k_proj|fc1)"},
    "saved modules": {"target_modules": DECODER, "modules_to_save": ["multi_modal_projector", "lm_head"]},
    "saved rows": {"target_modules": DECODER, "modules_to_save": ["embed_tokens"]},
    "all biases": {"target_modules": [*DECODER, "linear_2"], "bias": "all"},
    "own biases": {"target_modules": [*DECODER, "linear_2"], "bias": "lora_only"},
    "one layer": {"target_modules": DECODER, "layers_to_transform": [1], "layers_pattern": "layers"},
    "patterns": {
        "target_modules": [*DECODER, "linear_1"],
        "rank_pattern": {"v_proj": 2, r"language_model.layers.1.mlp.down_proj": 3},
        "alpha_pattern": {"^model.language_model.layers.0.self_attn.q_proj": 7, "linear_1": 3},
    },
    "rslora": {"target_modules": DECODER, "use_rslora": True},
    "orthogonal": {"target_modules": DECODER, "init_lora_weights": "orthogonal"},
}


@pytest.fixture(scope="module")
def bases(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function that writes the same weights as folders llava, llava-hf and native."""
    out = tmp_path_factory.mktemp("bases")

    def write(form: str) -> Path:
        if not (out / form).is_dir():
            tiny.write_llava(out / form / "external", clip=clip, layout="safetensors", tower_seed=5, **FORMS[form])
            for to, mode in (("llava", None), ("llava-hf", "hf"), ("native", "hf")):
                options = LoadOptions(image_mode=mode)
                convert(out / form / "external", out / form / to, options, to=to, check=False)
        return out / form

    return write


@pytest.fixture
def assets(clip: Path, checkpoint: Path, tmp_path: Path) -> Assets:
    return build_assets(tmp_path / "assets", clip, checkpoint)


def make_adapter(base: Path, folder: Path, form: str = "1.5", **settings: Any) -> Tensor:
    """Saves an adapter with random weights made by PEFT, and returns the logits of the adapted model."""
    theirs = getattr(transformers, KINDS[form]).from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(theirs, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings})).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1 if "lora_" in name else 0.3)
    model.save_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(base)
    with torch.inference_mode():
        logits: Tensor = model(**processor(images=PICTURE, text=PROMPT, return_tensors="pt")).logits[0]
    return logits


def rename(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = {change(name): tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def of_transformers_before_4_52(name: str) -> str:
    """The name that PEFT gives the tensor with an older transformers."""
    name = name.replace("base_model.model.lm_head", "base_model.model.language_model.lm_head")
    name = name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
    name = re.sub(r"model\.model\.vision_tower\.(?!vision_model)", "model.vision_tower.vision_model.", name)
    return name.replace("base_model.model.model.multi_modal", "base_model.model.multi_modal")


@pytest.mark.parametrize("names", ["4.52", "older"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_an_adapter_of_llava_hf_gives_the_logits_of_peft(
    bases: Callable[[str], Path], tmp_path: Path, settings: str, names: str
) -> None:
    base = bases("1.5") / "llava-hf"
    expected = make_adapter(base, tmp_path / "lora", **SETTINGS[settings])
    if names == "older":
        rename(tmp_path / "lora", of_transformers_before_4_52)
        edit_patterns(tmp_path / "lora" / "adapter_config.json")
    merged, apart = (llava.load(tmp_path / "lora", base=base, merge=merge, **FLOAT32) for merge in (True, False))
    for vlm in (merged, apart):
        torch.testing.assert_close(vlm.logits(PROMPT, images=[PICTURE]), expected, rtol=0, atol=2e-4)


def edit_patterns(file: Path) -> None:
    text = file.read_text().replace("model.language_model.layers", "language_model.model.layers")
    file.write_text(text.replace('"language_model.layers', '"language_model.model.layers'))


@pytest.mark.parametrize("layout", ["llava", "llava-hf", "native"])
@pytest.mark.parametrize("form", KINDS)
def test_the_base_may_be_in_any_layout_of_the_same_weights(
    bases: Callable[[str], Path], tmp_path: Path, form: str, layout: str
) -> None:
    make_adapter(bases(form) / "llava-hf", tmp_path / "lora", form, **SETTINGS["everything"])
    reference = opened(tmp_path / "lora", base=bases(form) / "llava-hf")
    found = opened(tmp_path / "lora", base=bases(form) / layout)
    rows = found.config.decoder.vocab_size
    for name, tensor in reference.tensors.items():
        wanted = tensor.read()[:rows] if "embed" in name or "head" in name else tensor.read()
        assert torch.equal(found.tensors[name].read(), wanted), name
    alone = opened(bases(form) / layout).config
    assert (found.config.image, found.config.template) == (alone.image, alone.template)


@pytest.mark.parametrize("form", KINDS)
def test_llava_next_adapters_give_the_logits_of_peft(bases: Callable[[str], Path], tmp_path: Path, form: str) -> None:
    base = bases(form) / "llava-hf"
    expected = make_adapter(base, tmp_path / "lora", form, **SETTINGS["everything"])
    vlm = llava.load(tmp_path / "lora", base=base, **FLOAT32)
    torch.testing.assert_close(vlm.logits(PROMPT, images=[PICTURE]), expected, rtol=0, atol=2e-4)


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "use_dora": {"target_modules": DECODER, "use_dora": True},
    "lora_bias": {"target_modules": ["linear_1"], "lora_bias": True},
    "lora_embedding_A": {"target_modules": ["embed_tokens"]},
    "trainable_token_indices": {"target_modules": DECODER, "trainable_token_indices": {"embed_tokens": [5]}},
    "patch_embedding": {"target_modules": ["patch_embedding"]},
    "init_lora_weights": {"target_modules": DECODER, "init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("word", UNSUPPORTED)
def test_a_variant_that_is_not_computed_is_refused_by_name(
    bases: Callable[[str], Path], tmp_path: Path, word: str, force: bool
) -> None:
    """--force must not drop it."""
    base = bases("1.5") / "llava-hf"
    make_adapter(base, tmp_path / "lora", **UNSUPPORTED[word])
    assert word in refused(tmp_path / "lora", base=base, force=force)


def test_a_module_that_should_be_saved_but_is_not_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("1.5") / "llava-hf"
    make_adapter(base, tmp_path / "lora", **SETTINGS["saved modules"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "multi_modal_projector" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    assert "modules_to_save contains 'multi_modal_projector'" in refused(tmp_path / "lora", base=base)


def test_files_that_trainers_save_along_change_nothing(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """LLaMA-Factory saves the tokenizer and the processor beside the adapter; some trainers also config.json."""
    base = bases("1.5") / "llava-hf"
    expected = make_adapter(base, tmp_path / "lora", **SETTINGS["everything"])
    for pattern in ("*token*", "preprocessor_config.json", "processor_config.json", "config.json", "*.jinja"):
        for file in base.glob(pattern):
            shutil.copy(file, tmp_path / "lora")
    vlm = llava.load(tmp_path / "lora", base=base, **FLOAT32)
    torch.testing.assert_close(vlm.logits(PROMPT, images=[PICTURE]), expected, rtol=0, atol=2e-4)


def test_an_adapter_of_a_tower_outside_its_base_is_refused_with_advice_that_works(
    clip: Path, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    make_adapter(bases("1.5") / "llava-hf", tmp_path / "lora", **SETTINGS["tower"])
    outside = tiny.write_llava(tmp_path / "outside", clip=clip)
    message = refused(tmp_path / "lora", base=outside)
    assert f"llava convert {outside} OUT --to native" in message
    convert(outside, tmp_path / "OUT", to="native", check=False)
    assert opened(tmp_path / "lora", base=tmp_path / "OUT").tower_inside


def test_a_base_without_vision_is_one_line_of_warning(
    bases: Callable[[str], Path], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_adapter(bases("1.5") / "llava-hf", tmp_path / "lora", **SETTINGS["decoder"])
    assert opened(tmp_path / "lora", base=base).config.vision is None
    (record,) = caplog.records
    assert "pass a LLaVA as base= (--base) to use images" in record.getMessage()


@pytest.mark.parametrize("layout", ["llava", "llava-hf", "native"])
def test_a_merged_adapter_is_a_llava_with_the_same_answers(
    bases: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    base = bases("1.5") / layout
    make_adapter(bases("1.5") / "llava-hf", tmp_path / "lora", **SETTINGS["everything"])
    merge_lora(base, tmp_path / "merged", tmp_path / "lora", MergeOptions(precise=True, verify=True))
    merged = opened(tmp_path / "merged")
    apart = opened(tmp_path / "lora", base=base, image_mode="original")
    assert (merged.format, merged.config.image) == ("llava", apart.config.image)
    assert merged.config.decoder.vocab_size == tiny.PIECES
    for name, tensor in apart.tensors.items():
        wanted = tensor.read()[: tiny.PIECES] if "embed" in name or "head" in name else tensor.read()
        torch.testing.assert_close(merged.tensors[name].read(), wanted.half(), rtol=1e-3, atol=1e-4)
    vlm = llava.load(tmp_path / "merged", **FLOAT32)
    assert vlm.ask(PICTURE, "What is in the picture?", max_new_tokens=4)


def test_an_adapter_converts_to_llava_hf_for_transformers(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("1.5") / "llava-hf"
    expected = make_adapter(base, tmp_path / "lora", **SETTINGS["everything"])
    convert(tmp_path / "lora", tmp_path / "hf", LoadOptions(base=base), to="llava-hf", verify=True)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    with torch.inference_mode():
        logits = theirs(**processor(images=PICTURE, text=PROMPT, return_tensors="pt")).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-2)  # stored in float16


def test_training_starts_from_the_adapted_model(bases: Callable[[str], Path], assets: Assets, tmp_path: Path) -> None:
    base = bases("1.5") / "llava-hf"
    make_adapter(base, tmp_path / "lora", **SETTINGS["everything"])
    chosen = recipe(assets, tmp_path / "run", model=str(tmp_path / "lora"), base=str(base), vision_tower=None)
    found = start(chosen, tmp_path / "tokenizer")
    assert not found.missing
    for name, tensor in opened(tmp_path / "lora", base=base).tensors.items():
        assert torch.equal(found.tensors[name].read(), tensor.read()), name


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},  # the head stays the base's table
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"]},
    ],
)
def test_an_adapter_of_a_tied_llama_gives_the_logits_of_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = tiny.write_llama(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    ids = torch.tensor([[1, 20, 33, 47, 300]])
    with torch.inference_mode():
        expected = model(ids).logits[0]
        for merge in (True, False):
            vlm = llava.load(tmp_path / "lora", base=base, merge=merge, **FLOAT32)
            found = vlm.model.decoder.logits(vlm.model.decoder(vlm.model.embed(ids[0])[None]))[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
