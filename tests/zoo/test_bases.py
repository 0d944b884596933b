"""Bases: a missing one is named, a wrong one is refused or warned about."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.convert.convert import convert, write_gpt_fast
from llava.convert.split import make_delta
from llava.data.measure import open_measure
from llava.errors import CheckpointError
from llava.formats.base_model import comparable_name
from llava.train.start import start
from tests import tiny
from tests.checkpoints import assert_same, opened, refused, tensors_of
from tests.command import assert_one_line_error, run, run_well
from tests.training import Assets, build_assets, recipe


@pytest.fixture
def lora(clip: Path, tmp_path: Path) -> Path:
    return tiny.write_lora(tmp_path / "lora", clip=clip)


@pytest.fixture
def assets(clip: Path, checkpoint: Path, tmp_path: Path) -> Assets:
    return build_assets(tmp_path / "assets", clip, checkpoint)


@pytest.fixture
def delta(clip: Path, tmp_path: Path) -> Path:
    return tiny.write_delta(tmp_path / "delta", clip=clip, **tiny.LLAMA_1)


def test_without_its_base_the_error_names_it_and_the_option(lora: Path, clip: Path, tmp_path: Path) -> None:
    assert "lmsys/vicuna-13b-v1.3" in (message := refused(lora))
    assert "base= (--base)" in message
    message = refused(tiny.write_projector(tmp_path / "projector", clip=clip))
    assert "lmsys/vicuna-7b-v1.3" in message
    assert "base= (--base)" in message
    assert "base= (--base)" in refused(tiny.write_delta(tmp_path / "delta", clip=clip))


@pytest.mark.parametrize("door", ["load", "convert", "gpt-fast", "make_delta", "data check", "train"])
def test_every_door_names_the_base_that_the_catalogue_knows(door: str, delta: Path, assets: Assets) -> None:
    """A delta records no base; the catalogue finds it by the sizes of the delta."""
    out = delta.with_name("out")
    doors: dict[str, Callable[[], object]] = {
        "load": lambda: llava.load(delta),
        "convert": lambda: convert(delta, out),
        "gpt-fast": lambda: write_gpt_fast(delta, out),
        "make_delta": lambda: make_delta(delta, assets.llama, out),
        "data check": lambda: open_measure(None, str(delta), template=None, picture_tokens=None, limit=1000),
        "train": lambda: start(recipe(assets, out, model=str(delta)), out),
    }
    with pytest.raises(CheckpointError, match=r"the nearest in the zoo"):
        doors[door]()
    assert not out.exists()


@pytest.mark.parametrize(
    "sizes",
    [{"hidden_size": 128}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 100}],
    ids=str,
)
def test_a_base_of_other_sizes_is_refused(lora: Path, clip: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    other = tiny.write_llama(tmp_path / "other", **sizes)
    for folder in (
        lora,
        tiny.write_projector(tmp_path / "projector", clip=clip),
        tiny.write_delta(tmp_path / "delta", clip=clip),
    ):
        assert str(other) in refused(folder, base=other)


def test_a_folder_that_is_no_base_is_refused(lora: Path, clip: Path, base: Path, checkpoint: Path) -> None:
    assert "not a language model" in refused(lora, base=lora)
    assert "not a language model" in refused(lora, base=clip)
    assert "needs no base" in refused(checkpoint, base=base)
    assert "the base is neither" in refused(lora, base="no/such/folder")


def test_the_commands_take_a_base(lora: Path, base: Path, tmp_path: Path) -> None:
    asked = run("ask", "--model", lora, "--base", base, "--max-new-tokens", "3", "Hello")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()
    done = run("convert", lora, tmp_path / "out", "--base", base, "--verify")
    assert "verified bit by bit" in done.stdout, done.stderr


def test_the_folders_names_do_not_matter(clip: Path, base: Path, tmp_path: Path) -> None:
    lora = tiny.write_lora(tmp_path / "llava-lora", clip=clip)
    renamed, other = tmp_path / "x", tmp_path / "y"
    shutil.copytree(lora, renamed)
    shutil.copytree(base, other)
    assert_same(tensors_of(opened(renamed, base=other)), tensors_of(opened(lora, base=base)))


NOT_RAW = {
    "_name_or_path = lmsys/vicuna-13b-v1.3": tiny.LLAMA_1 | {"_name_or_path": "lmsys/vicuna-13b-v1.3"},
    "_name_or_path = ./Llama-2-7b-hf": tiny.LLAMA_1 | {"_name_or_path": "./Llama-2-7b-hf"},
    "4096 positions": tiny.LLAMA_1 | {"max_position_embeddings": 4096},
    "rms_norm_eps = 1e-05": tiny.LLAMA_1 | {"rms_norm_eps": 1e-05},
}


@pytest.mark.parametrize("evidence", NOT_RAW)
def test_a_delta_does_not_load_on_vicuna_or_llama_2(delta: Path, tmp_path: Path, evidence: str, caplog: Any) -> None:
    base = tiny.write_llama(tmp_path / "llama-1-raw", seed=7, **NOT_RAW[evidence])
    message = refused(delta, base=base)
    assert evidence in message
    assert "huggyllama/llama-7b" in message
    assert open_checkpoint(delta, LoadOptions(base=base, force=True)).format == "delta"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert evidence in caplog.text


@pytest.mark.parametrize(
    "config", [{}, {"max_position_embeddings": tiny.ABSENT, "max_sequence_length": 2048}], ids=["new", "old"]
)
def test_a_delta_loads_on_the_raw_llama_under_any_folder_name(delta: Path, tmp_path: Path, config: Any) -> None:
    base = tiny.write_llama(tmp_path / "vicuna-7b-v1.5", seed=7, **tiny.LLAMA_1 | config)
    assert open_checkpoint(delta, LoadOptions(base=base)).format == "delta"


def test_a_delta_does_not_load_on_a_llava(delta: Path, checkpoint: Path) -> None:
    assert "describes a LLaVA" in refused(delta, base=checkpoint)


def test_force_continues_with_one_line_of_warning_on_the_command_line(delta: Path, tmp_path: Path) -> None:
    base = tiny.write_llama(tmp_path / "base", seed=7)
    options = ("ask", "Hello", "--model", delta, "--base", base, "--max-new-tokens", 2)
    assert_one_line_error(run(*options), "4096 positions", "--force")
    done = run_well(*options, "--force")
    assert done.stderr.count("\n") == 1
    assert "4096 positions" in done.stderr


@pytest.mark.parametrize("kind", ["lora", "projector"])
def test_a_base_with_another_recorded_name_is_one_line_of_warning(
    kind: str, clip: Path, tmp_path: Path, caplog: Any
) -> None:
    name = "lmsys/vicuna-13b-v1.3"
    write: Any = {"lora": tiny.write_lora, "projector": tiny.write_projector}[kind]
    folder = write(tmp_path / "x", clip=clip, **({"base": name} if kind == "lora" else {"_name_or_path": name}))
    open_checkpoint(
        folder, LoadOptions(base=tiny.write_llama(tmp_path / "vicuna-13b-v1.3", _name_or_path="lmsys/vicuna-13b-v1.5"))
    )
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for text in ("lmsys/vicuna-13b-v1.3", "lmsys/vicuna-13b-v1.5", "_name_or_path"):
        assert text in record.getMessage()


@pytest.mark.parametrize(
    "own",
    [
        tiny.ABSENT,
        "vicuna-13b-v1.3",
        "./checkpoints/vicuna-13b-v1-3/",
        "/a/models--lmsys--Vicuna_13B.v1.3/snapshots/ab",
    ],
    ids=str,
)
def test_a_base_with_the_same_name_in_other_letters_is_no_warning(
    lora: Path, tmp_path: Path, own: Any, caplog: Any
) -> None:
    open_checkpoint(lora, LoadOptions(base=tiny.write_llama(tmp_path / "other", _name_or_path=own)))
    assert not caplog.records


def test_names_compare_by_their_last_part() -> None:
    assert comparable_name("meta-llama/Llama-2-7b-chat-hf") == comparable_name("llama_2_7B_chat")
    assert comparable_name("lmsys/vicuna-13b-v1.3") != comparable_name("lmsys/vicuna-13b-v1.5")


def test_a_base_that_cannot_fit_is_refused(lora: Path, delta: Path, clip: Path, tmp_path: Path) -> None:
    eight = tiny.write_llama(tmp_path / "8", num_attention_heads=8, num_key_value_heads=8)
    assert "architecture mpt" in refused(lora, base=tiny.write_mpt(tmp_path / "mpt"))
    assert "n_heads is 8" in refused(lora, base=eight)
    mpt = tiny.write_mpt(tmp_path / "mpt-llava", clip=clip)
    on_meta = refused(tiny.write_mpt_lora(tmp_path / "mpt-lora", base=mpt), base=tiny.write_meta(tmp_path / "meta"))
    assert "has architecture llama" in on_meta
    assert "pass mosaicml/mpt-7b-chat" in on_meta
    shared_heads = tiny.write_llama(tmp_path / "2", num_key_value_heads=2)
    assert "pass the base model of this LoRA" in refused(lora, base=shared_heads)
    assert "600 vocabulary" in refused(lora, base=tiny.write_llama(tmp_path / "600", vocab_size=600))
    assert "has format delta" in refused(lora, base=delta)
    assert "has format lora" in refused(delta, base=lora)


def test_a_llava_hf_folder_is_a_base_of_a_lora_and_a_projector_but_not_of_a_delta(
    lora: Path, delta: Path, clip: Path, checkpoint: Path, tmp_path: Path
) -> None:
    hf = tmp_path / "hf"
    convert(checkpoint, hf, to="llava-hf", check=False)
    projector = tiny.write_projector(tmp_path / "projector", clip=clip)
    for folder in (lora, projector):
        found, expected = opened(folder, base=hf), opened(folder, base=checkpoint)
        assert found.config.image == expected.config.image
        for name, tensor in expected.tensors.items():
            assert torch.equal(found.tensors[name].read()[: tensor.shape[0]], tensor.read()), name
    assert "raw LLaMA-1" in refused(delta, base=hf)


def test_a_merged_llava_is_a_base_of_a_lora(lora: Path, checkpoint: Path) -> None:
    assert open_checkpoint(lora, LoadOptions(base=checkpoint)).format == "lora"
