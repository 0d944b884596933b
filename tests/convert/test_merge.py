"""The tools that put differences and bases together: the documented commands, kills, bits, memory."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import llava
from llava.checkpoint.files import open_weights
from llava.checkpoint.open import check_headers, open_checkpoint
from llava.convert.delta import write_delta
from llava.convert.merge import apply_delta, merge_lora
from llava.convert.native import convert
from llava.convert.projector import extract_projector
from llava.errors import CheckpointError
from tests import tiny
from tests.command import assert_one_line_error, run, run_well

DOOR = [sys.executable, "-m", "llava.model.apply_delta"]
TOKENS = ("<im_patch>", "<im_start>", "<im_end>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw LLaMA-1 that the deltas below were taken to."""
    return tiny.write_llama(tmp_path_factory.mktemp("base") / "llama", seed=7, **tiny.LLAMA_1)


@pytest.fixture(scope="module")
def delta(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"mm_projector_type": "linear", "mm_use_im_start_end": True}
    return tiny.write_delta(tmp_path_factory.mktemp("d") / "x", clip=clip, added=TOKENS, **config, **tiny.LLAMA_1)


@pytest.fixture(scope="module")
def lora(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_lora(tmp_path_factory.mktemp("l") / "x", clip=clip)


def stored(folder: Path) -> dict[str, Tensor]:
    weights = open_weights(folder)
    return {name: weights[name] for name in weights}


def originals(base: Path, delta: Path) -> dict[str, Tensor]:
    """As the original's tool does it, whole and in float16."""
    under, sums = stored(base), {}
    for name, value in stored(delta).items():
        made = value.half().clone()
        if name in under:
            own = under[name].half()
            made[tuple(slice(0, n) for n in own.shape)] += own
        if "inv_freq" not in name:
            sums[name] = made
    return sums


def assert_same(folder: Path, expected: dict[str, Tensor]) -> None:
    found = stored(folder)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float16, name
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


# ------------------------------------------------------------------------------------------- the documented command


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (DOOR, ("--base", "--target", "--delta")),
        (DOOR, ("--base-model-path", "--target-model-path", "--delta-path")),
        (None, ("--base", "--target", "--delta")),
    ],
)
def test_the_documented_command_gives_the_originals_bits(
    base: Path, delta: Path, tmp_path: Path, command: list[str] | None, flags: tuple[str, ...]
) -> None:
    target = tmp_path / "target"
    arguments = [part for flag, path in zip(flags, (base, target, delta), strict=True) for part in (flag, path)]
    done = run_well(*arguments, command=command) if command else run_well("apply-delta", *arguments)
    assert_same(target, originals(base, delta))
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
    done = apply_delta(under, tmp_path / "merged", folder, verify=True)
    assert done.verified
    record = json.loads((golden / family / "golden" / "merged_tensors.json").read_text())["tensors"]
    found = stored(tmp_path / "merged")
    assert set(found) == {name for name in record if "inv_freq" not in name}
    for name, tensor in found.items():
        assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == record[name]["sha256"], name
    template = open_checkpoint(folder, base=under, vision=False).config.template
    assert open_checkpoint(tmp_path / "merged", vision=False).config.template == template


def test_a_golden_lora_is_merged_to_the_bit(golden: Path, golden_checkpoints: Path, tmp_path: Path) -> None:
    folder = next((golden_checkpoints / "e_lora").iterdir())
    merge_lora(golden_checkpoints / "base" / "llama-7b", tmp_path / "merged", folder, verify=True)
    found = stored(tmp_path / "merged")
    record = json.loads((golden / "e_lora" / "golden" / "merged_tensors.json").read_text())["float16"]
    assert set(found) == {name for name in record if "inv_freq" not in name}
    held = load_file(golden / "e_lora" / "golden" / "merged_float16_layer0.safetensors")  # the tower, unchanged, too
    for name, tensor in ((name, tensor) for name, tensor in held.items() if "vision_tower" not in name):
        assert torch.equal(found[name], tensor), name
    for name, tensor in found.items():
        assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == record[name]["sha256"], name


