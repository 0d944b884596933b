"""`llava apply-delta` and `llava make-delta`: exact results, layout, resuming, and deltas applied while loading."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.asking import answer, asked, opened
from tests.command import Command, refused
from tests.expected import MARKS, V0, V11, assert_same, stored, summed, without_rotary
from tests.tiny import PIECES


@pytest.mark.parametrize(
    "flags", [("--base", "--target", "--delta"), ("--base-model-path", "--target-model-path", "--delta-path")]
)
def test_the_documented_line_makes_the_model(raw: Path, delta: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    argv = [sys.executable, "-m", "llava.model.apply_delta"]
    for flag, value in zip(flags, (raw, tmp_path / "T", delta), strict=True):
        argv += [flag, str(value)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same(stored(tmp_path / "T"), summed(stored(raw), stored(delta)))
    assert [path.name for path in tmp_path.iterdir()] == ["T"]


@pytest.mark.parametrize("v0", [False, True])
def test_a_target_has_the_originals_layout(command: Command, raw: Path, clip: Path, tmp_path: Path, v0: bool) -> None:
    tokens = ("[PAD]", *MARKS) if v0 else MARKS  # 32004 rows as in the 7B v0, 32003 as in v1.1
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, added=tokens, **(V0 if v0 else V11))
    target = tmp_path / "T"
    target.mkdir()  # an empty folder is accepted
    said = command("apply-delta", "--base", raw, "--target", target, "--delta", delta, "--shard-gb", "1e-4")
    found = stored(target)
    assert_same(found, summed(stored(raw), stored(delta)))
    assert len(found["lm_head.weight"]) == PIECES + len(tokens)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files == sorted(path.name for path in target.glob("*.safetensors"))
    for file in files:
        assert {name for name, held in index["weight_map"].items() if held == file} == set(load_file(target / file))
        assert hashlib.sha256((target / file).read_bytes()).hexdigest() in said.out
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (delta, target))
    assert {key for key in before if before[key] != after.get(key)} <= {"torch_dtype"}
    assert after["architectures"] == ["LlamaForCausalLM" if v0 else "LlavaLlamaForCausalLM"]
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        assert (target / name).read_bytes() == (delta / name).read_bytes()
    assert not (tmp_path / "T.partial").exists()


def test_a_13b_v0_has_a_token_more_than_rows(raw: Path, clip: Path, tmp_path: Path, command: Command) -> None:
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, added=MARKS, **V0)
    tiny.write_tokenizer(delta, added=(*MARKS, "[PAD]"), legacy=None, bos="</s>", pad="[PAD]", blank=True)
    on_the_way = opened(delta, base=raw)
    assert on_the_way.prepare(asked(None)).ids[0] == 2  # BOS is </s> in these tokenizer files
    command("apply-delta", "--base", raw, "--target", tmp_path / "T", "--delta", delta)
    assert len(stored(tmp_path / "T")["model.embed_tokens.weight"]) == PIECES + 3
    assert answer(opened(tmp_path / "T")) == answer(on_the_way)
    replies = on_the_way.generate_batch(
        ["Once upon a time", "Red"], max_new_tokens=4
    )  # the batch is padded, and [PAD] has no row
    assert [len(reply.token_ids) for reply in replies] == [4, 4]


@pytest.mark.parametrize("kind", ["a file in it", "a file", "partial of somebody"])
def test_a_used_target_stays_unchanged(command: Command, raw: Path, delta: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "T"
    held = {"a file in it": target / "notes.txt", "a file": target}.get(kind, tmp_path / "T.partial" / "notes.txt")
    held.parent.mkdir(exist_ok=True)
    held.write_text("mine")
    said = command("apply-delta", "--base", raw, "--target", target, "--delta", delta, fails=True)
    refused(said, "T")
    assert held.read_text() == "mine"
    assert not list(tmp_path.rglob("*.safetensors"))


LARGE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}


LARGE |= {"num_key_value_heads": 8, "num_hidden_layers": 6, **tiny.LLAMA_1}


@pytest.fixture(scope="module")
def large(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a delta that are large enough to kill a merge halfway."""
    place = tmp_path_factory.mktemp("large")
    base = tiny.write_llama(place / "large", seed=7, **LARGE)
    config = tiny.llava_config(**LARGE, mm_projector_type="linear", mm_vision_tower=str(clip))
    under = tiny.llama_tensors(config, 7, inv_freq=True)
    apart = {name: value - under[name] for name, value in tiny.llama_tensors(config, 1, inv_freq=True).items()}
    apart |= tiny.projector_tensors(config, 1)
    folder = tiny.write_tokenizer(place / "large-delta")
    return base, tiny.write_model(folder, apart, "bin-shards", config)


