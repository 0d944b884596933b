"""Samples: lengths, several files, tars, worker processes, and malformed samples."""

import gc
import json
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llava.data.samples import Samples, starting_workers
from llava.errors import DataError
from tests.data.published import (
    GOOD,
    LCS,
    MIX,
    SEVERAL,
    SQA,
    expected,
    names_of,
    picture,
    store,
    talk,
    webdataset,
    write_folder,
    write_json,
    write_lines,
    write_tar,
)


def test_lengths_are_word_counts_and_negative_without_a_picture(tmp_path: Path) -> None:
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


def test_several_files_are_read_in_order_and_errors_name_the_right_one(tmp_path: Path) -> None:
    first, second = write_json(tmp_path / "a.json", LCS), write_lines(tmp_path / "b.jsonl", [*SQA, {"id": "x"}])
    samples = Samples([first, second], None)
    assert len(samples) == 6
    assert [samples[i] for i in range(5)] == expected([*LCS, *SQA])
    assert samples[-2] == expected(SQA)[2]
    with pytest.raises(DataError, match=r"b\.jsonl, sample 3 \(id x\): conversations is None"):
        samples[5]
    with pytest.raises(IndexError):
        samples[6]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_webdataset_tar_contains_samples_and_pictures(sharded: bool, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "shards"])
def test_samples_can_be_pickled_and_used_in_other_processes(kind: str, tmp_path: Path) -> None:
    files = {name: picture(name) for name in names_of(MIX)}
    samples = Samples([write_json(tmp_path / "data.json", MIX)], store(kind, tmp_path, files))
    assert [samples.picture(name) for name in files] == list(files.values())  # opened before the fork
    copy = pickle.loads(pickle.dumps(samples))
    assert list(copy) == list(samples)
    assert [copy.picture(name) for name in files] == list(files.values())
    method = "spawn" if kind == "zip" else "fork"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        assert list(pool.map(samples.__getitem__, range(len(MIX)))) == expected(MIX)
        assert list(pool.map(samples.picture, [*files] * 4)) == list(files.values()) * 4


BAD_SAMPLES: dict[str, tuple[Any, str]] = {
    "a list": ([], "expected an object"),
    "a number": (float("nan"), "found nan; expected an object"),
    "no conversations": ({"id": "x"}, r"\(id x\): conversations is None"),
    "empty conversations": (
        {"id": "x", "conversations": []},
        r"conversations is \[\]; expected a non-empty list of turns",
    ),
    "conversations as text": ({"id": "x", "conversations": "q"}, "conversations is 'q'"),
    "id": ({"id": ["x"], "conversations": GOOD}, r"the id is \['x'\]"),
    "id NaN": ({"id": float("nan"), "conversations": GOOD}, "the id is nan"),
    "image false": ({"id": "x", "image": False, "conversations": GOOD}, "image is False; expected a picture name"),
    "a name empty": ({"id": "x", "image": ["a.jpg", ""], "conversations": GOOD}, r"image is \['a\.jpg', ''\]"),
    "images": ({"id": "x", "image": ["a.jpg", 3], "conversations": GOOD}, r"image is \['a\.jpg', 3\]"),
    "role": ({"id": "x", "conversations": [{"from": "bot", "value": "q"}]}, "turn 1 is .*expected"),
    "keys of two formats": (
        {"id": "x", "conversations": [{"role": "user", "value": "q"}]},
        "turn 1 is .*expected",
    ),
    "value": ({"id": "x", "conversations": [*GOOD, {"from": "human", "value": None}]}, "turn 3 is .*None.*expected"),
    "surrogate": (
        {"id": "x", "conversations": talk("\ud83d", "a")},
        "turn 1 contains an unpaired surrogate",
    ),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
@pytest.mark.parametrize("lines", [False, True])
def test_a_malformed_sample_raises_only_on_its_own_access(name: str, lines: bool, tmp_path: Path) -> None:
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


def test_a_wrong_location_of_pictures_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", webdataset(LCS))
    with pytest.raises(DataError, match="a tar contains its own pictures"):
        Samples([tar], tmp_path)
    with pytest.raises(DataError, match="contains no samples"):
        Samples([write_tar(tmp_path / "b.tar", {"a.jpg": b""})], None)
    with pytest.raises(DataError, match=r"folder contains no \.tar files"):
        Samples([write_folder(tmp_path / "c", {"a.json": b"[]"})], None)
    with pytest.raises(DataError, match="no location given for the pictures"):
        Samples([write_json(tmp_path / "d.json", LCS)], None).picture("a.jpg")


def test_a_worker_does_not_collect_the_garbage_of_its_parent() -> None:
    """As the process group of an earlier run, which hangs the worker that collects it."""

    class Group:
        def __del__(self) -> None:
            if os.getpid() != parent:
                os._exit(3)

    parent = os.getpid()
    gc.disable()
    try:
        group = Group()
        group.cycle = group  # type: ignore[attr-defined]
        del group
        with starting_workers():
            if (worker := os.fork()) == 0:
                gc.collect()
                os._exit(0)
        _, status = os.waitpid(worker, 0)
    finally:
        gc.enable()
    assert os.waitstatus_to_exitcode(status) == 0
    assert gc.get_freeze_count() == 0