def test_a_merged_folder_answers_as_the_pair_does(base: Path, delta: Path, clip: Path, tmp_path: Path) -> None:
    apply_delta(base, tmp_path / "merged", delta)
    pair = llava.load(delta, base=base, vision_tower=clip, dtype="float32", device="cpu")
    whole = llava.load(tmp_path / "merged", vision_tower=clip, dtype="float32", device="cpu")
    assert whole.config == pair.config
    asked = [{"role": "user", "content": "What is unusual about it?"}]
    assert whole.generate(asked, max_new_tokens=12).token_ids == pair.generate(asked, max_new_tokens=12).token_ids


# ------------------------------------------------------------------------------------------------------- arithmetic


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
    done = merge_lora(base, tmp_path / "merged", lora, precise=precise, verify=True)
    expected = by_hand(base, lora, precise)
    assert_same(tmp_path / "merged", expected)
    assert done.n_tensors == len(expected)
    other = by_hand(base, lora, not precise)
    assert any(not torch.equal(expected[name], other[name]) for name in expected)  # the option makes a difference


@pytest.mark.parametrize("under", ["meta", "native", "merged"])
def test_a_lora_of_peft_alone_takes_its_config_from_the_base(
    lora: Path, clip: Path, tmp_path: Path, under: str
) -> None:
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
    merge_lora(base, tmp_path / "merged", plain, verify=True)
    assert open_checkpoint(tmp_path / "merged").config.decoder == open_checkpoint(base).config.decoder
    assert open_checkpoint(tmp_path / "merged").config.template == open_checkpoint(base).config.template


def test_a_lora_of_peft_alone_on_a_native_llava_keeps_the_template_and_asks_for_another_layout_to_merge(
    lora: Path, clip: Path, tmp_path: Path
) -> None:
    plain = shutil.copytree(lora, tmp_path / "plain")
    for name in ("config.json", "non_lora_trainables.bin"):
        (plain / name).unlink()
    convert(tiny.write_llava(tmp_path / "llava", clip=clip), tmp_path / "native")
    assert open_checkpoint(plain, base=tmp_path / "native").config.template == "llava_v1"
    with pytest.raises(CheckpointError, match=r"llava convert .*native OUT --to original"):
        merge_lora(tmp_path / "native", tmp_path / "merged", plain)
    assert not (tmp_path / "merged.partial").exists()
    convert(tmp_path / "native", tmp_path / "original", to="original")
    merge_lora(tmp_path / "original", tmp_path / "merged", plain)
    assert open_checkpoint(tmp_path / "merged").config.vision == open_checkpoint(tmp_path / "native").config.vision


def test_a_lora_with_its_own_tables_is_merged_to_a_longer_vocabulary(clip: Path, tmp_path: Path) -> None:
    base, config = tiny.write_llama(tmp_path / "vicuna"), {"vocab_size": tiny.PIECES + 3, "mm_use_im_start_end": True}
    lora = tiny.write_lora(tmp_path / "june", clip=clip, rows=True, **config)
    merge_lora(base, tmp_path / "merged", lora)
    found = open_checkpoint(tmp_path / "merged")
    check_headers(found)
    assert found.config.decoder.vocab_size == tiny.PIECES + 3
    assert found.config.start_end
    assert found.tokenizer.id_of("<im_end>") == tiny.PIECES + 2
    assert found.config == open_checkpoint(lora, base=base).config


def test_an_mpt_lora_is_merged(clip: Path, tmp_path: Path) -> None:
    base = tiny.write_mpt(tmp_path / "mpt", clip=clip)
    lora = tiny.write_mpt_lora(tmp_path / "lora", base=base)
    merge_lora(base, tmp_path / "merged", lora, verify=True)
    pair, whole = (
        llava.load(f, device="cpu", dtype="float32", base=b) for f, b in ((lora, base), (tmp_path / "merged", None))
    )
    asked = [{"role": "user", "content": "Say hello."}]
    assert whole.generate(asked, max_new_tokens=8).token_ids == pair.generate(asked, max_new_tokens=8).token_ids


