"""Training data: every published form, every store of pictures, what is broken, and what the check says of it."""

import io
import json
import multiprocessing
import pickle
import random
import re
import tarfile
import zipfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.config import IGNORE
from llava.data import records
from llava.data.check import check
from llava.data.measure import Measure, open_measure
from llava.data.pictures import open_pictures
from llava.data.repair import RULES, faults, mended
from llava.data.samples import Sample, Samples
from llava.errors import DataError
from llava.formats.tokenizer import load_tokenizer
from llava.preprocess.conversation import Turn
from llava.preprocess.inputs import Preprocessor
from tests import tiny
from tests.command import PROJECT, assert_one_line_error, run, run_well

SHORT = "\nAnswer the question using a single word or phrase."
OPTIONS = "Options: (A) yes (B) no"


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


LCS = [
    {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": talk("Render a clear and concise summary of the photo.\n<image>", "select luxury furniture 3"),
    },
    {"id": "002239345", "image": "00223/002239345.jpg", "conversations": talk("<image>\nWhat is this?", "a dog | cat")},
]
CC = [
    {
        "id": "GCC_train_002582585",
        "image": "GCC_train_002582585.jpg",
        "conversations": talk(
            "Provide a brief description of the given image.\n<image>", "olive oil is a healthy one ."
        ),
    }
]
INSTRUCT = [
    {
        "id": "000000033471",
        "image": "000000033471.jpg",
        "conversations": talk(
            "<image>\nWhat are the colors of the bus?", "White and red.", "Where is it?", "In a bay."
        ),
    },
    {"id": "000000033471", "image": "000000033471.jpg", "conversations": talk("Describe it.\n<image>", "A bus – old.")},
]
MIX = [
    *({**sample, "image": f"coco/train2017/{sample['image']}"} for sample in INSTRUCT),
    {"id": "2354786", "image": "gqa/images/2354786.jpg", "conversations": talk(f"<image>\nIs it red?{SHORT}", "No")},
    {"id": "wgByO4Y_0", "model": "", "conversations": talk("Wie heißt du? 你好 \U0001f642", "Ich bin ein Modell.")},
    {
        "id": "0321713",
        "image": "ocr_vqa/images/0321713.jpg",
        "conversations": talk("<image>\nTitle?", "Dune", "By?", "H"),
    },
    {"id": "a1", "image": "textvqa/train_images/a1.jpg", "conversations": talk("<image>\nCaption?", "A sign.")},
    {"id": "5", "image": "vg/VG_100K/5.jpg", "conversations": talk("<image>\nRegion?", "[0.1, 0.2, 0.3, 0.4]")},
    {"id": "6", "image": "vg/VG_100K_2/6.jpg", "conversations": talk("<image>\nRegion?", "A hat")},
]
SQA = [
    {
        "id": "1",
        "image": "1/image.png",
        "conversations": talk(f"Context: N/A\nWhich?\n{OPTIONS}\n<image>", "LECTURE: L\n\n###\nANSWER: A."),
    },
    {"id": "2", "image": None, "conversations": talk(f"Context: hot\nIs it?\n{OPTIONS}", "The answer is B.")},
    {"id": 3, "conversations": talk(f"Context: cold\nIs it?\n{OPTIONS}", "The answer is A.")},
]
SETS = {"lcs558k": LCS, "cc595k": CC, "instruct": INSTRUCT, "mix665k": MIX, "scienceqa": SQA}
SEVERAL = [{"id": "s", "image": ["a.png", "b.png"], "conversations": talk("<image> or <image>?", "The first.")}]


def picture(name: str) -> bytes:
    out = io.BytesIO()
    noise = Image.frombytes("RGB", (12, 8), random.Random(name).randbytes(12 * 8 * 3))
    noise.save(out, "PNG" if name.endswith(".png") else "JPEG")
    return out.getvalue()


def names_of(data: list[dict[str, Any]]) -> list[str]:
    images = [sample.get("image") for sample in data]
    flat = [name for image in images for name in (image if isinstance(image, list) else [image])]
    return sorted({name for name in flat if name})


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(file: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for i, (name, data) in enumerate(files.items()):
            archive.writestr(name, data, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2])
    return file


