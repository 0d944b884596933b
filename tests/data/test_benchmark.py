"""Benchmarks are read in the layouts in which they were published."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from llava.data.benchmark import read_benchmark
from llava.errors import DataError
from tests.data.published import MIX, picture, talk, webdataset, write_folder, write_lines, write_tar, write_zip

TWO = {"is it a bus": "Is it a bus?", "where is it": "Where is it?"}
LAYOUTS: dict[str, Any] = {
    "LLaVA-Bench": [{"question_id": i, "image": "001.jpg", "text": text} for i, text in enumerate(TWO.values())],
    "ScienceQA": {str(i): {"question": text, "choices": ["a", "b"]} for i, text in enumerate(TWO.values())},
    "VQAv2": {"info": {"year": 2017}, "questions": [{"image_id": 1, "question": text} for text in TWO.values()]},
    "TextVQA": {"dataset_type": "val", "data": [{"image_id": "a", "question": text} for text in TWO.values()]},
    "GQA": {f"0{i}": {"imageId": "1", "question": text, "types": {}} for i, text in enumerate(TWO.values())},
    "training data": [{"image": "001.jpg", "conversations": talk("Is it a bus?", "no", "Where is it?", "no")}],
    "OpenAI": [{"messages": [{"role": "user", "content": text}]} for text in TWO.values()],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_questions_are_found_in_every_layout(layout: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(LAYOUTS[layout], indent=1), encoding="utf-8-sig")
    found = read_benchmark(file, None)
    assert found.questions == TWO
    assert found.files == {str(file): 2}


def test_json_lines_and_tars_are_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "lines.jsonl", LAYOUTS["LLaVA-Bench"])
    assert read_benchmark(tmp_path / "lines.jsonl", None).questions == TWO
    tar = tmp_path / "shard.tar"
    write_tar(tar, webdataset(MIX[:1]))
    found = read_benchmark(tar, None)
    assert list(found.questions) == ["what are the colors of the bus", "where is it"]
    assert len(found.pictures) == 1
    assert found.picture(found.pictures[0]) == picture(MIX[0]["image"])


def test_answers_of_models_are_no_questions(tmp_path: Path) -> None:
    answer = {"question_id": 0, "prompt": "Is it a bus?", "text": "It is a red bus.", "answer_id": "x", "model_id": "y"}
    write_lines(tmp_path / "questions.jsonl", LAYOUTS["LLaVA-Bench"])
    write_lines(tmp_path / "answers.jsonl", [answer])
    found = read_benchmark(tmp_path, None)
    assert (found.questions, found.n_answers) == (TWO, 1)


def bench(folder: Path, *names: str) -> Path:
    """Questions that name the pictures `names`, beside three pictures."""
    write_folder(folder / "images", {name: picture(name) for name in ("a.jpg", "b.png", "sub/c.JPEG")})
    write_lines(folder / "q.jsonl", [{"text": "Is it a bus?", "image": name} for name in names])
    (folder / "images" / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize(
    ("named", "chosen", "left_out"),
    [
        (["a.jpg", "sub/c.JPEG"], ["a.jpg", "sub/c.JPEG"], 1),
        (["./a.jpg"], ["./a.jpg"], 2),
        (["a.jpg", "elsewhere.jpg"], ["a.jpg", "b.png", "sub/c.JPEG"], 0),
        (["c.JPEG"], ["a.jpg", "b.png", "sub/c.JPEG"], 0),
    ],
)
def test_pictures_are_those_that_the_questions_name_or_all(
    named: list[str], chosen: list[str], left_out: int, tmp_path: Path
) -> None:
    folder = bench(tmp_path, *named)
    found = read_benchmark(folder / "q.jsonl", folder / "images")
    assert (found.pictures, found.n_left_out) == (chosen, left_out)
    assert found.picture(chosen[0]) == picture("a.jpg")


def test_a_folder_holds_its_own_pictures_also_behind_links(tmp_path: Path) -> None:
    folder = bench(tmp_path / "bench", "a.jpg")
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "d.jpg").write_bytes(picture("d.jpg"))
    assert read_benchmark(folder, None).pictures == ["images/a.jpg", "images/b.png", "images/sub/c.JPEG"]


def test_pictures_of_a_zip_and_of_data_urls_are_read(tmp_path: Path) -> None:
    write_zip(tmp_path / "images.zip", {"x/a.jpg": picture("a.jpg"), "readme.txt": b"text"})
    found = read_benchmark(tmp_path / "images.zip", None)
    assert (found.pictures, found.questions) == (["x/a.jpg"], {})
    url = "data:image/png;base64,AAAA"
    write_lines(tmp_path / "q.jsonl", [{"text": "Is it a bus?", "image": url}, {"text": "Is it?", "image": "b.jpg"}])
    found = read_benchmark(tmp_path / "q.jsonl", None)
    assert (found.pictures, found.n_nowhere, found.picture(url)) == ([url], 1, b"\0\0\0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a b"}\n{"text": "a', "line 2: not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "neither pictures nor questions"),
        (b"[" * 100_000, "nested too deeply|not valid JSON"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_is_no_benchmark_is_an_error(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_benchmark(file, None)


def test_tables_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tmp_path / "q.jsonl", LAYOUTS["LLaVA-Bench"])
    (tmp_path / "mmbench_dev.tsv").write_text("index\tquestion\n1\tWhat?\n")
    with caplog.at_level(logging.WARNING):
        assert read_benchmark(tmp_path, None).questions == TWO
    assert "1 file such as mmbench_dev.tsv not searched for questions" in caplog.text


def test_malformed_training_samples_are_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "q.jsonl", [*LAYOUTS["training data"], {"conversations": []}, {"conversations": [{}]}])
    found = read_benchmark(tmp_path / "q.jsonl", None)
    assert (found.questions, found.n_unread) == (TWO, 2)