def test_a_delta_on_metas_own_files_equals_one_on_the_hubs(base: Path, delta: Path, tmp_path: Path) -> None:
    meta = tiny.write_meta(tmp_path / "meta", seed=7, **tiny.LLAMA_1)
    apply_delta(meta, tmp_path / "merged", delta)
    assert_same(tmp_path / "merged", originals(base, delta))


def test_made_and_applied_a_delta_gives_the_model_back(base: Path, delta: Path, tmp_path: Path) -> None:
    apply_delta(base, tmp_path / "whole", delta)
    run_well("make-delta", "--base", base, "--target", tmp_path / "whole", "--delta", tmp_path / "again")
    apply_delta(base, tmp_path / "back", tmp_path / "again")
    whole, back = stored(tmp_path / "whole"), stored(tmp_path / "back")
    assert set(whole) == set(back)
    for name, tensor in whole.items():
        torch.testing.assert_close(back[name].float(), tensor.float(), atol=2e-3, rtol=1e-3)
    differences = stored(tmp_path / "again")
    assert torch.equal(differences["model.mm_projector.weight"], whole["model.mm_projector.weight"])
    assert abs(differences["model.norm.weight"].float().mean()) < 0.1


def test_a_value_beyond_float16_is_refused_and_not_written_as_inf(base: Path, clip: Path, tmp_path: Path) -> None:
    whole = tiny.write_llava(tmp_path / "whole", clip=clip, layout="bin", **tiny.LLAMA_1)
    tensors = {name: tensor.float() for name, tensor in stored(whole).items()}
    tensors["model.mm_projector.0.bias"][0] = 1e6
    torch.save(tensors, whole / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"mm_projector\.0\.bias: holds values beyond float16"):
        write_delta(tmp_path / "delta", whole, base)
    assert not (tmp_path / "delta").exists()


# ---------------------------------------------------------------------------------------------------- kills, errors


