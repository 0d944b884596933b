"""The catalogue of published checkpoints and `llava zoo`, which prints it."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from llava.zoo import catalogue as zoo
from tests.command import assert_one_line_error, run, run_well

LORA = "llava-v1-0719-336px-lora-vicuna-13b-v1.3"


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
    assert json.loads(run_well("zoo", "--base-llm", "gpt-2", "--json").stdout) == []


@pytest.mark.parametrize(
    ("ours", "theirs"), [("llava", "merged"), ("LLaVA-hf", "hf-reexport"), ("reexport", "hf-reexport")]
)
def test_a_format_is_found_under_our_name_and_under_the_catalogues(ours: str, theirs: str) -> None:
    assert zoo.select(format=ours) == [entry for entry in zoo.entries() if entry["format"] == theirs] != []


def test_an_unknown_format_is_refused_with_the_words_that_exist() -> None:
    for word in ("merged", "hf-reexport", "lora", "llava-hf"):
        assert_one_line_error(run("zoo", "--format", "gguf"), word)


@pytest.mark.parametrize("id", [entry["id"] for entry in zoo.entries()])
def test_an_entry_has_the_commands_to_download_and_run_it(id: str) -> None:
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
