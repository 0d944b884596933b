"""`apply_delta` and `merge_lora`: documented commands, exact results, refusals."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import llava
from llava.checkpoint.consistency import check_headers
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.convert.merge import MergeOptions, apply_delta, merge_lora
from llava.convert.split import make_delta
from llava.errors import CheckpointError
from tests import tiny
from tests.command import assert_one_line_error, run, run_well
from tests.merged import DOOR, assert_same, originals, stored

TOKENS = ("<im_patch>", "<im_start>", "<im_end>")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (DOOR, ("--base", "--target", "--delta")),
        (DOOR, ("--base-model-path", "--target-model-path", "--delta-path")),
        (None, ("--base", "--target", "--delta")),
    ],
)
def test_the_documented_command_gives_the_originals_bits(
    raw: Path, delta: Path, tmp_path: Path, command: list[str] | None, flags: tuple[str, ...]
) -> None:
    target = tmp_path / "target"
    arguments = [part for flag, path in zip(flags, (raw, target, delta), strict=True) for part in (flag, path)]
    done = run_well(*arguments, command=command) if command else run_well("apply-delta", *arguments)
    assert_same(target, originals(raw, delta))
    for name in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (delta / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (delta, target))
    assert after == before | {"torch_dtype": "float16"}
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored(target))
    digest = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
    assert f"{digest}  model.safetensors" in done.stdout
    assert (target / "SHA256SUMS").read_text() == f"{digest}  model.safetensors\n"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("family", ["c_delta_v0", "d_delta_v1.1"])
def test_golden_deltas_are_applied_to_the_bit(
    golden: Path, golden_checkpoints: Path, tmp_path: Path, family: str
) -> None:
    folder = next((golden_checkpoints / family).iterdir())
    under = golden_checkpoints / "base" / "llama-7b"
    done = apply_delta(under, tmp_path / "merged", folder, MergeOptions(verify=True))
    assert done.verified
    record = json.loads((golden / family / "golden" / "merged_tensors.json").read_text())["tensors"]
    found = stored(tmp_path / "merged")
    assert set(found) == {name for name in record if "inv_freq" not in name}
    for name, tensor in found.items():
        assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == record[name]["sha256"], name
    template = open_checkpoint(folder, LoadOptions(base=under, vision=False)).config.template
    assert open_checkpoint(tmp_path / "merged", LoadOptions(vision=False)).config.template == template


def test_a_golden_lora_is_merged_to_the_bit(golden: Path, golden_checkpoints: Path, tmp_path: Path) -> None:
    folder = next((golden_checkpoints / "e_lora").iterdir())
    merge_lora(golden_checkpoints / "base" / "llama-7b", tmp_path / "merged", folder, MergeOptions(verify=True))
    found = stored(tmp_path / "merged")
    record = json.loads((golden / "e_lora" / "golden" / "merged_tensors.json").read_text())["float16"]
    assert set(found) == {name for name in record if "inv_freq" not in name}
    held = load_file(
        golden / "e_lora" / "golden" / "merged_float16_layer0.safetensors"
    )  # also holds the unchanged tower
    for name, tensor in ((name, tensor) for name, tensor in held.items() if "vision_tower" not in name):
        assert torch.equal(found[name], tensor), name
    for name, tensor in found.items():
        assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == record[name]["sha256"], name


def test_a_merged_folder_answers_as_the_pair_does(raw: Path, delta: Path, clip: Path, tmp_path: Path) -> None:
    apply_delta(raw, tmp_path / "merged", delta)
    pair = llava.load(delta, base=raw, vision_tower=clip, dtype="float32", device="cpu")
    whole = llava.load(tmp_path / "merged", vision_tower=clip, dtype="float32", device="cpu")
    assert whole.config == pair.config
    asked = [{"role": "user", "content": "What is unusual about it?"}]
    assert whole.generate(asked, max_new_tokens=12).token_ids == pair.generate(asked, max_new_tokens=12).token_ids


def by_hand(base: Path, lora: Path, precise: bool) -> dict[str, Tensor]:
    scale, made = tiny.LORA_ALPHA / tiny.LORA_RANK, {name: value.half() for name, value in stored(base).items()}
    pairs = torch.load(lora / "adapter_model.bin", weights_only=True)
    for name in [name for name in pairs if name.endswith("lora_A.weight")]:
        a, b = pairs[name], pairs[name.replace("lora_A", "lora_B")]
        key = name.removeprefix("base_model.model.").replace("lora_A.", "")
        if precise:
            made[key] = (made[key].float().addmm(b.float(), a.float(), alpha=scale)).half()
        else:
            made[key] = made[key] + (b.half().float() @ a.half().float() * scale).half()
    beside = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
    made |= {name.removeprefix("base_model.model."): value.half() for name, value in beside.items()}
    return {name: value for name, value in made.items() if "inv_freq" not in name}


@pytest.mark.parametrize("precise", [False, True])
def test_a_lora_is_merged_with_the_originals_rounding_or_precisely(lora: Path, tmp_path: Path, precise: bool) -> None:
    base = tiny.write_llama(tmp_path / "vicuna")
    done = merge_lora(base, tmp_path / "merged", lora, MergeOptions(precise=precise, verify=True))
    expected = by_hand(base, lora, precise)
    assert_same(tmp_path / "merged", expected)
    assert done.n_tensors == len(expected)
    other = by_hand(base, lora, not precise)
    assert any(not torch.equal(expected[name], other[name]) for name in expected)  # the option changes the result


@pytest.mark.parametrize("under", ["meta", "native", "merged"])
def test_a_lora_without_a_config_takes_it_from_the_base(lora: Path, clip: Path, tmp_path: Path, under: str) -> None:
    plain = shutil.copytree(lora, tmp_path / "plain")
    for name in ("config.json", "non_lora_trainables.bin"):
        (plain / name).unlink()
    base = tmp_path / "base"
    if under == "meta":
        tiny.write_meta(base)
    elif under == "merged":
        tiny.write_llava(base, clip=clip)
    else:
        convert(tiny.write_llama(tmp_path / "llama"), base)
    merge_lora(base, tmp_path / "merged", plain, MergeOptions(verify=True))
    assert open_checkpoint(tmp_path / "merged").config.decoder == open_checkpoint(base).config.decoder
    assert open_checkpoint(tmp_path / "merged").config.template == open_checkpoint(base).config.template


def test_a_lora_without_a_config_merges_with_a_native_llava_as_with_the_original(
    lora: Path, clip: Path, tmp_path: Path
) -> None:
    plain = shutil.copytree(lora, tmp_path / "plain")
    for name in ("config.json", "non_lora_trainables.bin"):
        (plain / name).unlink()
    original = tiny.write_llava(tmp_path / "llava", clip=clip)
    convert(original, tmp_path / "native")
    for base in (original, tmp_path / "native"):
        merge_lora(base, tmp_path / f"merged-{base.name}", plain)
    one, other = (open_checkpoint(tmp_path / f"merged-{name}") for name in ("llava", "native"))
    assert one.config == other.config
    assert one.config.template == "llava_v1"
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.read(), other.tensors[name].read()), name


def test_a_lora_with_its_own_tables_is_merged_to_a_longer_vocabulary(clip: Path, tmp_path: Path) -> None:
    base, config = tiny.write_llama(tmp_path / "vicuna"), {"vocab_size": tiny.PIECES + 3, "mm_use_im_start_end": True}
    lora = tiny.write_lora(tmp_path / "june", clip=clip, rows=True, **config)
    merge_lora(base, tmp_path / "merged", lora)
    found = open_checkpoint(tmp_path / "merged")
    check_headers(found)
    assert found.config.decoder.vocab_size == tiny.PIECES + 3
    assert found.config.start_end
    assert found.tokenizer.id_of("<im_end>") == tiny.PIECES + 2
    assert found.config == open_checkpoint(lora, LoadOptions(base=base)).config


def test_an_mpt_lora_is_merged(clip: Path, tmp_path: Path) -> None:
    base = tiny.write_mpt(tmp_path / "mpt", clip=clip)
    lora = tiny.write_mpt_lora(tmp_path / "lora", base=base)
    merge_lora(base, tmp_path / "merged", lora, MergeOptions(verify=True))
    pair, whole = (
        llava.load(f, device="cpu", dtype="float32", base=b) for f, b in ((lora, base), (tmp_path / "merged", None))
    )
    asked = [{"role": "user", "content": "Say hello."}]
    assert whole.generate(asked, max_new_tokens=8).token_ids == pair.generate(asked, max_new_tokens=8).token_ids


def test_a_delta_on_metas_own_files_equals_one_on_the_hubs(raw: Path, delta: Path, tmp_path: Path) -> None:
    meta = tiny.write_meta(tmp_path / "meta", seed=7, **tiny.LLAMA_1)
    apply_delta(meta, tmp_path / "merged", delta)
    assert_same(tmp_path / "merged", originals(raw, delta))


def test_made_and_applied_a_delta_gives_the_model_back(raw: Path, delta: Path, tmp_path: Path) -> None:
    apply_delta(raw, tmp_path / "whole", delta)
    run_well("make-delta", "--base", raw, "--target", tmp_path / "whole", "--delta", tmp_path / "again")
    apply_delta(raw, tmp_path / "back", tmp_path / "again")
    whole, back = stored(tmp_path / "whole"), stored(tmp_path / "back")
    assert set(whole) == set(back)
    for name, tensor in whole.items():
        torch.testing.assert_close(back[name].float(), tensor.float(), atol=2e-3, rtol=1e-3)
    differences = stored(tmp_path / "again")
    assert torch.equal(differences["model.mm_projector.weight"], whole["model.mm_projector.weight"])
    assert abs(differences["model.norm.weight"].float().mean()) < 0.1


def test_a_value_beyond_float16_is_refused_and_not_written_as_inf(raw: Path, clip: Path, tmp_path: Path) -> None:
    whole = tiny.write_llava(tmp_path / "whole", clip=clip, layout="bin", **tiny.LLAMA_1)
    tensors = {name: tensor.float() for name, tensor in stored(whole).items()}
    tensors["model.mm_projector.0.bias"][0] = 1e6
    torch.save(tensors, whole / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"mm_projector\.0\.bias: has values outside the float16 range"):
        make_delta(whole, raw, tmp_path / "delta", file_type="bin")
    assert not (tmp_path / "delta").exists()


def test_no_shard_size_is_a_traceback(raw: Path, delta: Path, tmp_path: Path) -> None:
    for size in ("inf", "nan", "0"):
        done = run("apply-delta", "--base", raw, "--target", tmp_path / "t", "--delta", delta, "--shard-gb", size)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_tensors_stored_transposed_are_verified_too(raw: Path, clip: Path, tmp_path: Path) -> None:
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, **tiny.LLAMA_1)
    tensors = stored(delta)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].T.contiguous().T
    for file in delta.glob("pytorch_model*"):
        file.unlink()
    torch.save(tensors, delta / "pytorch_model.bin")
    assert not stored(delta)[name].is_contiguous()
    apply_delta(raw, tmp_path / "t", delta, MergeOptions(verify=True))
    assert_same(tmp_path / "t", originals(raw, delta))


def test_what_cannot_be_merged_is_refused_in_one_line(
    raw: Path, delta: Path, lora: Path, clip: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    whole = tiny.write_llava(tmp_path / "whole", clip=clip)
    vicuna = tiny.write_llama(tmp_path / "v", seed=7, **tiny.LLAMA_1 | {"_name_or_path": "lmsys/vicuna-7b-v1.1"})
    wide = tiny.write_llama(tmp_path / "wide", seed=7, hidden_size=128, **tiny.LLAMA_1)
    cases: list[tuple[tuple[Any, ...], tuple[str, ...]]] = [
        ((raw, taken, delta), ("taken", "not empty")),
        ((raw, tmp_path / "t", whole), ("has format llava", "not delta", "does not need merging")),
        ((raw, tmp_path / "t", lora), ("has format lora", "not delta", "use llava merge-lora")),
        ((vicuna, tmp_path / "t", delta), ("vicuna-7b-v1.1", "raw LLaMA-1", "--force")),
        ((wide, tmp_path / "t", delta), ("shape", "128")),
        ((tmp_path / "nowhere", tmp_path / "t", delta), ("nowhere",)),
        ((raw, tmp_path / "t", tmp_path / "nowhere"), ("nowhere",)),
    ]
    for (under, target, path), mentions in cases:
        with pytest.raises(CheckpointError) as error:
            apply_delta(under, target, path)
        assert all(mention in str(error.value) for mention in mentions), error.value
        assert "\n" not in str(error.value)
        assert not (tmp_path / "t").exists()
        assert not (tmp_path / "t.partial").exists()
    done = run("apply-delta", "--base", vicuna, "--target", tmp_path / "t", "--delta", delta)
    assert_one_line_error(done, "vicuna-7b-v1.1", "raw LLaMA-1", "--force")
    assert [path.name for path in taken.iterdir()] == ["file"]
    forced = run_well(
        "apply-delta", "--base", vicuna, "--target", tmp_path / "t", "--delta", delta, "--force", "--json"
    )
    assert json.loads(forced.stdout)["n_tensors"] == len(stored(tmp_path / "t"))
    assert "vicuna-7b-v1.1" in forced.stderr


def test_nan_in_a_delta_leaves_no_files(raw: Path, clip: Path, tmp_path: Path) -> None:
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, **tiny.LLAMA_1)
    tensors = stored(delta)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    for file in delta.glob("pytorch_model*"):
        file.unlink()
    torch.save(tensors, delta / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"up_proj.*NaN or Inf"):
        apply_delta(raw, tmp_path / "t", delta)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta"]


def test_an_incomplete_projector_is_refused(raw: Path, lora: Path, clip: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(lora, tmp_path / "lora")
    (broken / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match=r"projector\.0\.weight is missing"):
        merge_lora(tiny.write_llama(tmp_path / "vicuna"), tmp_path / "t", broken)
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, **tiny.LLAMA_1)
    tensors = {name: value for name, value in stored(delta).items() if "mm_projector.2.bias" not in name}
    for file in delta.glob("pytorch_model*"):
        file.unlink()
    torch.save(tensors, delta / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"projector\.2\.bias is missing"):
        apply_delta(raw, tmp_path / "t", delta)
    assert not (tmp_path / "t").exists()


def test_making_a_delta_to_vicuna_is_warned_about(clip: Path, tmp_path: Path) -> None:
    vicuna = tiny.write_llama(tmp_path / "v", seed=7, **tiny.LLAMA_1 | {"_name_or_path": "lmsys/vicuna-7b-v1.1"})
    whole = tiny.write_llava(tmp_path / "w", clip=clip, **tiny.LLAMA_1)
    done = run_well("make-delta", "--base", vicuna, "--target", whole, "--delta", tmp_path / "d")
    assert "vicuna-7b-v1.1" in done.stderr
    assert open_checkpoint(tmp_path / "d", LoadOptions(base=vicuna, vision=False, force=True)).format == "delta"