SLOW = """
import sys, time
from pathlib import Path
from llava.convert.merge import apply_delta
base, target, delta = map(Path, sys.argv[1:])
apply_delta(base, target, delta, max_shard_bytes=30_000, progress=lambda done, total: time.sleep(0.02))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_is_gone_on_with(base: Path, delta: Path, tmp_path: Path, how: signal.Signals) -> None:
    target, partial = tmp_path / "target", tmp_path / "target.partial"
    slow = subprocess.Popen([sys.executable, "-c", SLOW, base, target, delta], stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while len(list(partial.glob("*.safetensors"))) < 2 and time.monotonic() < end and slow.poll() is None:
        time.sleep(0.01)
    # a second one does not write into the first one's files
    with pytest.raises(CheckpointError, match="another process is at work"):
        apply_delta(base, target, delta, max_shard_bytes=30_000)
    slow.send_signal(how)
    slow.communicate(timeout=60)
    assert not target.exists()
    left = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(left) >= 2
    # of other inputs, or another way, it does not go on there
    with pytest.raises(CheckpointError, match="beginnings of something else"):
        apply_delta(base, target, delta, max_shard_bytes=40_000)
    done = apply_delta(base, target, delta, max_shard_bytes=30_000, verify=True)
    assert done.taken_over >= 2
    assert not partial.exists()
    assert_same(target, originals(base, delta))
    after = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    whole = [name for name in left if after[name] == left[name]]
    assert len(whole) == done.taken_over
    for line in (target / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("how", ["bit", "cut"])
def test_a_shard_that_was_damaged_meanwhile_is_made_anew(base: Path, delta: Path, tmp_path: Path, how: str) -> None:
    target, partial = tmp_path / "target", tmp_path / "target.partial"

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_delta(base, target, delta, max_shard_bytes=30_000, progress=stop)
    file = sorted(partial.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data if how == "bit" else data[:-100])
    whole = len(list(partial.glob("*.safetensors"))) - 1
    done = apply_delta(base, target, delta, max_shard_bytes=30_000)
    assert done.taken_over == whole
    assert_same(target, originals(base, delta))


def interrupted(base: Path, target: Path, delta: Path) -> int:
    """A run that ends half-way. How many shards it leaves."""

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_delta(base, target, delta, max_shard_bytes=30_000, progress=stop)
    return len(list(target.with_name(f"{target.name}.partial").glob("*.safetensors")))


def test_a_rerun_on_a_disk_that_has_filled_up_keeps_what_is_done(
    base: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = interrupted(base, tmp_path / "t", delta)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(CheckpointError, match="make room"):
            apply_delta(base, tmp_path / "t", delta, max_shard_bytes=30_000)
        with pytest.raises(CheckpointError, match="make room"):
            apply_delta(base, tmp_path / "fresh", delta)
    assert not (tmp_path / "fresh.partial").exists()
    assert apply_delta(base, tmp_path / "t", delta, max_shard_bytes=30_000).taken_over == left


def test_a_target_that_is_taken_meanwhile_costs_no_work(base: Path, delta: Path, tmp_path: Path) -> None:
    target = tmp_path / "t"

    def take(done: int, total: int) -> None:
        if done == total:
            target.mkdir(exist_ok=True)
            (target / "mine").touch()

    with pytest.raises(CheckpointError, match=r"t\.partial: mend that and give the same command again"):
        apply_delta(base, target, delta, max_shard_bytes=30_000, progress=take)
    (target / "mine").unlink()
    done = apply_delta(base, target, delta, max_shard_bytes=30_000)
    assert done.taken_over == len(done.sha256)
    assert_same(target, originals(base, delta))
    assert not (target / "merge.json").exists()


@pytest.mark.skipif(not Path("/proc").is_mount(), reason="needs a mount point")
def test_a_target_that_can_not_give_way_is_told_before_the_work(base: Path, delta: Path) -> None:
    told: list[int] = []
    with pytest.raises(CheckpointError, match="/proc: is where a disk is mounted"):
        apply_delta(base, Path("/proc"), delta, progress=lambda done, total: told.append(done))
    assert not told


def test_a_disk_without_locks_is_warned_of_and_written_to(
    base: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # what NFS says to an exclusive lock on a folder

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", no_locks)
    apply_delta(base, tmp_path / "t", delta)
    assert "can not be locked" in caplog.text
    assert_same(tmp_path / "t", originals(base, delta))


def test_shards_of_a_forced_run_are_not_taken_over_without_force(base: Path, clip: Path, tmp_path: Path) -> None:
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, **tiny.LLAMA_1)
    tensors = stored(delta)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    for file in delta.glob("pytorch_model*"):
        file.unlink()
    torch.save(tensors, delta / "pytorch_model.bin")

    def stop(done: int, total: int) -> None:
        if done > total * 2 // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_delta(base, tmp_path / "t", delta, force=True, max_shard_bytes=30_000, progress=stop)
    with pytest.raises(CheckpointError, match="beginnings of something else"):
        apply_delta(base, tmp_path / "t", delta, max_shard_bytes=30_000)


def test_no_shard_size_is_a_traceback(base: Path, delta: Path, tmp_path: Path) -> None:
    for size in ("inf", "nan", "0"):
        done = run("apply-delta", "--base", base, "--target", tmp_path / "t", "--delta", delta, "--shard-gb", size)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_tensors_that_lie_transposed_in_their_file_are_verified_too(base: Path, clip: Path, tmp_path: Path) -> None:
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, **tiny.LLAMA_1)
    tensors = stored(delta)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].T.contiguous().T
    for file in delta.glob("pytorch_model*"):
        file.unlink()
    torch.save(tensors, delta / "pytorch_model.bin")
    assert not stored(delta)[name].is_contiguous()
    apply_delta(base, tmp_path / "t", delta, verify=True)
    assert_same(tmp_path / "t", originals(base, delta))


def test_a_full_disk_is_one_line_and_leaves_no_target(base: Path, delta: Path, tmp_path: Path) -> None:
    limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "-"]  # KB
    done = run(*DOOR, "--base", base, "--target", tmp_path / "t", "--delta", delta, command=limited)
    assert_one_line_error(done, "can not be written", "give the same command again")
    assert not (tmp_path / "t").exists()
    run_well("--base", base, "--target", tmp_path / "t", "--delta", delta, command=DOOR)
    assert_same(tmp_path / "t", originals(base, delta))


def test_what_can_not_be_merged_is_refused_in_one_line(
    base: Path, delta: Path, lora: Path, clip: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    whole = tiny.write_llava(tmp_path / "whole", clip=clip)
    vicuna = tiny.write_llama(tmp_path / "v", seed=7, **tiny.LLAMA_1 | {"_name_or_path": "lmsys/vicuna-7b-v1.1"})
    wide = tiny.write_llama(tmp_path / "wide", seed=7, hidden_size=128, **tiny.LLAMA_1)
    cases: list[tuple[tuple[Any, ...], tuple[str, ...]]] = [
        ((base, taken, delta), ("taken", "not empty")),
        ((base, tmp_path / "t", whole), ("is no delta but merged", "loads as it is")),
        ((base, tmp_path / "t", lora), ("is no delta but lora", "use llava merge-lora")),
        ((vicuna, tmp_path / "t", delta), ("vicuna-7b-v1.1", "raw LLaMA-1", "--force")),
        ((wide, tmp_path / "t", delta), ("shape", "128")),
        ((tmp_path / "nowhere", tmp_path / "t", delta), ("nowhere",)),
        ((base, tmp_path / "t", tmp_path / "nowhere"), ("nowhere",)),
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


def test_nan_in_a_delta_leaves_nothing_behind(base: Path, clip: Path, tmp_path: Path) -> None:
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, **tiny.LLAMA_1)
    tensors = stored(delta)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    for file in delta.glob("pytorch_model*"):
        file.unlink()
    torch.save(tensors, delta / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"up_proj.*NaN or Inf"):
        apply_delta(base, tmp_path / "t", delta)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta"]


# ------------------------------------------------------------------------------------------------------- projector


def test_a_projector_that_was_taken_out_makes_the_model_again(clip: Path, tmp_path: Path) -> None:
    whole = tiny.write_llava(tmp_path / "whole", clip=clip, added=TOKENS, mm_use_im_start_end=True)
    run_well("extract-projector", whole, tmp_path / "projector")
    weights = torch.load(tmp_path / "projector" / "mm_projector.bin", weights_only=True)
    assert set(weights) == {"model.mm_projector.0.weight", "model.mm_projector.0.bias", "model.mm_projector.2.weight",
                            "model.mm_projector.2.bias", "model.embed_tokens.weight"}  # fmt: skip
    found = open_checkpoint(tmp_path / "projector", base=whole)
    before = open_checkpoint(whole)
    assert found.kind == "projector"
    assert found.config.start_end
    for name in ("projector.0.weight", "projector.2.bias", "decoder.embed.weight"):
        assert torch.equal(found.sources[name].read(), before.sources[name].read()), name


def test_a_tower_of_unpublished_sizes_goes_along(base: Path, clip: Path, tmp_path: Path) -> None:
    whole = tiny.write_llava(tmp_path / "whole", clip=clip, tower_seed=5)
    extract_projector(whole, tmp_path / "p")
    moved = (tmp_path / "p").rename(tmp_path / "q")
    before = open_checkpoint(whole)
    for under in (base, whole):
        found = open_checkpoint(moved, base=under)
        check_headers(found)
        assert found.config.vision == before.config.vision
        for name in ("vision.cls", "vision.blocks.0.attn.qkv.weight"):
            assert torch.equal(found.sources[name].read(), before.sources[name].read()), name


def test_of_a_model_without_eyes_no_projector_is_taken(base: Path, tmp_path: Path) -> None:
    assert_one_line_error(run("extract-projector", base, tmp_path / "p"), "has no projector")
    assert not (tmp_path / "p").exists()


def test_the_projector_of_a_llava_hf_export_is_the_same(clip: Path, tmp_path: Path) -> None:
    whole = tiny.write_llava(tmp_path / "whole", clip=clip)
    convert(whole, tmp_path / "hf", to="hf")
    for folder in (whole, tmp_path / "hf"):
        extract_projector(folder, tmp_path / f"p-{folder.name}")
    one, other = (
        torch.load(tmp_path / f"p-{name}" / "mm_projector.bin", weights_only=True) for name in ("whole", "hf")
    )
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


# ----------------------------------------------------------------------------------------------------------- memory


PEAK = """
import os, sys, threading, time
from pathlib import Path
from llava.convert.check import logits
from llava.convert.merge import apply_delta
from llava.checkpoint.open import open_checkpoint

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) // 1024

