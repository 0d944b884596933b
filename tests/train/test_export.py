"""Exports: training from every kind of folder is saved in every form and opens again, or is refused at the start."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llava
from llava.convert.convert import convert
from llava.errors import LlavaError
from llava.train.loop import train
from llava.train.plan import make_plan
from llava.train.recipe import Recipe
from tests import tiny, training
from tests.checkpoints import opened
from tests.training import Assets, Json, net_and_dataset, recipe, restore

TINY = Path(llava.__file__).parent / "weights" / "llava-tiny"


def converted(to: str) -> Callable[[Path, Assets], Json]:
    def make(folder: Path, assets: Assets) -> Json:
        convert(assets.llava, folder / to, to=to, check=False)
        return {"model": str(folder / to)}

    return make


def whole(name: str) -> Callable[[Path, Assets], Json]:
    """A model that tiny writes. One without a tower gets one, and a new projector."""

    def make(folder: Path, assets: Assets) -> Json:
        model = tiny.WHOLE[name](folder / name, assets.clip)
        vision = name in ("llava", "mpt")
        more = {"start_end": True, "template": "mpt"} if name == "mpt" else {}
        return {"model": str(model), **more, **({} if vision else {"vision_tower": str(assets.clip)})}

    return make


def part(name: str) -> Callable[[Path, Assets], Json]:
    """A part of a model that tiny writes, on its base."""

    def make(folder: Path, assets: Assets) -> Json:
        old = tiny.LLAMA_1 if name == "delta" else {}
        base = tiny.write_llama(folder / "base", seed=7, **old)
        return {"model": str(tiny.PARTS[name](folder / name, assets.clip)), "base": str(base)}

    return make


def tower_inside(folder: Path, assets: Assets) -> Json:
    """Like LLaVA-1.6: the shards contain the tower's weights."""
    convert(assets.llava, folder / "native", to="native", check=False)
    convert(folder / "native", folder / "llava", to="llava", check=False)
    return {"model": str(folder / "llava")}


def stage_1(folder: Path, assets: Assets) -> Json:
    projector = tiny.write_projector(folder / "projector", clip=assets.clip, start_end=True)
    return {"model": str(assets.llama), "projector": str(projector), "start_end": True}


KINDS: dict[str, Callable[[Path, Assets], Json]] = {
    **{name: whole(name) for name in tiny.WHOLE},
    **{name: part(name) for name in tiny.PARTS},
    "native": converted("native"),
    "llava-hf": converted("llava-hf"),
    "llava-tiny": lambda folder, assets: {"model": str(TINY)},
    "tower inside": tower_inside,
    "stage 1": stage_1,
}
FORMS: dict[str, Json] = {
    "full": {"train": ["projector", "decoder"]},
    "lora": {"train": ["projector", "decoder"], "lora_rank": 2, "lora_alpha": 4},
    "projector": {"train": ["projector"]},
}
# A part can be saved only for a base that a reader can open.
REFUSED = {("delta", "lora"): "decoder differs from its base", ("delta", "projector"): "decoder differs from its base"}


def asked(tmp_path: Path, assets: Assets, kind: str, **changes: object) -> Recipe:
    values = {"max_steps": 2, "global_batch_size": 2, "micro_batch_size": 2, "save_every": 0}
    return recipe(assets, tmp_path / "run", **(KINDS[kind](tmp_path, assets) | values | changes))


def assert_opens_as_trained(done: Recipe, model: Path, elsewhere: Path) -> None:
    """The export, opened without its source's tower or the recipe, computes the loss of the trained model."""
    net, dataset = net_and_dataset(done)
    restore(done, net)
    batch = dataset.build(range(4))
    settings = json.loads((model / "config.json").read_text())
    is_part = (model / "adapter_config.json").is_file() or (model / "mm_projector.bin").is_file()
    again = replace(
        done,
        model=str(model),
        base=settings["_name_or_path"] if is_part else None,
        projector=None,
        vision_tower=None,
        lora_rank=0,
        output_dir=str(elsewhere),
    )
    read, _ = net_and_dataset(again)
    wanted = net.eval()(batch).item()
    assert read.eval()(batch).item() == pytest.approx(wanted, rel=5e-3)
    opened(model, **({"base": again.base} if is_part else {}))