def test_after_sigkill_the_same_command_resumes(large: tuple[Path, Path], tmp_path: Path, command: Command) -> None:
    base, delta = large
    target, partial = tmp_path / "T", tmp_path / "T.partial"
    line = ["--base", base, "--target", target, "--delta", delta, "--shard-gb", "0.001"]
    argv = [sys.executable, "-m", "llava.model.apply_delta", *map(str, line)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(list(partial.glob("*.safetensors"))) < 4 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not target.exists()
    left = {path.name: path.stat() for path in partial.glob("*.safetensors")}
    assert len(left) >= 4
    other = tiny.write_llama(tmp_path / "other", seed=8, **LARGE)
    refused(
        command("apply-delta", *line, "--base", other, fails=True), "T.partial"
    )  # the inputs of two merges are not mixed
    said = command("apply-delta", *line)
    assert not partial.exists()
    assert_same(stored(target), summed(stored(base), stored(delta)))
    after = {path.name: path.stat() for path in target.glob("*.safetensors")}
    kept = [name for name, was in left.items() if name in after and after[name].st_mtime_ns == was.st_mtime_ns]
    assert len(kept) >= len(left) - 1  # the shard that was being written is written again
    assert len(kept) < len(after)
    sums = (target / "SHA256SUMS").read_text().splitlines()
    assert {row.split()[-1] for row in sums} == set(after)
    for row in sums:
        assert hashlib.sha256((target / row.split()[-1]).read_bytes()).hexdigest() == row.split()[0]
        assert row.split()[0] in said.out


def test_verify_says_so_and_precise_sums_round_to_the_same_bits(
    command: Command, raw: Path, delta: Path, tmp_path: Path
) -> None:
    line = ["apply-delta", "--base", raw, "--delta", delta, "--verify"]
    assert "verified" in command(*line, "--target", tmp_path / "T").out
    command(*line, "--target", tmp_path / "P", "--precise")
    # float32 has more than twice the bits of float16 plus two, so rounding twice changes nothing
    assert_same(stored(tmp_path / "P"), stored(tmp_path / "T"))
    known = json.loads(command(*line, "--target", tmp_path / "J", "--json").out)
    assert isinstance(known, dict)


def test_metas_own_files_are_a_base_too(
    command: Command, raw: Path, delta: Path, tmp_path: Path, picture: Path
) -> None:
    meta = tiny.write_meta(tmp_path / "LLaMA" / "7B", shards=2, seed=7, **tiny.LLAMA_1)
    command("apply-delta", "--base", meta, "--target", tmp_path / "T", "--delta", delta)
    assert_same(stored(tmp_path / "T"), summed(stored(raw), stored(delta)))
    assert answer(opened(delta, base=meta), picture) == answer(opened(delta, base=raw), picture)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_of_another_type_is_summed_in_float16(command: Command, delta: Path, tmp_path: Path, dtype: str) -> None:
    base = tiny.write_llama(tmp_path / "base", seed=7, torch_dtype=dtype, **tiny.LLAMA_1)
    command("apply-delta", "--base", base, "--target", tmp_path / "T", "--delta", delta)
    assert_same(stored(tmp_path / "T"), summed(stored(base), stored(delta)))


def test_a_delta_made_is_the_difference_and_gives_the_model_back(
    command: Command, raw: Path, clip: Path, tmp_path: Path
) -> None:
    model = tiny.write_llava(tmp_path / "model", clip=clip, added=MARKS, **V11)
    command("make-delta", "--base", raw, "--target", model, "--delta", tmp_path / "D")
    under, whole, found = stored(raw), without_rotary(stored(model)), without_rotary(stored(tmp_path / "D"))
    assert set(found) == set(whole)
    for name, value in found.items():
        expected = whole[name].half().clone()
        if name in under:
            expected[: len(under[name])] -= under[name].half()
        assert torch.equal(value, expected), name
    command("apply-delta", "--base", raw, "--target", tmp_path / "T", "--delta", tmp_path / "D")
    assert_same(stored(tmp_path / "T"), summed(under, found))
    assert answer(opened(tmp_path / "T")) == answer(opened(tmp_path / "D", base=raw))
    assert (tmp_path / "D" / "tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()


def test_a_delta_is_applied_while_loading_and_leaves_no_copy(
    command: Command, raw: Path, delta: Path, tmp_path: Path, picture: Path
) -> None:
    before = sorted(path for folder in (raw, delta) for path in folder.iterdir())
    pair = opened(delta, base=raw)
    command("apply-delta", "--base", raw, "--target", tmp_path / "T", "--delta", delta)
    whole = opened(tmp_path / "T")
    assert torch.equal(pair.logits(asked(picture)), whole.logits(asked(picture)))
    assert sorted(path for folder in (raw, delta) for path in folder.iterdir()) == before


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlavaLlamaForCausalLM"])
def test_architectures_as_published_or_upgraded(raw: Path, clip: Path, tmp_path: Path, architecture: str) -> None:
    upgraded = architecture.startswith("Llava")
    config = V0 | {"architectures": [architecture], "model_type": "llava" if upgraded else "llama"}
    delta = tiny.write_delta(tmp_path / "x", clip=clip, added=("[PAD]", *MARKS), **config)
    tiny.write_tokenizer(delta, added=("[PAD]", *MARKS), legacy=None, pad="[PAD]", blank=True)
    vlm = opened(delta, base=raw)
    prompt = vlm.prepare(asked(None)).prompt
    assert "###" in prompt  # llava_v0
    assert PIECES + 2 not in vlm.prepare(asked(None)).ids


def test_start_and_end_tokens_surround_a_picture_and_their_white_space_is_optional(
    raw: Path, delta: Path, picture: Path
) -> None:
    start, end = PIECES + 1, PIECES + 2
    plain = opened(delta, base=raw).prepare(asked(picture)).token_ids
    at = plain.index(-200)
    assert plain[at - 1 : at + 2] == [start, -200, end]
    stripped = opened(delta, base=raw, legacy_strip=True).prepare(asked(picture)).token_ids
    assert len(stripped) < len(plain)
    assert 13 not in stripped[stripped.index(end) :][:3]