before, peak, running = anonymous(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
WORK
running = False; thread.join()
print(peak - before)
"""


def peak(work: str, *arguments: Path) -> int:
    """MB of anonymous memory that some work takes in a process of its own."""
    command = [sys.executable, "-c", PEAK.replace("WORK", work), *arguments]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="RssAnon is told by Linux alone")
def test_comparing_logits_takes_a_large_vocabulary_in_pieces(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "vocab_size": 200_000, "num_hidden_layers": 1}
    folder = tiny.write_llama(tmp_path / "wide", **sizes)
    found = peak("logits(open_checkpoint(sys.argv[1]), 512)", folder)
    assert found < 330, found  # MB; the head alone is 410 in float32, pieces 67


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="RssAnon is told by Linux alone")
def test_memory_does_not_grow_with_the_number_of_layers(clip: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, **tiny.LLAMA_1}
    peaks = []
    for layers in (2, 16):
        folder = tmp_path / str(layers)
        base = tiny.write_llama(folder / "base", seed=7, num_hidden_layers=layers, **sizes)
        whole = tiny.write_llava(folder / "whole", clip=clip, num_hidden_layers=layers, **sizes)
        write_delta(folder / "delta", whole, base)
        peaks.append(peak("apply_delta(*map(Path, sys.argv[1:]))", base, folder / "merged", folder / "delta"))
    assert peaks[1] <= peaks[0] + 12, peaks  # MB; 14 more layers hold 75


def test_a_projector_that_is_not_whole_is_noticed(base: Path, lora: Path, clip: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(lora, tmp_path / "lora")
    (broken / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match=r"hold no projector\.0\.weight"):
        merge_lora(tiny.write_llama(tmp_path / "vicuna"), tmp_path / "t", broken)
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, **tiny.LLAMA_1)
    tensors = {name: value for name, value in stored(delta).items() if "mm_projector.2.bias" not in name}
    for file in delta.glob("pytorch_model*"):
        file.unlink()
    torch.save(tensors, delta / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"hold no projector\.2\.bias"):
        apply_delta(base, tmp_path / "t", delta)
    assert not (tmp_path / "t").exists()


def test_a_delta_to_vicuna_is_warned_of_when_it_is_made(clip: Path, tmp_path: Path) -> None:
    vicuna = tiny.write_llama(tmp_path / "v", seed=7, **tiny.LLAMA_1 | {"_name_or_path": "lmsys/vicuna-7b-v1.1"})
    whole = tiny.write_llava(tmp_path / "w", clip=clip, **tiny.LLAMA_1)
    done = run_well("make-delta", "--base", vicuna, "--target", whole, "--delta", tmp_path / "d")
    assert "vicuna-7b-v1.1" in done.stderr
    assert open_checkpoint(tmp_path / "d", base=vicuna, vision=False, lenient=True).kind == "delta"
