"""Data files: every published form, and files that cannot be read."""

import json
from pathlib import Path

import pytest

from llava.data import records
from llava.data.samples import Samples
from llava.errors import DataError
from tests.data.published import LCS, MIX, SETS, expected, write_json, write_lines


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("form", ["array", "indented", "escaped", "lines", "byte-order-mark"])
def test_published_sets_are_read_in_every_form(name: str, form: str, tmp_path: Path) -> None:
    data = SETS[name]
    if form == "lines":
        file = write_lines(tmp_path / "data.jsonl", data)
    else:
        options = {"indented": {"indent": 2}, "escaped": {"ensure_ascii": True}}.get(form, {"ensure_ascii": False})
        file = write_json(tmp_path / "data.json", data, **options)
    if form == "byte-order-mark":
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + b"\n \n")
    assert list(Samples([file], None)) == expected(data)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_block_size_does_not_change_the_samples(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BLOCK", block)
    file = write_json(tmp_path / "data.json", MIX, ensure_ascii=False, indent=1)
    assert list(Samples([file], None)) == expected(MIX)


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "cut-off": (json.dumps(MIX)[:-40], r"truncated after 7 samples, at character \d+"),
    "cut-between": ("[" + json.dumps(LCS[0]) + ",", r"truncated after 1 sample,"),
    "no-comma": (f"[{json.dumps(LCS[0])} {json.dumps(LCS[1])}]", r"after 1 sample, .*found '\{', expected ',' or '\]'"),
    "trailing-text": (json.dumps(LCS) + "x", "unexpected text after the end of the array"),
    "empty-list": ("[]", "contains no samples"),
    "empty": ("", "contains no samples"),
    "a-dictionary": (json.dumps({"images": [], "annotations": {}}, indent=1), "neither a JSON array nor JSON lines"),
    "text": ("id,image,text\n", "neither a JSON array nor JSON lines"),
    "deep": ("[" * 100_000, "broken or truncated after 0 samples"),
    "latin-1": ('[{"id": "ü"}]'.encode("latin-1"), "not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_broken_file_is_a_one_line_error(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    file = tmp_path / "data.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message) as caught:
        Samples([file], None)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_line_does_not_affect_the_others(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(LCS[0])}\n\n{json.dumps(LCS[1])[:-9]}\n")
    samples = Samples([file], None)
    assert len(samples) == 2
    with pytest.raises(DataError, match=r"sample 1: not valid JSON .*expected one sample"):
        samples[1]
