"""`llava data check`: the report, token figures, the repaired copy, and the command."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import llava
from llava.config import IGNORE
from llava.data.check import check
from llava.data.measure import Measure, open_measure
from llava.data.repair import RULES
from llava.errors import DataError, LlavaError
from llava.formats.tokenizer import load_tokenizer
from llava.preprocess.inputs import Preprocessor
from tests import tiny
from tests.command import PROJECT, assert_one_line_error, run, run_well
from tests.data.published import (
    GOOD,
    INSTRUCT,
    LCS,
    MIX,
    SEVERAL,
    expected,
    names_of,
    picture,
    talk,
    webdataset,
    write_folder,
    write_json,
    write_lines,
    write_tar,
    write_zip,
)
from tests.data.test_repair import REPAIRED


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def planted() -> tuple[list[Any], dict[str, set[int]]]:
    """Samples with planted problems, and the indices of each kind."""
    good = [*MIX, *SEVERAL, *LCS]
    image = "gqa/images/2354786.jpg"
    long = talk("<image>\nq", *["a b c"] * 41)
    bad: list[tuple[Any, str]] = [
        ({"id": "b13", "video": "13.mp4", "conversations": talk("<video>\nq", "a")}, "unsupported"),
        ({"id": "b0", "conversations": []}, "malformed"),
        ("text", "malformed"),
        (MIX[2], "repeated"),
        ({"id": "b1", "image": "gqa/images/none.jpg", "conversations": GOOD}, "missing_picture"),
        ({"id": "b2", "image": "../outside.jpg", "conversations": GOOD}, "missing_picture"),
        ({"id": "b3", "image": "cut.jpg", "conversations": GOOD}, "broken_picture"),
        ({"id": "b4", "image": "text.jpg", "conversations": GOOD}, "broken_picture"),
        ({"id": "b5", "image": image, "conversations": [{"from": "gpt", "value": "hi"}, *GOOD]}, "leading_answer"),
        ({"id": "b6", "image": image, "conversations": [*GOOD, *talk("r")]}, "trailing_question"),
        ({"id": "b7", "image": image, "conversations": [*GOOD, {"from": "gpt", "value": "b"}]}, "same_side_twice"),
        ({"id": "b8", "image": image, "conversations": [*GOOD, *talk("", "b")], "score": 0.5}, "empty_turn"),
        ({"id": "b9", "image": image, "conversations": talk("q", "a")}, "missing_placeholder"),
        ({"id": "b10", "conversations": GOOD}, "no_picture"),
        ({"id": "b11", "image": image, "conversations": talk("q", "a", "<image>\nr", "b")}, "late_placeholder"),
        ({"id": "b12", "image": image, "conversations": long}, "too_long"),
        ({"id": "b14", "image": [image, image], "conversations": GOOD}, "missing_placeholder"),
        ({"id": "b15", "image": image, "conversations": talk("<image>\n<image>\nq", "a")}, "surplus_placeholder"),
    ]
    data: list[Any] = list(good)
    where: dict[str, set[int]] = {}
    for i, (value, kind) in enumerate(bad):
        index = len(data) if kind == "repeated" else min(2 * i, len(data))
        data.insert(index, value)
        where = {k: {n + (n >= index) for n in indices} for k, indices in where.items()}
        where.setdefault(kind, set()).add(index)
    return data, where


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {name: picture(name) for name in names_of([*MIX, *SEVERAL, *LCS])}
    complete = picture("cut.jpg")
    files |= {"cut.jpg": complete[: len(complete) - 60], "text.jpg": b"no picture"}
    root = write_folder(tmp_path_factory.mktemp("pictures") / "images", files)
    (root.parent / "outside.jpg").write_bytes(complete)
    return root


def counted(measure: Measure, value: dict[str, Any]) -> tuple[int, int]:
    return measure(expected([value])[0], [])


def measure_of(tokenizer: Path, **options: Any) -> Measure:
    return open_measure(tokenizer, None, template=None, **{"limit": 220, "picture_tokens": 30} | options)  # type: ignore


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_the_report_is_exact_and_the_fixed_copy_is_clean(
    form: str, images: Path, tokenizer: Path, tmp_path: Path
) -> None:
    data, where = planted()
    file = tmp_path / f"data.{form}"
    (write_json if form == "json" else write_lines)(file, data)
    clean = tmp_path / f"clean.{form}"
    measure = measure_of(tokenizer)
    report = check(file, images, measure=measure, fix=clean, workers=0)

    found: dict[str, set[int]] = {}
    for finding in report.findings:
        found.setdefault(finding.kind, set()).add(finding.sample)
    assert found == where
    assert report.problems == {kind: len(indices) for kind, indices in where.items()}
    assert (report.samples, report.text_only, report.with_pictures, report.unread) == (29, 2, 24, 3)
    assert report.sources == {
        **{"coco/": 2, "text only": 2, "ocr_vqa/": 1, "textvqa/": 1, "vg/": 2, "no folder": 3, "<number>/": 2},
        **{"gqa/": 12, "../": 1},
    }
    assert report.turns == {2: 18, 3: 3, 4: 4, 42: 1}
    assert report.repeated_ids == 1
    assert report.fixed is not None
    fixed = report.fixed
    assert (fixed.kept, fixed.repaired, fixed.dropped, fixed.left) == (21, 9, 8, 1)
    done = {change.sample: change.action for change in fixed.changes}
    assert set(done) == {index for indices in where.values() for index in indices}
    assert {i for i, action in done.items() if action == "left"} == where["unsupported"]
    lost = ("malformed", "repeated", "missing_picture", "broken_picture", "no_picture")
    assert {i for i, action in done.items() if action == "dropped"} == {i for kind in lost for i in where[kind]}

    again = check(clean, images, measure=measure, workers=0)
    assert again.problems == {"unsupported": 1}
    assert again.samples == 21
    text = clean.read_text(encoding="utf-8")
    assert text.startswith("[") == (form == "json")
    cleaned = json.loads(text) if form == "json" else [json.loads(line) for line in text.splitlines()]
    assert [sample for sample in data if sample in cleaned] == [*[s for s in cleaned if s in data], MIX[2]]
    repaired_ids = {f"b{n}" for n in (5, 6, 7, 8, 9, 11, 12, 14, 15)}
    assert {sample["id"] for sample in cleaned if sample not in data} == repaired_ids
    assert next(sample for sample in cleaned if sample["id"] == "b8")["score"] == 0.5
    assert counted(measure, next(sample for sample in cleaned if sample["id"] == "b12"))[0] <= 220
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_pictures_that_lose_transparency_or_values_are_reported_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGBA", (20, 20)).save(folder / "logo.png")
    Image.new("F", (20, 20), 1000).save(folder / "depth.tiff")
    Image.new("I;16", (20, 20), 40000).save(folder / "grey.png")
    names = ["logo.png", "depth.tiff", "grey.png"]
    data = [{"id": name, "image": name, "conversations": GOOD} for name in names]
    write_json(tmp_path / "data.json", data)
    report = check(tmp_path / "data.json", folder, fix=tmp_path / "fixed.json", workers=0)
    assert [(finding.kind, finding.id) for finding in report.findings] == [
        ("lossy_picture", "logo.png"),
        ("lossy_picture", "depth.tiff"),
    ]
    assert report.findings[0].text.startswith("logo.png: 100% of its pixels are transparent")
    assert "from the range 1000 to 1000" in report.findings[1].text
    assert json.loads((tmp_path / "fixed.json").read_text()) == data
    done = run("data", "check", tmp_path / "data.json", "--images", folder)
    assert done.returncode == 1
    assert "2 of 3 samples with problems" in done.stdout
    assert "--fix OUT" not in done.stdout  # it would not help
    advised = run("data", "check", tmp_path / "data.json", "--images", folder, "--transparency", "white", "--json")
    assert "transparency" not in advised.stdout
    assert json.loads(advised.stdout)["problems"] == {"lossy_picture": 1}
    told = json.loads(run("data", "check", tmp_path / "data.json", "--images", folder, "--json").stdout)
    assert told["findings"][0]["text"].endswith("white or black, set --transparency white")


def test_literal_placeholders_are_text_in_the_check(tmp_path: Path, tokenizer: Path) -> None:
    value = {"id": "0", "conversations": talk(r"What does the \<image> tag mean?", r"\<image> marks an image.")}
    write_json(tmp_path / "data.json", [value])
    report = check(tmp_path / "data.json", measure=measure_of(tokenizer), workers=0)
    assert report.clean
    assert report.tokens is not None
    assert report.tokens.total < 150


def test_every_kind_of_problem_has_a_test() -> None:
    tested = {kind for _, kinds, _ in REPAIRED for kind in kinds} | set(planted()[1]) | {"refused", "lossy_picture"}
    assert tested == set(RULES)


def test_worker_processes_give_the_same_report(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    data, _ = planted()
    file = write_lines(tmp_path / "data.jsonl", [*data, *({**LCS[0], "id": f"n{i}"} for i in range(200))])
    seen: list[tuple[int, int]] = []
    one = check(file, images, measure=measure_of(tokenizer), workers=0)
    two = check(file, images, measure=measure_of(tokenizer), workers=2, progress=lambda *state: seen.append(state))
    assert two.to_dict() | {"seconds": 0} == one.to_dict() | {"seconds": 0}
    assert [done for done, _ in seen] == [64, 128, 192, 229]


def test_token_figures_equal_those_of_training(tokenizer: Path, tmp_path: Path, checkpoint: Path) -> None:
    """Compared with the preprocessing of training itself, with real pictures and the model's config."""
    data = [MIX[0], MIX[3], SEVERAL[0]]
    files = {name: picture(name) for name in names_of(data)}
    file = write_json(tmp_path / "data.json", data)
    vlm = llava.load(checkpoint, device="cpu")
    preprocessor = Preprocessor(vlm.config, load_tokenizer(checkpoint), template="vicuna_v1")
    inputs = [
        preprocessor.prepare_training(sample.turns, [files[name] for name in sample.images], max_length=2048)
        for sample in expected(data)
    ]
    measure = open_measure(None, str(checkpoint), template="vicuna_v1", limit=2048, picture_tokens=None)
    figures = check(file, write_zip(tmp_path / "i.zip", files), measure=measure, workers=0).tokens
    assert figures is not None
    lengths = [len(input.ids) for input in inputs]
    targets = sum(int((input.labels != IGNORE).sum()) for input in inputs)
    assert (figures.total, figures.longest, figures.median) == (sum(lengths), max(lengths), sorted(lengths)[1])
    assert figures.targets == targets
    assert figures.masked_share == pytest.approx(1 - targets / sum(lengths))


