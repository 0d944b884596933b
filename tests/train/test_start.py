"""What training starts from."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.errors import ConfigError
from llava.train.recipe import read_recipe
from llava.train.start import start
from tests import tiny, training
from tests.checkpoints import opened
from tests.training import Assets, recipe


@pytest.mark.parametrize("form", ["llava-hf", "no key in config.json", "native"])
def test_a_llava_keeps_its_projector_if_the_recipe_names_a_tower(form: str, assets: Assets, tmp_path: Path) -> None:
    """Whether a model has a projector follows from its tensors, not only from the keys of config.json."""
    if form == "no key in config.json":
        model = tiny.write_llava(tmp_path / "model", clip=assets.clip)
        tiny.edit_json(model / "config.json", mm_vision_tower=tiny.ABSENT)
    else:
        convert(assets.llava, model := tmp_path / "model", to=form)
    found = start(recipe(assets, tmp_path / "run", model=str(model), vision_tower=str(assets.clip)), tmp_path / "tok")
    assert not found.missing
    whole = opened(model, vision_tower=assets.clip)
    for name in (name for name in whole.tensors if name.startswith(("projector.", "vision."))):
        assert torch.equal(found.tensors[name].read(), whole.tensors[name].read()), name


@pytest.mark.parametrize(
    ("name", "first"),
    [("llava-tiny/finetune", "llava-tiny/pretrain"), ("llava-tiny/polish", "llava-tiny/finetune")],
)
def test_a_recipe_that_needs_another_recipes_result_names_it(
    name: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"model: does not exist yet.*first run: llava train {first}"):
        start(read_recipe(name), tmp_path / "tokenizer")


def test_a_llava_hf_model_is_trained_with_the_image_processing_of_llava(
    assets: Assets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers crops the centre; LLaVA's models were trained with padding, and its config.json has no mode."""
    convert(assets.llava, model := tmp_path / "hf", LoadOptions(image_mode="hf"), to="llava-hf", check=False)
    assert opened(model).config.image.mode == "hf"  # type: ignore[union-attr]
    found = start(recipe(assets, tmp_path / "run", model=str(model)), tmp_path / "tokenizer")
    assert found.config.image
    assert (found.config.image.mode, found.config.image.aspect) == ("original", "pad")
    assert "was saved with the image processing of transformers" in caplog.text


def test_a_language_model_with_a_tower_gets_a_new_projector(assets: Assets, tmp_path: Path) -> None:
    found = start(recipe(assets, tmp_path / "run", **training.from_parts(assets)), tmp_path / "tokenizer")
    assert found.missing
    assert all(name.startswith("projector.") for name in found.missing)


ANYRES = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[112, 56]],
    "mm_patch_merge_type": "spatial",
}
START_END = {"mm_use_im_start_end": True, "added": ("<im_patch>", "<im_start>", "<im_end>")}


@pytest.mark.parametrize(
    ("source", "changes", "before", "after"),
    [
        (ANYRES, {}, "aspect=anyres", "aspect=pad"),
        (
            ANYRES,
            {"aspect": "anyres", "pinpoints": [[112, 56]]},
            "mm_patch_merge_type=spatial",
            "mm_patch_merge_type=spatial_unpad",
        ),
        (
            ANYRES | {"mm_patch_merge_type": "spatial_unpad"},
            {"aspect": "anyres", "pinpoints": [[56, 112]]},
            "pinpoints=[[112, 56]]",
            "pinpoints=[[56, 112]]",
        ),
        (START_END, {}, "start_end=true", "start_end=false"),
        ({"llava_template": "llava_llama_2"}, {}, "template=llava_llama_2", "template=vicuna_v1"),
    ],
    ids=["aspect", "merge", "pinpoints", "start_end", "template"],
)
def test_a_value_that_differs_from_that_of_the_model_is_reported(
    source: dict[str, Any],
    changes: dict[str, Any],
    before: str,
    after: str,
    assets: Assets,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny.write_llava(tmp_path / "model", clip=assets.clip, **source)
    start(recipe(assets, tmp_path / "run", model=str(model), **changes), tmp_path / "tokenizer")
    assert f"{model}: was trained with {before}, but the recipe" in caplog.text
    assert caplog.text.strip().endswith(f" has {after}")


@pytest.mark.parametrize("kind", ["the same values", "a language model", "stage 1", "a projector"])
def test_a_model_without_other_values_is_trained_without_a_warning(
    kind: str, assets: Assets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    projector = tiny.write_projector(tmp_path / "projector", clip=assets.clip)
    changes: dict[str, Any] = {
        "the same values": {},
        "a language model": training.from_parts(assets) | {"template": "llava_v0", "aspect": "square"},
        "stage 1": {"model": str(assets.llama), "projector": str(projector), "aspect": "square"},
        "a projector": {"model": str(projector), "base": str(assets.llama)},
    }[kind]
    start(recipe(assets, tmp_path / "run", **changes), tmp_path / "tokenizer")
    assert "was trained with" not in caplog.text
