"""The catalogue and its commands; bases: named where they are missing, refused where they are others."""

import json
import logging
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import llava
from llava.checkpoint import zoo
from llava.checkpoint.identify import identify
from llava.checkpoint.inspect import describe
from llava.checkpoint.open import look, open_checkpoint
from llava.checkpoint.traits import recorded_name
from llava.cli import app
from llava.convert.native import convert
from tests import rows, tiny
from tests.command import assert_one_line_error, run, run_well

LORA = "llava-v1-0719-336px-lora-vicuna-13b-v1.3"


def said(*args: object) -> str:
    """What `llava ARGS` prints, run in this process."""
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    return done.stdout


# ------------------------------------------------------------------------------------------------- catalogue


def test_the_catalogue_is_the_reference_cell_by_cell(shared: Path) -> None:
    reference = json.loads((shared / "reference" / "zoo.json").read_text())
    assert zoo.entries() == reference["entries"] + reference["extra_entries"]


def test_the_tables_hold_every_row_once_with_all_its_cells() -> None:
    shown = {line[0]: dict(zip(table.columns, line[1:], strict=True)) for table in zoo.tables(zoo.entries())
             for line in table.lines}  # fmt: skip
    assert sorted(shown) == sorted(entry["id"] for entry in zoo.entries())
    for entry in zoo.entries():
        for row in entry.get("source_rows", []):
            assert {name: str(cell) for name, cell in row["cells"].items()} == shown[entry["id"]]


def test_zoo_prints_the_tables_and_with_json_the_entries() -> None:
    text, listed = run_well("zoo").stdout, json.loads(run_well("zoo", "--json").stdout)
    assert listed == zoo.entries()
    assert all(next(iter(entry)) == "id" for entry in listed)
    for entry in listed:
        assert f"{entry['id']} " in text
    for title in ("LLaVA-v1.6", "LLaVA-v1.5", "LLaVA-v1\n", "Projector weights", "Science QA Checkpoints"):
        assert title in text.replace(" \n", "\n").replace("  ", "") or title in text


@pytest.mark.parametrize(
    ("options", "key", "text", "n"),
    [
        ({"base_llm": "VICUNA-13b"}, "base_llm", "vicuna-13b", 14),
        ({"format": "delta"}, "format", "delta", 5),
        ({"vision_encoder": "336PX"}, "vision_encoder", "336px", 16),
        ({"data": "scienceqa"}, "finetune_data", "scienceqa", 2),
        ({"data": "cc-595k"}, "pretrain_data", "cc-595k", 7),
    ],
    ids=str,
)
def test_a_filter_keeps_the_rows_whose_cell_holds_the_text(options: Any, key: str, text: str, n: int) -> None:
    kept = zoo.select(**options)
    assert kept == [entry for entry in zoo.entries() if text in str(entry.get(key) or "").lower()]
    assert len(kept) == n


def test_filters_narrow_each_other_down_and_an_empty_list_is_one() -> None:
    found = json.loads(run_well("zoo", "--base-llm", "vicuna-7b v1.5", "--format", "lora", "--json").stdout)
    assert [entry["id"] for entry in found] == ["liuhaotian/llava-v1.5-7b-lora"]
    assert json.loads(run_well("zoo", "--format", "gguf", "--json").stdout) == []


@pytest.mark.parametrize("id", [entry["id"] for entry in zoo.entries()])
def test_an_entry_tells_how_to_fetch_and_run_it(id: str) -> None:
    entry = zoo.find(id)
    lines = [line for _, line in zoo.commands(entry)]
    assert lines[0].startswith(f"hf download {id.split('#')[0]} ")
    ask = next(shlex.split(line) for line in lines if line.startswith("llava ask"))
    assert ("--base" in ask) == (zoo.base_id(entry) is not None) == (entry["format"] in ("lora", "delta", "projector"))
    merging = {"delta": "llava apply-delta", "lora": "llava merge-lora"}.get(entry["format"])
    assert [line for line in lines if line.startswith(("llava apply-delta", "llava merge-lora"))] != [] or not merging
    tower, inside = zoo.tower(entry), entry.get("vision_tower_in_checkpoint") is True
    assert (tower is None) == (inside or entry["format"] == "hf-reexport")
    assert tower is None or f"hf download {tower}" in lines
    assert dict(zoo.facts(entry))["licence"]