def write_tar(file: Path, files: Mapping[str, bytes], dot: str = "") -> Path:
    with tarfile.open(file, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(dot + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def write_shards(root: Path, files: Mapping[str, bytes]) -> Path:
    root.mkdir()
    items = list(files.items())
    for i in range(2):
        write_tar(root / f"{i:05}.tar", dict(items[i::2]), dot="./")
    return root


def store(kind: str, root: Path, files: Mapping[str, bytes]) -> Path:
    match kind:
        case "folder":
            return write_folder(root / "images", files)
        case "zip":
            return write_zip(root / "images.zip", files)
        case "tar":
            return write_tar(root / "images.tar", files)
    return write_shards(root / "shards", files)


def write_json(file: Path, data: Any, **options: Any) -> Path:
    file.write_text(json.dumps(data, **options), encoding="utf-8")
    return file


def write_lines(file: Path, data: list[Any]) -> Path:
    file.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in data), encoding="utf-8")
    return file


def expected(data: list[dict[str, Any]]) -> list[Sample]:
    """By hand what the module should read."""
    out = []
    for sample in data:
        roles = {"human": "user", "gpt": "assistant"}
        turns = tuple(Turn(roles[turn["from"]], turn["value"]) for turn in sample["conversations"])
        image = sample.get("image")
        images = tuple(image) if isinstance(image, list) else (image,) if image else ()
        out.append(Sample(str(sample["id"]), turns, images))
    return out


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# Forms


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
def test_where_a_block_of_the_file_ends_changes_nothing(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BLOCK", block)
    file = write_json(tmp_path / "data.json", MIX, ensure_ascii=False, indent=1)
    assert list(Samples([file], None)) == expected(MIX)


def test_lengths_are_words_and_negative_without_picture(tmp_path: Path) -> None:
    odd = [
        {"id": "0", "conversations": []},
        {"id": "1", "image": "x.jpg", "conversations": talk("", "")},
        "no sample",
        {"id": "2", "image": [], "conversations": talk("two\u00a0words", "\u3000three  ")},
    ]
    samples = Samples([write_json(tmp_path / "a.json", MIX), write_lines(tmp_path / "b.jsonl", odd)], None)
    words = [sum(len(turn["value"].split()) for turn in sample["conversations"]) for sample in MIX]
    signs = [1 if "image" in sample else -1 for sample in MIX]
    assert samples.lengths == [n * sign for n, sign in zip(words, signs, strict=True)] + [-1, 1, -1, -3]
    assert all(type(n) is int for n in samples.lengths)


def test_several_files_follow_each_other_and_messages_name_the_right_one(tmp_path: Path) -> None:
    first, second = write_json(tmp_path / "a.json", LCS), write_lines(tmp_path / "b.jsonl", [*SQA, {"id": "x"}])
    samples = Samples([first, second], None)
    assert len(samples) == 6
    assert [samples[i] for i in range(5)] == expected([*LCS, *SQA])
    assert samples[-2] == expected(SQA)[2]
    with pytest.raises(DataError, match=r"b\.jsonl, sample 3 \(id x\): conversations is None"):
        samples[5]
    with pytest.raises(IndexError):
        samples[6]


# Stores of pictures


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "shards"])
@pytest.mark.parametrize("name", SETS)
def test_pictures_come_from_every_store(kind: str, name: str, tmp_path: Path) -> None:
    data = [*SETS[name], *SEVERAL]
    files = {name: picture(name) for name in names_of(data)}
    samples = Samples([write_json(tmp_path / "data.json", data)], store(kind, tmp_path, files))
    assert {name: samples.picture(name) for sample in samples for name in sample.images} == files
    assert samples.picture(f"./{next(iter(files))}") == next(iter(files.values()))


def webdataset(data: list[dict[str, Any]]) -> dict[str, bytes]:
    """KEY.json beside KEY.jpg; the JSON has no image, or one that the tar does not know."""
    files = {}
    for i, sample in enumerate(data):
        bare = {key: value for key, value in sample.items() if key not in ("id", "image")}
        files[f"{i:06}.json"] = json.dumps(bare).encode()
        for j, name in enumerate(names_of([sample])):
            files[f"{i:06}.{j}.jpg" if j else f"{i:06}.jpg"] = picture(name)
    return files


