"""`llava data convert`: ShareGPT's and OpenAI's layouts to LLaVA's JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.data import records
from llava.data.check import check
from llava.data.convert import convert
from llava.data.samples import Samples
from llava.errors import DataError
from tests.command import assert_one_line_error, run, run_well
from tests.data.published import GOOD, MIX, expected, picture, talk, write_folder, write_json, write_lines
from tests.data.test_layouts import TEXT, UNSUPPORTED, asked, chat, url

OPENAI = [
    asked(url("a.png"), TEXT) | {"id": "x", "score": 1},
    {"messages": chat("q", "a", "r", "b", system="Be brief.")},
]
SHAREGPT = [
    {"id": "x", "images": ["a.png"], "conversations": GOOD, "score": 1},
    {"system": "Be brief.", "conversations": talk("q", "a", "r", "b")},
]
LLAVA = [
    {"id": "x", "image": "a.png", "conversations": GOOD, "score": 1},
    {"id": "1", "conversations": [{"from": "system", "value": "Be brief."}, *talk("q", "a", "r", "b")]},
]
DATA: dict[Any, list[Any]] = {"openai": OPENAI, "sharegpt": SHAREGPT}


def read(file: Path) -> Any:
    text = file.read_text(encoding="utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("layout", DATA)
@pytest.mark.parametrize(("given", "wanted"), [("json", "jsonl"), ("jsonl", "json"), ("jsonl", "txt"), ("json", "txt")])
def test_converted_data_equals_the_same_data_in_llavas_layout(
    layout: Any, given: str, wanted: str, tmp_path: Path
) -> None:
    file = (write_json if given == "json" else write_lines)(tmp_path / f"in.{given}", DATA[layout])
    out = tmp_path / f"out.{wanted}"
    done = convert(file, out, layout=layout)
    assert (done.samples, done.converted, done.with_pictures, done.lost) == (2, 2, 1, [])
    assert read(out) == LLAVA
    assert out.read_text().startswith("[") == ((given if wanted == "txt" else wanted) == "json")
    images = write_folder(tmp_path / "images", {"a.png": picture("a.png")})
    assert check(out, images, workers=0).clean
    assert Samples([out], None)[0] == Samples([file], None)[0]


def test_other_keys_of_turns_are_kept(tmp_path: Path) -> None:
    turns = [turn | {"name": f"n{i}"} for i, turn in enumerate(chat("q", "a", system="Be brief."))]
    convert(write_json(tmp_path / "in.json", [{"messages": turns}]), tmp_path / "out.json", layout="openai")
    assert read(tmp_path / "out.json")[0]["conversations"] == [
        {"from": role, "value": text, "name": f"n{i}"}
        for i, (role, text) in enumerate([("system", "Be brief."), ("human", "q"), ("gpt", "a")])
    ]


def test_llavas_own_data_stays_the_same(tmp_path: Path) -> None:
    convert(write_json(tmp_path / "in.json", MIX), tmp_path / "out.json", layout="sharegpt")
    assert list(Samples([tmp_path / "out.json"], None)) == expected(MIX)


def test_a_long_array_is_converted_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "BLOCK", 1 << 10)
    file = write_json(tmp_path / "in.json", [one | {"id": i} for i in range(300) for one in OPENAI], indent=1)
    assert convert(file, tmp_path / "out.jsonl", layout="openai").converted == 600
    assert [sample["id"] for sample in read(tmp_path / "out.jsonl")] == [i for i in range(300) for _ in range(2)]


def test_nothing_is_written_if_a_sample_would_be_lost_unless_that_is_allowed(tmp_path: Path) -> None:
    bad = [{"id": name} | value for name, (value, _) in UNSUPPORTED.items()]
    file = write_lines(tmp_path / "in.jsonl", [*bad, SHAREGPT[0], OPENAI[0], {"conversations": []}])
    out = tmp_path / "out.json"
    counts = f"{len(bad)} unsupported, 1 layout, 1 malformed"
    with pytest.raises(DataError, match=rf"{len(bad) + 2} of {len(bad) + 3} cannot be converted \({counts}\).*video"):
        convert(file, out, layout="sharegpt")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    done = convert(file, out, layout="sharegpt", drop=True)
    assert read(out) == LLAVA[:1]
    assert [lost.sample for lost in done.lost] == [*range(len(bad)), len(bad) + 1, len(bad) + 2]
    for lost, (_, named) in zip(done.lost, UNSUPPORTED.values(), strict=False):
        assert named in lost.text
    assert "convert it with --from openai" in done.lost[-2].text


def test_the_command_reports_what_it_converts_and_what_it_cannot(tmp_path: Path) -> None:
    file = write_json(tmp_path / "in.json", OPENAI)
    done = run_well("data", "convert", file, tmp_path / "out.json", "--from", "openai")
    assert "out.json: 2 samples, 1 with pictures" in done.stdout
    assert_one_line_error(run("data", "convert", file, tmp_path / "out.json", "--from", "openai"), "already exists")

    file = write_json(tmp_path / "bad.json", [*OPENAI, asked({"type": "video", "video": "0.mp4"}) | {"id": "v7"}])
    out = tmp_path / "kept.json"
    assert_one_line_error(
        run("data", "convert", file, out, "--from", "openai"), "sample 2 (id v7)", "video", "add --drop"
    )
    assert not out.exists()
    report = json.loads(run_well("data", "convert", file, out, "--from", "openai", "--drop", "--json").stdout)
    assert (report["samples"], report["converted"]) == (3, 2)
    assert [(lost["sample"], lost["kind"]) for lost in report["lost"]] == [(2, "unsupported")]
    assert read(out) == LLAVA


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "broken or truncated"),
        ('{"a": 1}\n{', "cannot be converted"),
        ("", "no sample can be converted"),
    ],
)
def test_a_broken_file_leaves_nothing_behind(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "in.json"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        convert(file, tmp_path / "out.json", layout="openai")
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]
