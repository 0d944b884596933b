"""`llava data overlap`: what training data and a benchmark have in common, and the command."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.data.overlap import OverlapOptions, find_overlap
from llava.data.overlap_report import InCommon, Overlap
from llava.errors import ConfigError, DataError
from tests.command import assert_one_line_error, run
from tests.data.published import SHORT, store, talk, webdataset, write_folder, write_json, write_lines, write_tar


def drawing(seed: int, size: tuple[int, int] = (96, 80), format: str = "JPEG") -> bytes:
    """A picture of large spots, the same for the same seed."""
    spots = Image.effect_noise((12, 10), 90)
    spots.putdata([(seed * 7919 + i * i * 104729 + i * seed * 31) % 251 for i in range(120)])
    out = io.BytesIO()
    spots.resize((960, 800), Image.Resampling.BICUBIC).resize(size).convert("RGB").save(out, format)
    return out.getvalue()


def plain() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "gold").save(out, "PNG")
    return out.getvalue()


PICTURES = {f"{i}.jpg": drawing(i) for i in range(6)} | {"plain.png": plain(), "broken.jpg": drawing(9)[:300]}
SAMPLES: list[Any] = [
    {"id": "a", "image": "0.jpg", "conversations": talk(f"<image>\nIs the spot in the middle dark?{SHORT}", "Yes")},
    {"id": "b", "image": "1.jpg", "conversations": talk("Describe the image.\n<image>", "Spots.")},
    {"id": "c", "image": "0.jpg", "conversations": talk("<image>\nHow many spots?", "120", "Is it night?", "No")},
    {"id": "d", "image": ["2.jpg", "3.jpg"], "conversations": talk("<image>\n<image>\nHow many  SPOTS", "240")},
    {"id": "e", "image": "plain.png", "conversations": talk("<image>\nWhich metal is it?", "Gold")},
    {"id": "f", "image": "broken.jpg", "conversations": talk("<image>\nWhich metal is it?", "None")},
    {"id": "g", "image": "none.jpg", "conversations": talk("<image>\nWhich metal is it?", "None")},
    {"id": "h", "conversations": []},
    {"id": "i", "conversations": talk("How many spots?", "None")},
]
QUESTIONS = [
    {"question_id": 0, "text": "how many spots?"},
    {"question_id": 1, "text": "Is the spot in the middle dark?"},
    {"question_id": 2, "text": "Is the spot in the middle bright?"},
    {"question_id": 3, "text": "Describe the image"},
    {"question_id": 4, "text": "What is this?"},
    {"question_id": 5, "text": "How many spots?"},
]


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_json(tmp_path / "train.json", SAMPLES)


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """Two pictures of the training data, in other sizes and formats, and two others."""
    files = {"0.png": drawing(0, (192, 160), "PNG"), "x/3.webp": drawing(3, (72, 60), "WEBP"), "y.png": plain()}
    write_folder(tmp_path / "bench" / "images", files | {"new.jpg": drawing(100)})
    write_lines(tmp_path / "bench" / "questions.jsonl", QUESTIONS)
    return tmp_path / "bench"


def pairs(report: Overlap) -> list[tuple[str, str, list[int]]]:
    return [(pair.bench, pair.train, pair.samples) for pair in report.pictures]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "shards"])
def test_the_report_is_exact(kind: str, train: Path, bench: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    images = store(kind, tmp_path / "store", PICTURES)
    report = find_overlap(train, bench, OverlapOptions(images=images, workers=0))
    assert pairs(report) == [("images/0.png", "0.jpg", [0, 2]), ("images/x/3.webp", "3.jpg", [3])]
    assert report.common_pictures == InCommon(2, 3)
    assert [(pair.question, pair.samples) for pair in report.questions.pairs] == [
        ("how many spots?", [2, 3, 8]),
        ("Is the spot in the middle dark?", [0]),
    ]
    assert report.questions.common == InCommon(2, 3)
    assert report.questions.generic == InCommon(1, 2)
    assert (report.samples, report.unread_samples, report.questions.train) == (9, 1, 9)
    assert report.bench_files == {str(bench / "questions.jsonl"): 6}
    side = report.sides["train"]
    assert (side.pictures, side.hashed, side.plain, set(side.unreadable)) == (
        *(7, 4, ["plain.png"]),
        {"broken.jpg", "none.jpg"},
    )
    side = report.sides["bench"]
    assert (side.pictures, side.hashed, side.plain, side.unreadable) == (4, 3, ["images/y.png"], {})
    assert report.found


def test_workers_change_nothing(bench: Path, tmp_path: Path) -> None:
    samples = [{"id": i, "image": f"{i}.jpg", "conversations": talk("<image>\nq", "a")} for i in range(150)]
    write_json(tmp_path / "many.json", samples)
    write_folder(tmp_path / "images", {f"{i}.jpg": drawing(i) for i in range(149)})
    options = {"images": tmp_path / "images"}
    reports = [find_overlap(tmp_path / "many.json", bench, OverlapOptions(**options, workers=n)) for n in (0, 2)]  # type: ignore[arg-type]
    assert reports[0] == reports[1]
    assert len(reports[0].pictures) == 3
    assert list(reports[0].sides["train"].unreadable) == ["149.jpg"]


def test_training_data_is_compared_with_other_training_data(train: Path, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "shard.tar", webdataset([{"id": 1, "conversations": talk("Is it night?", "No")}]))
    report = find_overlap(tar, train, OverlapOptions())
    assert [pair.samples for pair in report.questions.pairs] == [[0]]
    images = write_folder(tmp_path / "images", PICTURES)
    report = find_overlap(train, train, OverlapOptions(images=images, bench_images=images))
    assert [(one, other) for one, other, _ in pairs(report)] == [(f"{i}.jpg", f"{i}.jpg") for i in range(4)]


def test_distance_zero_finds_only_equal_hashes(train: Path, bench: Path, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", PICTURES | {"0.jpg": drawing(0, (192, 160), "PNG")})
    report = find_overlap(train, bench, OverlapOptions(images=images, distance=0))
    assert [(one, other) for one, other, _ in pairs(report)] == [("images/0.png", "0.jpg")]
    with pytest.raises(ConfigError, match="distance is 65"):
        OverlapOptions(distance=65)


def test_pictures_of_which_none_can_be_read_are_an_error(train: Path, bench: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none of 7 pictures can be read"):
        find_overlap(train, bench, OverlapOptions(images=tmp_path / "empty"))


def test_training_data_of_which_nothing_can_be_read_is_an_error(bench: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "q.json", QUESTIONS)
    with pytest.raises(DataError, match=r"none of 6 samples can be read; the first: .*q\.json, sample 0"):
        find_overlap(tmp_path / "q.json", bench, OverlapOptions())


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_exits_with_1_if_there_is_overlap(train: Path, bench: Path, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", PICTURES)
    shown = run("data", "overlap", train, bench, "--images", images, "--out", tmp_path / "report.json")
    assert (shown.returncode, shown.stderr) == (1, "")
    text = " ".join(shown.stdout.split())
    assert "pictures in common 2 of 3 (66.7 %), in 3 samples" in text
    assert "questions in common 2 of 3 (66.7 %)" in text
    assert "training data: 2 pictures not compared, unreadable: broken.jpg" in text
    assert "benchmark: 1 picture not compared, too plain to be told apart: images/y.png" in text
    listed = run("data", "overlap", train, bench, "--images", images, "--json")
    assert listed.returncode == 1
    value = json.loads(listed.stdout)
    assert value == json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert value["pictures"]["pairs"][0] | {"distance": 0} == {
        "bench": "images/0.png",
        "train": "0.jpg",
        "distance": 0,
        "samples": [0, 2],
    }
    assert (value["pictures"]["count"], value["pictures"]["of"], value["overlap"]) == (2, 3, True)


def test_without_images_only_questions_are_compared(train: Path, tmp_path: Path) -> None:
    bench = write_lines(tmp_path / "q.jsonl", [{"text": "Is it a whale?"}, {"text": "Describe the image"}])
    shown = run("data", "overlap", train, bench)
    assert (shown.returncode, shown.stderr) == (0, "")
    text = " ".join(shown.stdout.split())
    assert "pictures in common none to compare training data: 7 pictures not compared; specify --images" in text
    assert "questions in common 0 of 1 (0.0 %) apart from generic ones, such as “Describe the image”: 1 of 1" in text


def test_names_need_not_be_valid_unicode(bench: Path, tmp_path: Path) -> None:
    os.rename(bench / "images" / "0.png", os.fsencode(bench / "images") + b"/\xff.png")
    sample = {"id": 1, "image": "0.jpg", "conversations": talk("<image>\nIst das schön?", "Nein")}
    write_json(tmp_path / "one.json", [sample])
    images = write_folder(tmp_path / "images", {"0.jpg": drawing(0)})
    for option in ((), ("--json",)):
        done = run("data", "overlap", tmp_path / "one.json", bench, "--images", images, *option)
        assert (done.returncode, done.stderr) == (1, "")
        assert "images/\\udcff.png" in done.stdout


def test_a_wrong_call_is_one_line(train: Path, bench: Path, tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("mine")
    done = run("data", "overlap", train, bench, "--out", tmp_path / "there.json")
    assert_one_line_error(done, "there.json: already exists")
    assert (tmp_path / "there.json").read_text() == "mine"
    assert_one_line_error(run("data", "overlap", train, tmp_path / "nothing"), "nothing: does not exist")
    assert_one_line_error(run("data", "overlap", tmp_path / "nothing", bench), "nothing")
    assert run("data", "overlap", train, bench, "--distance", "65").returncode == 2