@pytest.mark.parametrize("sharded", [False, True])
def test_a_webdataset_tar_is_a_data_file_by_itself(sharded: bool, tmp_path: Path) -> None:
    data = [*MIX, *SEVERAL]
    files = webdataset(data)
    if sharded:
        (tmp_path / "data").mkdir()
        halves = [{n: d for n, d in files.items() if (n < "000004") == first} for first in (True, False)]
        for i, half in enumerate(halves):
            write_tar(tmp_path / "data" / f"{i}.tar", half)
        samples = Samples([tmp_path / "data"], None)
    else:
        samples = Samples([write_tar(tmp_path / "data.tar", files, dot="./")], None)
    assert [sample.turns for sample in samples] == [sample.turns for sample in expected(data)]
    assert [sample.id for sample in samples] == [f"{i:06}" for i in range(len(data))]
    assert samples[0].images == ("000000.jpg",)
    assert samples[3].images == ()
    assert samples[8].images == ("000008.jpg", "000008.1.jpg")
    assert samples.picture("000000.jpg") == picture(MIX[0]["image"])
    assert [n < 0 for n in samples.lengths] == [not sample.images for sample in samples]


def test_a_member_replaced_in_a_tar_is_the_last_one_and_long_names_work(tmp_path: Path) -> None:
    long = "/".join(["folder" * 10] * 4) + "/ü.jpg"
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": b"old", long: b"long"})
    with tarfile.open(tar, "a") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"new"))
    assert open_pictures(tar).read("a.jpg") == b"new"
    assert open_pictures(tar).read(long) == b"long"


def test_two_tars_with_the_same_name_in_them_are_refused(tmp_path: Path) -> None:
    for shard in ("0.tar", "1.tar"):
        write_tar(tmp_path / shard, {"a.jpg": b"x"})
    with pytest.raises(DataError, match=r"a\.jpg lies in .*0\.tar and in .*1\.tar"):
        open_pictures(tmp_path)


def test_a_folder_with_a_tar_and_folders_is_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train2017/a.jpg": b"a"})
    write_tar(tmp_path / "train2017.tar", {"b.jpg": b"b"})
    assert open_pictures(tmp_path).read("train2017/a.jpg") == b"a"


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "shards"])
def test_samples_go_to_other_processes_and_through_pickle(kind: str, tmp_path: Path) -> None:
    files = {name: picture(name) for name in names_of(MIX)}
    samples = Samples([write_json(tmp_path / "data.json", MIX)], store(kind, tmp_path, files))
    assert [samples.picture(name) for name in files] == list(files.values())  # read before the fork
    copy = pickle.loads(pickle.dumps(samples))
    assert list(copy) == list(samples)
    assert [copy.picture(name) for name in files] == list(files.values())
    method = "spawn" if kind == "zip" else "fork"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        assert list(pool.map(samples.__getitem__, range(len(MIX)))) == expected(MIX)
        assert list(pool.map(samples.picture, [*files] * 4)) == list(files.values()) * 4


# What is broken


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "cut-off": (json.dumps(MIX)[:-40], r"cut off after 7 samples, at character \d+"),
    "cut-between": ("[" + json.dumps(LCS[0]) + ",", "cut off after 1 samples"),
    "no-comma": (f"[{json.dumps(LCS[0])} {json.dumps(LCS[1])}]", r"after 1 samples.*found '\{' instead of , or \]"),
    "text-behind": (json.dumps(LCS) + "x", "more text behind the array's end"),
    "empty-list": ("[]", "holds no samples"),
    "empty": ("", "holds no samples"),
    "a-dictionary": (json.dumps({"images": [], "annotations": {}}, indent=1), "neither a JSON array nor JSON lines"),
    "text": ("id,image,text\n", "neither a JSON array nor JSON lines"),
    "deep": ("[" * 100_000, "broken or cut off after 0 samples"),
    "latin-1": ('[{"id": "ü"}]'.encode("latin-1"), "no UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_broken_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    file = tmp_path / "data.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message) as caught:
        Samples([file], None)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


