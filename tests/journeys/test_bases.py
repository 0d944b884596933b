"""Bases on the command line: a missing one is named, a wrong one refused."""

from pathlib import Path
from typing import Any

import pytest

import llava
from tests import tiny
from tests.asking import answer, opened
from tests.command import Command, refused, run_well
from tests.expected import assert_same, stored, summed
from tests.tiny import PIECES


def test_a_missing_base_is_named_with_the_command(
    command: Command, lora: Path, delta: Path, clip: Path, tmp_path: Path
) -> None:
    projector = tiny.write_projector(tmp_path / "p", clip=clip)
    for folder, base in ((lora, "lmsys/vicuna-13b-v1.3"), (projector, "lmsys/vicuna-7b-v1.3"), (delta, "llama-7b")):
        told = refused(command("ask", "Hi", "--model", folder, fails=True), base, f"--model {folder}", "llava ask ")
        assert told.split("--base ")[-1].split()[0].endswith(base if folder != delta else "b")
        refused(command("convert", folder, tmp_path / "out", fails=True), base, "--base")
        assert not (tmp_path / "out").exists()


OTHERS: dict[str, dict[str, Any]] = {
    "width": {"hidden_size": 32, "intermediate_size": 172},
    "layers": {"num_hidden_layers": 3},
    "mlp": {"intermediate_size": 128},
    "vocabulary": {"vocab_size": PIECES + 9},
    "key/value heads": {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_a_base_that_cannot_fit_is_refused(
    command: Command, lora: Path, delta: Path, tmp_path: Path, what: str, kind: str
) -> None:
    base = tiny.write_llama(tmp_path / "base", seed=7, **{**tiny.LLAMA_1, **OTHERS[what]})
    folder, tool = {"lora": (lora, "merge-lora"), "delta": (delta, "apply-delta")}[kind]
    refused(command("ask", "Hi", "--model", folder, "--base", base, "--max-new-tokens", 1, fails=True), "base")
    line = (tool, "--base", base, "--target", tmp_path / "T", f"--{kind}", folder)
    refused(command(*line, fails=True), "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_base_of_another_architecture_is_refused(command: Command, lora: Path, delta: Path, tmp_path: Path) -> None:
    base = tiny.write_mpt(tmp_path / "mpt")
    for folder in (lora, delta):
        refused(command("ask", "Hi", "--model", folder, "--base", base, "--max-new-tokens", 1, fails=True), "mpt")


@pytest.mark.parametrize(
    "said_so",
    [
        {"_name_or_path": "lmsys/vicuna-7b-v1.1"},
        {"_name_or_path": "meta-llama/Llama-2-7b-hf"},
        {"max_position_embeddings": 4096},
        {"rms_norm_eps": 1e-05},
    ],
    ids=["Vicuna", "Llama 2", "positions", "eps"],
)
def test_a_delta_is_kept_off_vicuna_and_llama_2_unless_forced(
    command: Command, delta: Path, tmp_path: Path, said_so: dict[str, Any]
) -> None:
    base = tiny.write_llama(tmp_path / "raw-llama-1", seed=7, **{**tiny.LLAMA_1, **said_so})
    line = ("apply-delta", "--base", base, "--target", tmp_path / "T", "--delta", delta)
    told = refused(command(*line, fails=True), "--force")
    assert str(next(iter(said_so.values()))) in told  # the evidence
    assert not list(tmp_path.glob("T*"))
    with pytest.raises(llava.LlavaError):
        opened(delta, base=base)
    forced = command(*line, "--force")
    assert_same(stored(tmp_path / "T"), summed(stored(base), stored(delta)))
    assert len(forced.warnings) == 1  # continues with a warning
    assert forced.lines == []
    assert answer(opened(delta, base=base, force=True)) == answer(opened(tmp_path / "T"))


@pytest.mark.parametrize("kind", ["lora", "projector"])
def test_a_differing_recorded_name_is_one_line(
    command: Command, lora: Path, clip: Path, vicuna: Path, tmp_path: Path, kind: str
) -> None:
    folder = lora if kind == "lora" else tiny.write_projector(tmp_path / "p", clip=clip)
    other = tiny.write_llama(tmp_path / "vicuna-13b-v1.3", _name_or_path="lmsys/vicuna-13b-v1.5")
    line = ("ask", "Hi", "--model", folder, "--max-new-tokens", 1, "--base")
    said = command(*line, other)
    assert len(said.warnings) == 1
    assert "\n" not in said.warnings[0]
    assert "vicuna-13b-v1.5" in said.warnings[0]
    assert "v1.3" in said.warnings[0]
    if kind == "lora":
        assert command(*line, vicuna).warnings == []
        done = run_well("merge-lora", "--base", other, "--target", tmp_path / "T", "--lora", lora)
        assert len(done.stderr.splitlines()) == 1
        assert "vicuna-13b-v1.5" in done.stderr