def test_show_takes_an_id_or_its_last_part_and_names_near_ones() -> None:
    shown = run_well("zoo", "show", LORA).stdout
    for text in ("lmsys/vicuna-13b-v1.3", "openai/clip-vit-large-patch14-336", "64.3", "llava merge-lora", "llava_v1"):
        assert text in shown
    whole = json.loads(run_well("zoo", "show", f"liuhaotian/{LORA}", "--json").stdout)
    assert whole["id"] == f"liuhaotian/{LORA}"
    assert whole["needs"]["base"] == "lmsys/vicuna-13b-v1.3"
    assert any(line["command"].startswith("llava ask ") for line in whole["commands"])
    assert_one_line_error(run("zoo", "show", "llava-v1.5-8b"), "llava-v1.5-8b", "liuhaotian/llava-v1.5-7b")


# ------------------------------------------------------------------------------------------ what a folder is


def test_check_tells_the_row_with_its_evidence_whatever_the_folder_is_called(tmp_path: Path) -> None:
    folder = rows.write_headers(tmp_path / "llava-v1.6-34b", zoo.find("llava-v1.5-7b"))
    text = said("zoo", "check", folder)
    assert "liuhaotian/llava-v1.5-7b\n" in text
    assert "tensors: width 4096" in text
    found = json.loads(run_well("zoo", "check", folder, "--json").stdout)
    assert [match["id"] for match in found["candidates"]] == ["liuhaotian/llava-v1.5-7b"]
    assert found["evidence"]["projector"]["value"] == "mlp2x_gelu"


def test_check_lists_all_rows_that_files_do_not_tell_apart(tmp_path: Path) -> None:
    folder = rows.write_headers(tmp_path / "x", zoo.find("llava-pretrain-vicuna-7b-v1.3"))
    tiny.edit_json(folder / "config.json", _name_or_path=tiny.ABSENT)
    names = {match.entry["id"] for match in identify(look(folder)).candidates}
    assert {"liuhaotian/llava-pretrain-vicuna-7b-v1.3", "liuhaotian/llava-pretrain-llama-2-7b-chat"} <= names


def test_check_says_of_another_folder_which_row_is_nearest_and_what_differs(checkpoint: Path) -> None:
    text = said("zoo", "check", checkpoint)
    assert "none of the zoo's" in text
    assert "liuhaotian/llava-v1.5-7b\n" in text
    assert "tensors: width 64; the row has 4096" in text


def test_inspect_tells_the_base_models_licence(tmp_path: Path) -> None:
    folder = rows.write_headers(tmp_path / "x", zoo.find(LORA))
    assert any("LLaMA, non-commercial" in note for note in describe(folder).licences)
    assert "base LLM licence (LLaMA, non-commercial)" in said("inspect", folder)


# -------------------------------------------------------------------------------------------------- bases


@pytest.fixture
def lora(clip: Path, tmp_path: Path) -> Path:
    return tiny.write_lora(tmp_path / "lora", clip=clip)


@pytest.fixture
def delta(clip: Path, tmp_path: Path) -> Path:
    return tiny.write_delta(tmp_path / "delta", clip=clip, **tiny.LLAMA_1)


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(llava.LlavaError) as error:
        open_checkpoint(path, **options)
    return str(error.value)


NOT_RAW = {
    "_name_or_path = lmsys/vicuna-13b-v1.3": tiny.LLAMA_1 | {"_name_or_path": "lmsys/vicuna-13b-v1.3"},
    "_name_or_path = ./Llama-2-7b-hf": tiny.LLAMA_1 | {"_name_or_path": "./Llama-2-7b-hf"},
    "4096 positions": tiny.LLAMA_1 | {"max_position_embeddings": 4096},
    "rms_norm_eps = 1e-05": tiny.LLAMA_1 | {"rms_norm_eps": 1e-05},
}


@pytest.mark.parametrize("evidence", NOT_RAW)
def test_a_delta_is_not_put_on_vicuna_or_llama_2(delta: Path, tmp_path: Path, evidence: str, caplog: Any) -> None:
    base = tiny.write_llama(tmp_path / "llama-1-raw", seed=7, **NOT_RAW[evidence])
    message = refused(delta, base=base)
    assert evidence in message
    assert "huggyllama/llama-7b" in message
    assert open_checkpoint(delta, base=base, lenient=True).kind == "delta"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert evidence in caplog.text