GOOD = talk("<image>\nq", "a")
BAD_SAMPLES: dict[str, tuple[Any, str]] = {
    "a list": ([], "expected an object"),
    "a number": (float("nan"), "found nan; expected an object"),
    "no conversations": ({"id": "x"}, r"\(id x\): conversations is None"),
    "empty conversations": ({"id": "x", "conversations": []}, r"conversations is \[\]; expected a list of turns"),
    "conversations as text": ({"id": "x", "conversations": "q"}, "conversations is 'q'"),
    "id": ({"id": ["x"], "conversations": GOOD}, r"the id is \['x'\]"),
    "id NaN": ({"id": float("nan"), "conversations": GOOD}, "the id is nan"),
    "image NaN": ({"id": "x", "image": float("nan"), "conversations": GOOD}, "image is nan; expected a name"),
    "image empty": ({"id": "x", "image": "", "conversations": GOOD}, "image is ''; expected a name"),
    "images": ({"id": "x", "image": ["a.jpg", 3], "conversations": GOOD}, r"image is \['a\.jpg', 3\]"),
    "role": ({"id": "x", "conversations": [{"from": "bot", "value": "q"}]}, "turn 1 is .*expected"),
    "roles of another format": (
        {"id": "x", "conversations": [{"role": "user", "content": "q"}]},
        "turn 1 is .*expected",
    ),
    "value": ({"id": "x", "conversations": [*GOOD, {"from": "human", "value": None}]}, "turn 3 is .*None.*expected"),
    "half a character": ({"id": "x", "conversations": talk("\ud83d", "a")}, "turn 1 holds half of a character"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
@pytest.mark.parametrize("lines", [False, True])
def test_a_broken_sample_raises_when_it_is_read_and_spoils_no_other(name: str, lines: bool, tmp_path: Path) -> None:
    value, message = BAD_SAMPLES[name]
    data = [LCS[0], value, LCS[1]]
    file = tmp_path / "data.json"
    file.write_text("\n".join(map(json.dumps, data)) if lines else json.dumps(data))
    samples = Samples([file], None)
    assert [samples[0], samples[2]] == expected(LCS)
    with pytest.raises(DataError, match=message) as caught:
        samples[1]
    assert str(caught.value).startswith(f"{file}, sample 1")
    assert "\n" not in str(caught.value)


def test_a_broken_line_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(LCS[0])}\n\n{json.dumps(LCS[1])[:-9]}\n")
    samples = Samples([file], None)
    assert len(samples) == 2
    with pytest.raises(DataError, match=r"sample 1: no JSON .*expected one sample"):
        samples[1]


@pytest.mark.parametrize("name", ["../a.jpg", "x/../../a.jpg", "/etc/passwd", "", "..", "a\\..\\b.jpg", "a\0.jpg"])
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_names_that_lead_outside_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"secret")
    with pytest.raises(DataError, match="no name of a picture; expected a path below the pictures' root"):
        open_pictures(store(kind, tmp_path, {"b.jpg": b"b"})).read(name)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_missing_picture_says_what_names_there_are(kind: str, tmp_path: Path) -> None:
    pictures = open_pictures(store(kind, tmp_path, {"train2014/COCO_train2014_000000033471.jpg": b"x"}))
    with pytest.raises(DataError, match=r"no such picture .*train2014/.*COCO_train2014_000000033471\.jpg"):
        pictures.read("coco/train2017/000000033471.jpg")


def test_archives_that_cannot_be_used(tmp_path: Path) -> None:
    files = {"a.jpg": picture("a.jpg"), "b.jpg": picture("b.jpg")}
    whole = write_tar(tmp_path / "a.tar", files).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:900])
    (tmp_path / "cut.zip").write_bytes(write_zip(tmp_path / "a.zip", files).read_bytes()[:-30])
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.tar", "a.jpg")
    for name in ("cut.tar", "cut.zip", "a.tar.gz"):
        with pytest.raises(DataError, match=r"no archive that can be read .*uncompressed tar"):
            open_pictures(tmp_path / name)
    with pytest.raises(DataError, match="no such folder or archive"):
        open_pictures(tmp_path / "absent")


def test_an_archive_that_changes_under_the_index_is_an_error(tmp_path: Path) -> None:
    for path in (
        write_zip(tmp_path / "a.zip", {"a.jpg": b"a" * 99}),
        write_tar(tmp_path / "a.tar", {"a.jpg": b"a" * 99}),
    ):
        pictures = open_pictures(path)
        path.write_bytes(path.read_bytes()[:520] if path.suffix == ".tar" else b"x" * 300)
        with pytest.raises(DataError, match=r"a\.jpg: cannot be read .*damaged"):
            pictures.read("a.jpg")


