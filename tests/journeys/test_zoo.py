"""`llava zoo` and the licence notes of `llava inspect`, compared with the reference catalogue."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import llava
from tests import rows, tiny
from tests.command import Command, refused

Entry = dict[str, Any]


def entries(shared: Path) -> list[Entry]:
    reference = json.loads((shared / "reference" / "zoo.json").read_text())
    return [*reference["entries"], *reference["extra_entries"]]


def test_zoo_lists_the_reference_cell_by_cell(command: Command, shared: Path) -> None:
    listed = json.loads(command("zoo", "--json").out)
    assert listed == entries(shared)
    assert all(next(iter(entry)) == "id" for entry in listed)
    packaged = Path(llava.__file__).parent / "zoo" / "zoo.json"
    assert json.loads(packaged.read_text()) == json.loads((shared / "reference" / "zoo.json").read_text())


def test_zoos_tables_show_every_row_with_its_cells(command: Command, shared: Path) -> None:
    lines = command("zoo").out.splitlines()
    for entry in entries(shared):
        row = next(line.split() for line in lines if line.split()[:1] == [entry["id"]])
        for source in entry.get("source_rows", []):
            if source["table"].startswith("seed"):
                for cell in source["cells"].values():
                    assert set(str(cell).split()) <= set(row), (entry["id"], cell)


@pytest.mark.parametrize(
    ("option", "text", "key"),
    [
        ("--base-llm", "Vicuna-13B-v1.3", "base_llm"),
        ("--format", "delta", "format"),
        ("--format", "projector", "format"),
        ("--format", "lora", "format"),
        ("--vision-encoder", "CLIP-L-336px", "vision_encoder"),
    ],
)
def test_zoo_is_filtered(command: Command, shared: Path, option: str, text: str, key: str) -> None:
    found = [entry["id"] for entry in json.loads(command("zoo", option, text, "--json").out)]
    assert found == [entry["id"] for entry in entries(shared) if text.lower() in str(entry.get(key)).lower()]
    shown = command("zoo", option, text).out
    assert all(id in shown for id in found)


def test_zoo_is_filtered_by_data(command: Command, shared: Path) -> None:
    found = {entry["id"] for entry in json.loads(command("zoo", "--data", "CC-595K", "--json").out)}
    assert found == {entry["id"] for entry in entries(shared) if entry.get("pretrain_data") == "CC-595K"}


def test_zoo_show_prints_everything_about_every_row(command: Command, shared: Path) -> None:
    for entry in entries(shared):
        id = entry["id"]
        shown = command("zoo", "show", id).out
        words = set(shown.replace(",", " ").split())
        assert id in words
        for score in (entry.get("scores") or {}).values():
            assert str(score) in words, (id, score)
        if conversation := entry.get("conversation"):
            assert all(text in " ".join(shown.split()) for text in conversation.values() if text), id
        assert "image mode" in shown, id
        assert "licence" in shown.lower(), id
        if note := entry.get("license_note"):
            assert note in " ".join(shown.split()), id
        repo = id.split("#")[0]
        assert f"hf download {repo}" in shown, id
        known = json.loads(command("zoo", "show", id, "--json").out)
        assert {key: known[key] for key in entry} == entry
        purposes = {line["for"] for line in known["commands"]}
        assert {"fetch", "ask"} <= purposes, id
        assert ("merge" in purposes) == (entry["format"] in ("lora", "delta")), id
        if entry["format"] in ("lora", "delta", "projector"):
            base = [line["command"] for line in known["commands"] if "--base" in line["command"]]
            assert base, id
            assert known["needs"]["base"], id
        for line in known["commands"]:
            assert line["command"] in shown, (id, line)


def test_zoo_show_of_no_row_is_one_line(command: Command) -> None:
    refused(command("zoo", "show", "llava-v2-7b", fails=True), "llava-v2-7b")


def test_zoo_check_recognises_a_row_by_its_files(command: Command, shared: Path, tmp_path: Path) -> None:
    names = ("llava-v1.5-13b-lora", "llava-v1.6-mistral-7b", "LLaVA-13b-delta-v1-1", "llava-v1.6-34b-hf")
    for name in names:
        entry = next(entry for entry in entries(shared) if entry["id"].endswith("/" + name))
        folder = rows.write_headers(tmp_path / f"x{len(name)}-mpt", entry)
        found = json.loads(command("zoo", "check", folder, "--json").out)
        assert [match["id"] for match in found["candidates"]] == [entry["id"]]
        shown = command("zoo", "check", folder).out
        assert entry["id"] in shown
        assert "config.json" in shown
        shutil.rmtree(folder)


def test_zoo_check_of_another_folder_names_the_nearest_and_what_differs(command: Command, next_: Path) -> None:
    shown = command("zoo", "check", next_).out
    assert "liuhaotian/llava-v1.6-vicuna-7b" in shown
    assert "width 64" in shown
    assert "4096" in shown


def test_inspect_prints_a_licence_note(command: Command, shared: Path, tmp_path: Path) -> None:
    for name in ("llava-v1.5-7b", "LLaVA-Lightning-MPT-7B-preview", "LLaVA-7b-delta-v0", "llava-v1.5-7b-lora"):
        entry = next(entry for entry in entries(shared) if entry["id"].endswith("/" + name))
        folder = rows.write_headers(tmp_path / f"x{len(name)}", entry)
        if not list(folder.glob("tokenizer*")):
            tiny.write_tokenizer(folder)
        shown = " ".join(command("inspect", folder).out.split())
        assert entry["license_note"] in shown, name
        shutil.rmtree(folder)
