"""The recorded base: found without being typed, and recognised by a few of its values."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.convert.merge import MergeOptions, apply_delta, merge_lora
from llava.convert.split import extract_projector, make_delta
from llava.formats.lora import write_lora
from llava.formats.recorded_base import BASE_KEY, base_record
from tests import tiny
from tests.checkpoints import opened, refused, tensors_of
from tests.command import run_well

FLOAT32 = {"dtype": "float32", "device": "cpu"}
OTHER = "records other values of"


def write_part(kind: str, folder: Path, base: Path, model: Path) -> Path:
    """Writes a LoRA, a projector or a delta with our own functions, for a base given by its path."""
    if kind == "delta":
        make_delta(model, base, folder)
    elif kind == "projector":
        extract_projector(base, folder)
    else:
        found = opened(base)
        generator = torch.Generator().manual_seed(5)
        pair = torch.randn(4, 64, generator=generator) * 0.1, torch.randn(64, 4, generator=generator) * 0.1
        beside = {name: tensor for name, tensor in tensors_of(found).items() if name.startswith("projector.")}
        write_lora(
            folder, found.config, {"decoder.blocks.0.attn.out": {"": pair}}, r=4, alpha=8, dropout=0.0, base=str(base),
            vision_tower=found.vision_tower, non_lora=beside, recorded=base_record(str(base), found.tensors),
        )  # fmt: skip
    return folder


@pytest.fixture
def parts(clip: Path, raw: Path, checkpoint: Path, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Returns a function that writes a part and a copy of its base, which tests may change."""

    def write(kind: str) -> tuple[Path, Path]:
        base = shutil.copytree(raw if kind == "delta" else checkpoint, tmp_path / "own" / "base")
        model = tiny.write_llava(tmp_path / "model", clip=clip, **tiny.LLAMA_1)
        return write_part(kind, tmp_path / "own" / kind, base, model), base

    return write