def test_places_of_pictures_that_do_not_fit_the_data(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", webdataset(LCS))
    with pytest.raises(DataError, match="leave out the folder of pictures"):
        Samples([tar], tmp_path)
    with pytest.raises(DataError, match="holds no samples"):
        Samples([write_tar(tmp_path / "b.tar", {"a.jpg": b""})], None)
    with pytest.raises(DataError, match=r"a folder without \.tar files"):
        Samples([write_folder(tmp_path / "c", {"a.json": b"[]"})], None)
    with pytest.raises(DataError, match="no place of pictures is given"):
        Samples([write_json(tmp_path / "d.json", LCS)], None).picture("a.jpg")


# What is mended


def sample(*turns: tuple[str, str], images: tuple[str, ...] = ()) -> Sample:
    roles = {"h": "user", "g": "assistant"}
    return Sample("x", tuple(Turn(roles[role], text) for role, text in turns), images)  # type: ignore[arg-type]


ONE, TWO = ("a.jpg",), ("a.jpg", "b.jpg")
Q, A = ("h", "<image>\nq"), ("g", "a")
MENDED: list[tuple[Sample, set[str], Sample | None]] = [
    (sample(Q, A, images=ONE), set(), sample(Q, A, images=ONE)),
    (sample(("h", "q"), A), set(), sample(("h", "q"), A)),
    (sample(("h", "<image>"), A, images=ONE), set(), sample(("h", "<image>"), A, images=ONE)),
    (sample(Q, A, ("h", "<image> too"), A, images=TWO), set(), sample(Q, A, ("h", "<image> too"), A, images=TWO)),
    (sample(("g", "hi"), Q, A, images=ONE), {"leading_answer"}, sample(Q, A, images=ONE)),
    (sample(Q, A, ("h", "r"), images=ONE), {"trailing_question"}, sample(Q, A, images=ONE)),
    (sample(Q, ("h", "r"), A, images=ONE), {"same_side_twice"}, sample(("h", "<image>\nq\nr"), A, images=ONE)),
    (sample(("h", "q"), A, ("g", "b")), {"same_side_twice"}, sample(("h", "q"), ("g", "a\nb"))),
    (sample(Q, ("g", " \n"), ("h", "r"), A, images=ONE), {"empty_turn"}, sample(("h", "<image>\nr"), A, images=ONE)),
    (sample(("h", ""), A, ("h", "r"), A), {"empty_turn"}, sample(("h", "r"), A)),
    (sample(("h", "q"), A, images=ONE), {"missing_mark"}, sample(Q, A, images=ONE)),
    (sample(Q, A, images=TWO), {"missing_mark"}, sample(("h", "<image>\n<image>\nq"), A, images=TWO)),
    (sample(("h", "<image>q<image>"), A, images=ONE), {"surplus_mark"}, sample(Q, A, images=ONE)),
    (sample(Q, A), {"surplus_mark"}, sample(("h", "q"), A)),
    (sample(("h", "q"), A, ("h", "r <image>"), A, images=ONE), {"late_mark"}, sample(Q, A, ("h", "r"), A, images=ONE)),
    (sample(("h", "q"), ("g", "a <image>"), images=ONE), {"late_mark"}, sample(Q, A, images=ONE)),
    (sample(Q, A, ("h", "<image>"), A, images=ONE), {"surplus_mark", "late_mark"}, sample(Q, A, images=ONE)),
    (sample(Q, images=ONE), {"trailing_question", "nothing_to_learn"}, None),
    (sample(A), {"leading_answer"}, None),
    (sample(("h", "q"), ("g", "")), {"empty_turn", "nothing_to_learn"}, None),
]


@pytest.mark.parametrize(("broken", "kinds", "whole"), MENDED)
def test_each_fault_is_seen_and_mended_by_its_rule(broken: Sample, kinds: set[str], whole: Sample | None) -> None:
    assert {fault.kind for fault in faults(broken)} == kinds
    assert mended(broken) == whole
    assert whole is None or not faults(whole)


def test_whatever_the_turns_are_the_mended_sample_has_no_fault() -> None:
    rng = random.Random(0)
    texts = ["", " ", "q", "<image>", "<image>\nq", "a <image> b <image>"]
    for _ in range(3000):
        turns = [(rng.choice("hg"), rng.choice(texts)) for _ in range(rng.randint(1, 7))]
        whole = mended(sample(*turns, images=("a.jpg",) * rng.randint(0, 3)))
        assert whole is None or (whole.turns and not faults(whole) and len(whole.turns) % 2 == 0)


# The check


def planted() -> tuple[list[Any], dict[str, set[int]]]:
    """Samples, and where each kind of problem is."""
    good = [*MIX, *SEVERAL, *LCS]
    image = "gqa/images/2354786.jpg"
    long = talk("<image>\nq", *["a b c"] * 41)
    bad: list[tuple[Any, str]] = [
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
        ({"id": "b9", "image": image, "conversations": talk("q", "a")}, "missing_mark"),
        ({"id": "b10", "conversations": GOOD}, "surplus_mark"),
        ({"id": "b11", "image": image, "conversations": talk("q", "a", "<image>\nr", "b")}, "late_mark"),
        ({"id": "b12", "image": image, "conversations": long}, "too_long"),
    ]
    data: list[Any] = list(good)
    where: dict[str, set[int]] = {}
    for i, (value, kind) in enumerate(bad):
        at = len(data) if kind == "repeated" else min(2 * i, len(data))
        data.insert(at, value)
        where = {k: {n + (n >= at) for n in places} for k, places in where.items()}
        where.setdefault(kind, set()).add(at)
    return data, where


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {name: picture(name) for name in names_of([*MIX, *SEVERAL, *LCS])}
    whole = picture("cut.jpg")
    files |= {"cut.jpg": whole[: len(whole) - 60], "text.jpg": b"no picture"}
    root = write_folder(tmp_path_factory.mktemp("pictures") / "images", files)
    (root.parent / "outside.jpg").write_bytes(whole)
    return root


def counted(measure: Measure, value: dict[str, Any]) -> tuple[int, int]:
    return measure(expected([value])[0], [])


def measure_of(tokenizer: Path, **options: Any) -> Measure:
    return open_measure(tokenizer, None, template=None, **{"limit": 220, "picture_tokens": 30} | options)  # type: ignore


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_the_report_is_exact_and_the_cleaned_copy_is_clean(
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
    assert report.problems == {kind: len(places) for kind, places in where.items()}
    assert (report.samples, report.text_only, report.with_pictures) == (26, 2, 22)
    assert report.sources == {
        **{"coco/": 2, "text only": 2, "ocr_vqa/": 1, "textvqa/": 1, "vg/": 2, "no folder": 3, "<number>/": 2},
        **{"gqa/": 10, "../": 1},
    }
    assert report.turns == {2: 16, 3: 3, 4: 4, 42: 1}
    assert report.repeated_ids == 1
    assert report.fixed is not None
    assert (report.fixed.kept, report.fixed.mended, report.fixed.dropped) == (19, 8, 7)

    again = check(clean, images, measure=measure, workers=0)
    assert again.clean
    assert again.samples == 19
    text = clean.read_text(encoding="utf-8")
    assert text.startswith("[") == (form == "json")
    cleaned = json.loads(text) if form == "json" else [json.loads(line) for line in text.splitlines()]
    assert [sample for sample in data if sample in cleaned] == [*[s for s in cleaned if s in data], MIX[2]]
    mended_ids = {f"b{n}" for n in range(5, 13)}
    assert {sample["id"] for sample in cleaned if sample not in data} == mended_ids
    assert next(sample for sample in cleaned if sample["id"] == "b8")["score"] == 0.5
    assert counted(measure, next(sample for sample in cleaned if sample["id"] == "b12"))[0] <= 220
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_every_kind_of_problem_has_a_test() -> None:
    tested = {kind for _, kinds, _ in MENDED for kind in kinds} | set(planted()[1]) | {"refused"}
    assert tested == set(RULES)


def test_worker_processes_find_the_same(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    data, _ = planted()
    file = write_lines(tmp_path / "data.jsonl", [*data, *({**LCS[0], "id": f"n{i}"} for i in range(200))])
    seen: list[tuple[int, int]] = []
    one = check(file, images, measure=measure_of(tokenizer), workers=0)
    two = check(file, images, measure=measure_of(tokenizer), workers=2, progress=lambda *state: seen.append(state))
    assert two.to_dict() | {"seconds": 0} == one.to_dict() | {"seconds": 0}
    assert [done for done, _ in seen] == [64, 128, 192, 226]


def test_token_figures_are_those_of_training(tokenizer: Path, tmp_path: Path, checkpoint: Path) -> None:
    """Against the training function itself, with real pictures on the model's own config."""
    import llava

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
    learnt = sum(int((input.labels != IGNORE).sum()) for input in inputs)
    assert (figures.total, figures.longest, figures.median) == (sum(lengths), max(lengths), sorted(lengths)[1])
    assert figures.learnt == learnt
    assert figures.masked_share == pytest.approx(1 - learnt / sum(lengths))


def test_the_limit_cuts_what_is_learnt(tokenizer: Path) -> None:
    value = {"id": "0", "image": "a.jpg", "conversations": talk("<image>\nq", "one two three four")}
    total, learnt = counted(measure_of(tokenizer), value)
    for limit in range(total - learnt - 2, total + 2):
        assert counted(measure_of(tokenizer, limit=limit), value) == (
            total,
            max(0, min(learnt, limit - total + learnt)),
        )
    assert counted(measure_of(tokenizer, picture_tokens=77), value)[0] == total + 47


def test_tiles_count_by_the_size_of_the_picture(clip: Path, tmp_path: Path) -> None:
    folder = tiny.write_llava(tmp_path / "v16", layout="safetensors-shards", clip=clip, **tiny.ANYRES)
    measure = open_measure(None, str(folder), template="vicuna_v1", limit=2048, picture_tokens=None)
    assert measure is not None
    file = write_json(tmp_path / "data.json", [LCS[0]])
    files = {LCS[0]["image"]: picture("a")}
    report = check(file, write_folder(tmp_path / "images", files), measure=measure, workers=0)

    import llava

    vlm = llava.load(folder, device="cpu")
    whole = Preprocessor(vlm.config, load_tokenizer(folder), template="vicuna_v1").prepare_training(
        expected(LCS)[0].turns, list(files.values()), max_length=2048
    )
    assert report.tokens is not None
    assert report.tokens.total == len(whole.ids)
    with pytest.raises(DataError, match="give the pictures"):
        check(file, measure=measure, workers=0)


def test_samples_that_the_template_refuses_or_that_a_picture_fills(tokenizer: Path, tmp_path: Path) -> None:
    file = write_json(tmp_path / "data.json", [*LCS, INSTRUCT[0]])
    plain = open_measure(tokenizer, None, template="plain", limit=220, picture_tokens=30)
    assert check(file, measure=plain, workers=0).problems == {"refused": 1}
    filled = check(file, measure=measure_of(tokenizer, picture_tokens=300), fix=None, workers=0)
    assert filled.problems == {"nothing_to_learn": 3, "too_long": 3}


# The command


def test_the_command_says_what_it_found_and_mends_it(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    data, where = planted()
    file, clean = write_json(tmp_path / "data.json", data), tmp_path / "clean.json"
    options = ("--images", images, "--tokenizer", tokenizer, "--max-length", 220, "--image-tokens", 30)
    found = run("data", "check", file, *options, "--json", "--workers", 0)
    assert found.returncode == 1, found.stderr
    report = json.loads(found.stdout)
    assert report["problems"] == {kind: len(places) for kind, places in where.items()}
    assert report["clean"] is False
    assert {finding["kind"] for finding in report["findings"]} == set(where)

    fixed = run_well("data", "check", file, *options, "--fix", clean)
    assert "19 samples, 8 mended, 7 dropped" in fixed.stdout
    for kind in where:
        assert kind.replace("_", " ") in fixed.stdout
    assert check(clean, images, measure=measure_of(tokenizer), workers=0).clean


def test_a_copy_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    file = write_json(tmp_path / "data.json", LCS)
    tar = write_tar(tmp_path / "a.tar", webdataset(LCS))
    for data, out, message in (
        (file, file, "exists already"),
        (file, tmp_path / "absent" / "out.json", "its folder does not exist"),
        (tar, tmp_path / "out.json", "--fix writes JSON"),
        (write_lines(tmp_path / "bad.jsonl", ["x"]), tmp_path / "out.json", "no sample is left"),
    ):
        with pytest.raises(DataError, match=message):
            check(data, fix=out, workers=0)
    assert not (tmp_path / "out.json").exists()


def test_what_the_caller_got_wrong_is_one_line(tmp_path: Path) -> None:
    assert_one_line_error(run("data", "check", tmp_path / "absent.json"), "absent.json", "cannot be read")


def test_the_page_has_every_rule() -> None:
    page = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z ]+) \| .* \| (.*) \|$", page, re.MULTILINE)
    assert {kind.replace(" ", "_"): rule for kind, rule in rows if kind.replace(" ", "_") in RULES} == RULES