def test_targets_beyond_the_limit_do_not_count(tokenizer: Path) -> None:
    value = {"id": "0", "image": "a.jpg", "conversations": talk("<image>\nq", "one two three four")}
    total, targets = counted(measure_of(tokenizer), value)
    for limit in range(total - targets - 2, total + 2):
        assert counted(measure_of(tokenizer, limit=limit), value) == (
            total,
            max(0, min(targets, limit - total + targets)),
        )
    assert counted(measure_of(tokenizer, picture_tokens=77), value)[0] == total + 47


def test_anyres_tiles_are_counted_by_picture_size(clip: Path, tmp_path: Path) -> None:
    folder = tiny.write_llava(tmp_path / "v16", layout="safetensors-shards", clip=clip, **tiny.ANYRES)
    measure = open_measure(None, str(folder), template="vicuna_v1", limit=2048, picture_tokens=None)
    assert measure is not None
    file = write_json(tmp_path / "data.json", [LCS[0]])
    files = {LCS[0]["image"]: picture("a")}
    report = check(file, write_folder(tmp_path / "images", files), measure=measure, workers=0)

    vlm = llava.load(folder, device="cpu")
    whole = Preprocessor(vlm.config, load_tokenizer(folder), template="vicuna_v1").prepare_training(
        expected(LCS)[0].turns, list(files.values()), max_length=2048
    )
    assert report.tokens is not None
    assert report.tokens.total == len(whole.ids)
    with pytest.raises(DataError, match="specify the location of the pictures"):
        check(file, measure=measure, workers=0)