KINDS = ("lora", "projector", "delta")


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_we_wrote_needs_no_base_to_be_given(
    parts: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, base = parts(kind)
    with_base, without = (opened(folder, base=given) for given in (base, None))
    (record,) = caplog.records
    assert f"uses the recorded base {base}" in record.getMessage()
    for name, tensor in with_base.tensors.items():
        assert torch.equal(tensor.read(), without.tensors[name].read()), name
    done = run_well("convert", folder, tmp_path / "out", "--no-check")
    assert done.stderr.count("\n") == 1
    assert f"uses the recorded base {base}" in done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_another_base_of_the_same_sizes_is_one_line_of_warning(
    parts: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = parts(kind)
    other = tiny.write_llama(tmp_path / "other", seed=9, **(tiny.LLAMA_1 if kind == "delta" else {}))
    opened(folder, base=other)
    assert caplog.text.count(OTHER) == len(caplog.records) == 1
    assert str(other) in caplog.text


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_base_of_which_one_tensor_was_trained_is_another_base(
    clip: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny.write_llava(tmp_path / "base", clip=clip, layout="safetensors")
    projector = write_part("projector", tmp_path / "projector", base, base)
    tensors = load_file(base / "model.safetensors")
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    opened(projector, base=base)
    assert OTHER in caplog.text


@pytest.mark.parametrize("to", ["native", "llava", "llama", "llava-hf"])
def test_the_same_base_in_another_layout_or_dtype_is_no_other_base(
    clip: Path, tmp_path: Path, to: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny.write_llava(tmp_path / "base", clip=clip, layout="safetensors")
    projector = write_part("projector", tmp_path / "projector", base, base)
    convert(base, tmp_path / "same", to=to, check=False)
    opened(projector, base=tmp_path / "same")
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(rounded, base / "model.safetensors", metadata={"format": "pt"})
    opened(projector, base=base)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_merging_takes_the_recorded_base_and_warns_about_another(
    parts: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, base = parts(kind)
    merge = {"lora": merge_lora, "delta": apply_delta}[kind]
    one = merge(None, tmp_path / "merged", folder)
    assert (one.base, BASE_KEY in (tmp_path / "merged" / "config.json").read_text()) == (str(base), False)
    assert one.sha256 == merge(base, tmp_path / "again", folder).sha256
    caplog.clear()
    other = tiny.write_llama(tmp_path / "other", seed=9, **(tiny.LLAMA_1 if kind == "delta" else {}))
    merge(other, tmp_path / "wrong", folder, MergeOptions())
    assert OTHER in caplog.text


def test_a_lora_that_is_kept_separate_uses_the_recorded_base_too(parts: Callable[[str], tuple[Path, Path]]) -> None:
    folder, base = parts("lora")
    apart, merged = llava.load(folder, merge=False, **FLOAT32), llava.load(folder, base=base, **FLOAT32)
    torch.testing.assert_close(apart.logits("Hello"), merged.logits("Hello"), rtol=0, atol=1e-4)


def test_a_relative_base_is_found_beside_the_lora_and_in_the_working_directory(
    clip: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = tiny.write_lora(tmp_path / "a" / "lora", clip=clip, base="../base")
    assert "needs its base" in refused(lora)
    shutil.copytree(base, tmp_path / "a" / "base")
    assert opened(lora).format == "lora"
    (tmp_path / "a" / "base").rename(tmp_path / "base")
    assert "needs its base" in refused(lora)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert opened(lora).format == "lora"


@pytest.mark.parametrize("recorded", [".", "", "empty", "../lora"])
def test_a_recorded_name_that_is_no_other_checkpoint_is_not_used(clip: Path, tmp_path: Path, recorded: str) -> None:
    (tmp_path / "lora" / "empty").mkdir(parents=True)
    lora = tiny.write_lora(tmp_path / "lora", clip=clip, base=recorded)
    assert "needs its base" in refused(lora)


def test_a_base_without_a_name_is_compared_by_its_config(
    clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Vicuna 1.3 and 1.5 differ in eps."""
    lora = tiny.write_lora(tmp_path / "lora", clip=clip, rms_norm_eps=1e-5)
    opened(lora, base=tiny.write_llama(tmp_path / "v1.3", rms_norm_eps=1e-6))
    assert "rms_norm_eps = 1e-05" in caplog.text
    assert "answers are worse" in caplog.text


def test_a_base_in_the_hubs_cache_is_compared_by_its_id(
    clip: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip, base="lmsys/vicuna-13b-v1.3")
    for name, warnings in (("vicuna-13b-v1.3", 0), ("vicuna-13b-v1.5", 1)):
        cached = shutil.copytree(base, tmp_path / f"models--lmsys--{name}" / "snapshots" / "ab")
        opened(lora, base=cached)
        assert caplog.text.count(f"the base is lmsys/{name}") == warnings


def test_a_projector_of_a_lora_records_no_base_because_none_exists_by_itself(
    clip: Path, base: Path, tmp_path: Path
) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    extract_projector(lora, tmp_path / "projector", LoadOptions(base=base))
    config = json.loads((tmp_path / "projector" / "config.json").read_text())
    assert "_name_or_path" not in config
    assert set(config[BASE_KEY]) == {"values"}
    assert str(lora) not in refused(tmp_path / "projector").split("needs its base")[1]


def test_an_extracted_projector_records_an_absolute_path(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = tmp_path / "hf"
    convert(checkpoint, hf, to="llava-hf", check=False)
    monkeypatch.chdir(tmp_path)
    extract_projector("hf", Path("projector"))
    monkeypatch.chdir("/")
    found, whole = opened(tmp_path / "projector"), opened(hf, image_mode="original")
    assert replace(found.config, template=None) == replace(whole.config, template=None)
    for name, tensor in whole.tensors.items():
        assert torch.equal(found.tensors[name].read(), tensor.read()), name


@pytest.mark.parametrize("value", [7, {"values": 7}, {"values": {"decoder.norm.weight": "x"}}])
def test_a_broken_record_is_one_line(clip: Path, base: Path, tmp_path: Path, value: object) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip, **{BASE_KEY: value})
    assert "config.json" in refused(lora, base=base)