def refused_by_plan(done: Recipe) -> str:
    """The error of `--plan`, or "" if there is none."""
    try:
        make_plan(done)
    except LlavaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_from_every_kind_of_folder_are_saved_or_refused_at_the_start(
    kind: str, form: str, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = asked(tmp_path, assets, kind, **FORMS[form])
    if refusal := refused_by_plan(done):
        assert REFUSED.get((kind, form), "cannot be the base of") in refusal
        with pytest.raises(LlavaError, match=re.escape(refusal)):
            train(done, device="cpu")
        assert not (tmp_path / "run" / "log.jsonl").exists()
        assert "--set export=llava" in refusal
        done = replace(done, export="llava")
    else:
        assert (kind, form) not in REFUSED
    plan = make_plan(done)
    model = train(done, device="cpu")
    written = sum(file.stat().st_size for file in model.rglob("*") if file.suffix in (".bin", ".safetensors"))
    assert plan.disk_bytes["trained model"] == pytest.approx(written, rel=0.2)
    monkeypatch.chdir(model)  # nothing is recorded relative to the working directory of the run
    assert_opens_as_trained(done, model, tmp_path / "elsewhere")


@pytest.mark.parametrize("form", ["lora", "projector"])
@pytest.mark.parametrize("kind", ["llava", "projector", "stage 1"])
def test_a_base_given_relative_to_the_working_directory_is_recorded_with_its_full_path(
    kind: str, form: str, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = asked(tmp_path, assets, kind, **FORMS[form])
    keys = ("model", "base", "projector", "vision_tower")
    names = {key: getattr(done, key) for key in keys if getattr(done, key)}
    monkeypatch.chdir(tmp_path)
    model = train(replace(done, **{key: os.path.relpath(name) for key, name in names.items()}), device="cpu")
    named = json.loads((model / "config.json").read_text())["_name_or_path"]
    assert os.path.normpath(named) == (done.model if done.projector else done.base or done.model)
    assert_opens_as_trained(done, model.absolute(), tmp_path / "elsewhere")


@pytest.mark.parametrize("export", ["native", "llava-hf", "llava"])
@pytest.mark.parametrize("kind", ["llava", "llava-hf", "llava-tiny", "lora", "llama"])
def test_an_export_as_a_whole_model_has_the_adapters_merged(
    export: str, kind: str, assets: Assets, tmp_path: Path
) -> None:
    done = asked(tmp_path, assets, kind, **FORMS["lora"], lora_dropout=0.0, export=export)
    model = train(done, device="cpu")
    assert opened(model).format == export
    assert_opens_as_trained(done, model, tmp_path / "elsewhere")


def test_what_the_export_format_cannot_hold_is_refused_by_plan_and_at_step_0(assets: Assets, tmp_path: Path) -> None:
    done = asked(tmp_path, assets, "mpt", **FORMS["full"], export="llava-hf")
    for job in (make_plan, lambda asked: train(asked, device="cpu")):
        with pytest.raises(LlavaError, match="supports only Llama"):
            job(done)
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("form", FORMS)
def test_an_export_from_a_model_with_its_tower_inside_needs_no_other_tower(
    form: str, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = asked(tmp_path, assets, "native", **FORMS[form])
    model = train(done, device="cpu")
    assert json.loads((model / "config.json").read_text())["mm_vision_tower"] == "./vision_tower"
    moved = tmp_path / "moved"
    model.rename(moved)
    base = {} if form == "full" else {"base": done.model}
    tower = {name: t.read() for name, t in opened(moved, **base).tensors.items() if name.startswith("vision.")}
    source = opened(done.model)
    assert all(torch.equal(value, source.tensors[name].read()) for name, value in tower.items())
    assert any(name == "vision.cls" for name in tower)
    shutil.rmtree(moved / "vision_tower")
    with pytest.raises(LlavaError, match="vision_tower: is missing"):
        opened(moved, **base)


def test_an_export_option_may_change_between_two_calls(assets: Assets, tmp_path: Path) -> None:
    first = asked(tmp_path, assets, "llava", **FORMS["lora"])
    train(first, device="cpu")
    losses = training.losses(tmp_path / "run")
    (tmp_path / "run" / "model").rename(tmp_path / "as-lora")
    model = train(replace(first, export="native"), device="cpu")
    assert opened(model).format == "native"
    assert training.losses(tmp_path / "run") == losses  # nothing was trained again


def test_another_export_of_a_finished_run_is_explained(
    assets: Assets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = asked(tmp_path, assets, "llava", **FORMS["projector"])
    train(first, device="cpu")
    train(replace(first, export="llava"), device="cpu")
    assert "to export it with export=llava, move that folder away" in caplog.text


def test_the_sum_of_two_loras_is_saved_as_one_of_their_ranks(assets: Assets, tmp_path: Path) -> None:
    done = asked(tmp_path, assets, "lora", **FORMS["lora"])
    model = train(done, device="cpu")
    settings = json.loads((model / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (tiny.LORA_RANK + 2, tiny.LORA_RANK + 2)
    assert settings["base_model_name_or_path"] == done.base


def test_values_beyond_float16_are_saved_in_bfloat16_with_a_warning(
    assets: Assets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.write_llava(tmp_path / "model", clip=assets.clip)
    done = recipe(assets, tmp_path / "run", model=str(model), max_steps=1, lr=1e6, warmup_ratio=0.0)
    done = replace(done, train=("projector",), export="llava")
    trained = train(done, device="cpu")
    assert "saved in bfloat16" in caplog.text
    checkpoint = opened(trained)
    assert checkpoint.config.dtype == "bfloat16"
    largest = max(t.read().abs().max().item() for n, t in checkpoint.tensors.items() if n.startswith("projector."))
    assert largest > 65504


def test_a_disk_without_room_for_the_result_is_refused_before_the_first_step(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = asked(tmp_path, assets, "llava", **FORMS["full"])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    for job in (make_plan, lambda asked: train(asked, device="cpu")):
        with pytest.raises(LlavaError, match=r"run: needs \d\.\d\d MB, but the disk has only 1\.00 MB free"):
            job(done)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_tracker_that_is_not_installed_is_refused_by_plan(
    assets: Assets, tmp_path: Path, hide: Callable[[str], None]
) -> None:
    hide("trackio")
    done = replace(asked(tmp_path, assets, "llava", **FORMS["projector"]), logs=("trackio",))
    for job in (make_plan, lambda asked: train(asked, device="cpu")):
        with pytest.raises(LlavaError, match=r"trackio.*pip install 'llava-native\[train\]'"):
            job(done)