@pytest.mark.parametrize(
    "config", [{}, {"max_position_embeddings": tiny.ABSENT, "max_sequence_length": 2048}], ids=["new", "old"]
)
def test_a_delta_is_put_on_the_raw_llama_whatever_its_folder_is_called(
    delta: Path, tmp_path: Path, config: Any
) -> None:
    base = tiny.write_llama(tmp_path / "vicuna-7b-v1.5", seed=7, **tiny.LLAMA_1 | config)
    assert open_checkpoint(delta, base=base).kind == "delta"


def test_a_delta_is_not_put_on_a_llava(delta: Path, checkpoint: Path) -> None:
    assert "describes a LLaVA" in refused(delta, base=checkpoint)


def test_force_goes_on_with_one_line_of_warning_on_the_command_line(delta: Path, tmp_path: Path) -> None:
    base = tiny.write_llama(tmp_path / "base", seed=7)
    options = ("ask", "Hello", "--model", delta, "--base", base, "--max-new-tokens", 2)
    assert_one_line_error(run(*options), "4096 positions", "--force")
    done = run_well(*options, "--force")
    assert done.stderr.count("\n") == 1
    assert "4096 positions" in done.stderr


@pytest.mark.parametrize("kind", ["lora", "projector"])
def test_a_base_of_another_recorded_name_is_warned_of_in_one_line(
    kind: str, clip: Path, tmp_path: Path, caplog: Any
) -> None:
    name = "lmsys/vicuna-13b-v1.3"
    write: Any = {"lora": tiny.write_lora, "projector": tiny.write_projector}[kind]
    folder = write(tmp_path / "x", clip=clip, **({"base": name} if kind == "lora" else {"_name_or_path": name}))
    open_checkpoint(folder, base=tiny.write_llama(tmp_path / "vicuna-13b-v1.3", _name_or_path="lmsys/vicuna-13b-v1.5"))
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
def test_a_base_of_the_same_name_in_other_letters_is_not_warned_of(
    lora: Path, tmp_path: Path, own: Any, caplog: Any
) -> None:
    open_checkpoint(lora, base=tiny.write_llama(tmp_path / "other", _name_or_path=own))
    assert not caplog.records


def test_names_compare_by_their_last_part() -> None:
    assert recorded_name("meta-llama/Llama-2-7b-chat-hf") == recorded_name("llama_2_7B_chat")
    assert recorded_name("lmsys/vicuna-13b-v1.3") != recorded_name("lmsys/vicuna-13b-v1.5")


def test_a_base_that_can_not_fit_is_refused(lora: Path, delta: Path, clip: Path, tmp_path: Path) -> None:
    eight = tiny.write_llama(tmp_path / "8", num_attention_heads=8, num_key_value_heads=8)
    assert "architecture mpt" in refused(lora, base=tiny.write_mpt(tmp_path / "mpt"))
    assert "n_heads is 8" in refused(lora, base=eight)
    assert "not the base" in refused(lora, base=tiny.write_llama(tmp_path / "2", num_key_value_heads=2))
    assert "vocabulary of 600" in refused(lora, base=tiny.write_llama(tmp_path / "600", vocab_size=600))
    assert "of kind delta" in refused(lora, base=delta)
    assert "of kind lora" in refused(delta, base=lora)


def test_a_reexport_for_transformers_is_no_base(lora: Path, checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "hf", to="hf", check=False)
    assert "llava convert" in refused(lora, base=tmp_path / "hf")


def test_a_merged_llava_is_a_base_of_a_lora(lora: Path, checkpoint: Path) -> None:
    assert open_checkpoint(lora, base=checkpoint).kind == "lora"


def test_padding_side_and_trained_length_are_kept(clip: Path, tmp_path: Path) -> None:
    facts = {"tokenizer_padding_side": "left", "tokenizer_model_max_length": 1024}
    folder = tiny.write_llava(tmp_path / "llava", clip=clip, **facts)
    convert(folder, tmp_path / "native", check=False)
    convert(tmp_path / "native", tmp_path / "original", to="original", check=False, vision_tower=clip)
    written = json.loads((tmp_path / "original" / "config.json").read_text())
    assert {key: written[key] for key in facts} == facts
    plain = tiny.write_llava(tmp_path / "plain", clip=clip)
    assert torch.equal(llava.load(folder).logits("Hi"), llava.load(plain).logits("Hi"))


def test_an_mpt_without_model_type_is_looked_at_too(clip: Path, tmp_path: Path) -> None:
    folder = tiny.write_mpt(tmp_path / "mpt", clip=clip)
    tiny.edit_json(folder / "config.json", model_type=tiny.ABSENT)
    assert identify(look(folder)).traits["architecture"].value == "mpt"