def test_samples_refused_by_the_template_or_filled_by_a_picture_are_reported(tokenizer: Path, tmp_path: Path) -> None:
    file = write_json(tmp_path / "data.json", [*LCS, INSTRUCT[0]])
    plain = open_measure(tokenizer, None, template="plain", limit=220, picture_tokens=30)
    assert check(file, measure=plain, workers=0).problems == {"refused": 1}
    filled = check(file, measure=measure_of(tokenizer, picture_tokens=300), fix=None, workers=0)
    assert filled.problems == {"nothing_to_learn": 3, "too_long": 3}


def test_the_command_reports_problems_and_fixes_them(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    data, where = planted()
    file, clean = write_json(tmp_path / "data.json", data), tmp_path / "clean.json"
    options = ("--images", images, "--tokenizer", tokenizer, "--max-length", 220, "--image-tokens", 30)
    found = run("data", "check", file, *options, "--json", "--workers", 0)
    assert found.returncode == 1, found.stderr
    report = json.loads(found.stdout)
    assert report["problems"] == {kind: len(indices) for kind, indices in where.items()}
    assert report["clean"] is False
    assert {finding["kind"] for finding in report["findings"]} == set(where)

    fixed = run("data", "check", file, *options, "--fix", clean)
    assert fixed.returncode == 1, fixed.stderr  # one problem is left
    assert "21 samples, 9 repaired, 8 dropped, 1 left with problems" in " ".join(fixed.stdout.split())
    assert "(id b13): left unchanged (unsupported)" in fixed.stdout
    assert "(id b8): repaired (empty turn)" in fixed.stdout
    for kind in where:
        assert kind.replace("_", " ") in " ".join(fixed.stdout.split())
    assert check(clean, images, measure=measure_of(tokenizer), workers=0).problems == {"unsupported": 1}

    one = write_json(tmp_path / "one.json", [{"image": "cut.jpg", "conversations": GOOD}, {**MIX[3], "id": 1}])
    again = run_well("data", "check", one, *options, "--fix", tmp_path / "two.json")
    assert "sample 0 (id 0): dropped (broken picture)" in again.stdout
    assert "two.json: 1 sample, 0 repaired, 1 dropped" in " ".join(again.stdout.split())
    assert "left" not in again.stdout


def test_a_copy_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = write_json(tmp_path / "data.json", LCS)
    tar = write_tar(tmp_path / "a.tar", webdataset(LCS))
    for data, out, message in (
        (file, file, "already exists"),
        (file, tmp_path / "absent" / "out.json", "the parent folder does not exist"),
        (tar, tmp_path / "out.json", "--fix cannot write tars"),
        (file, tmp_path / "out.tar", r"only JSON can be written; choose a .json or .jsonl file for --fix"),
        (file, tmp_path / "out.json.GZ", "only JSON can be written"),
        (write_lines(tmp_path / "bad.jsonl", ["x"]), tmp_path / "out.json", "no samples would remain"),
    ):
        with pytest.raises(DataError, match=message):
            check(data, fix=out, workers=0)
    assert not list(tmp_path.glob("out*"))


def test_free_space_is_checked_before_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_json(tmp_path / "data.json", [LCS[0] | {"text": "x" * 2000}])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    seen: list[int] = []
    with pytest.raises(LlavaError, match="but the disk has only"):
        check(file, fix=tmp_path / "out.json", workers=0, progress=lambda done, total: seen.append(done))
    assert not seen


def test_a_missing_file_is_a_one_line_error(tmp_path: Path) -> None:
    assert_one_line_error(run("data", "check", tmp_path / "absent.json"), "absent.json", "cannot be read")


def test_the_docs_list_every_rule() -> None:
    page = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z ]+) \| .* \| (.*) \|$", page, re.MULTILINE)
    assert {kind.replace(" ", "_"): rule for kind, rule in rows if kind.replace(" ", "_") in RULES} == RULES
