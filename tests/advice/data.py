"""Advice about training data: data files, pictures, samples, and what is written."""

import contextlib
import json
import os
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from llava.tensors import atomic
from tests import tiny
from tests.advice.table import Run, Steps, World, advice
from tests.eval.science import problem, write_problems

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
WITH_PICTURE = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Hello."}]


def write(w: World, *samples: Any, name: str = "data.json") -> Path:
    """Writes samples, by default of one exchange."""
    file = w / name
    file.write_text(json.dumps([{"id": str(i), "conversations": TURNS, **sample} for i, sample in enumerate(samples)]))
    return file


def check(file: Path, *more: object) -> Run:
    return ("data", "check", file, "--workers", 0, *more)


def changed(w: World, before: dict[str, Any], after: dict[str, Any], *more: object) -> Steps:
    """Checks a sample, which a user then changes."""
    yield check(write(w, before), "--json", *more)
    write(w, after)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """The disk has no space left."""
    usage = mock.Mock(free=0)
    with mock.patch.object(atomic.shutil, "disk_usage", return_value=usage):
        yield


@advice("expected pictures under image or images; if the key is not part of the sample, remove it")
def a_key_that_may_be_media(w: World) -> Steps:
    yield from changed(w, {"video": "a.mp4"}, {})


@advice("conversations and messages differ; keep the list to train on, remove the other")
def two_conversations(w: World) -> Steps:
    yield from changed(w, {"messages": TURNS * 2}, {})


@advice("the key system and the first turn are different system messages; keep one of them")
def two_system_messages(w: World) -> Steps:
    system = {"from": "system", "value": "Be brief."}
    yield from changed(
        w, {"system": "Be long.", "conversations": [system, *TURNS]}, {"conversations": [system, *TURNS]}
    )


@advice("name different pictures; keep one of them")
def two_lists_of_pictures(w: World) -> Steps:
    yield from changed(
        w,
        {"image": "0.png", "images": ["1.png"], "conversations": WITH_PICTURE},
        {"image": "0.png", "conversations": WITH_PICTURE},
        "--images",
        w.images,
    )


@advice("{} contains an image part whose {} differ; keep one of them")
def two_sources_of_a_part(w: World) -> Steps:
    part = {"type": "image", "image": "0.png"}
    before, after = ([{"from": "human", "value": [one, "Hi"]}, TURNS[1]] for one in (part | {"path": "1.png"}, part))
    yield from changed(w, {"conversations": before}, {"conversations": after}, "--images", w.images)


@advice("nothing is downloaded: save the picture and write its path")
def a_picture_on_the_web(w: World) -> Steps:
    yield from changed(
        w,
        {"image": "https://example.com/0.png", "conversations": WITH_PICTURE},
        {"image": "0.png", "conversations": WITH_PICTURE},
        "--images",
        w.images,
    )


@advice(", not checked; specify --images")
def pictures_that_are_not_checked(w: World) -> Steps:
    yield check(w.data)
    yield check(w.data, "--images", w.images)


@advice("; --fix OUT writes a fixed copy")
def samples_with_problems(w: World) -> Steps:
    file = write(w, {"conversations": [*TURNS, TURNS[0]]}, {})
    yield check(file)
    yield check(file, "--fix", w / "fixed.json")


@advice("{}: not written, because no samples would remain; run without --fix to see the problems", succeeds=False)
def no_sample_remains(w: World) -> Steps:
    file = write(w, {"conversations": [TURNS[0]]})
    yield check(file, "--fix", w / "fixed.json")
    yield check(file)


@advice("and {} more; --json lists all", succeeds=False)
def many_changes(w: World) -> Steps:
    file = write(w, {}, *[{"conversations": [*TURNS, TURNS[0]]}] * 150)
    yield check(file, "--fix", w / "fixed.json")
    yield check(file, "--fix", w / "again.json", "--json")


@advice("left out: {} more; --json lists all")
def many_samples_that_are_left_out(w: World) -> Steps:
    file = write(w, {}, *[{"video": "a.mp4"}] * 30)
    yield ("data", "convert", file, w / "out.json", "--from", "sharegpt", "--drop")
    yield ("data", "convert", file, w / "again.json", "--from", "sharegpt", "--drop", "--json")


@advice("nothing was written; add --drop to leave these samples out")
def a_sample_that_cannot_be_converted(w: World) -> Steps:
    command = ("data", "convert", write(w, {}, {"video": "a.mp4"}), w / "out.json", "--from", "sharegpt")
    yield command
    yield (*command, "--drop")


@advice("the layout is {}; convert it with --from {}")
def another_layout(w: World) -> Steps:
    said = yield ("data", "convert", write(w, {}), w / "out.json", "--from", "openai")
    assert "--from sharegpt" in said.text
    yield ("data", "convert", write(w, {}), w / "out.json", "--from", "sharegpt")


@advice("token counts depend on picture sizes; specify the location of the pictures with --images")
def token_counts_of_anyres(w: World) -> Steps:
    anyres = tiny.write_llava(w / "next", clip=w.clip, **tiny.ANYRES)
    yield check(w.data, "--model", anyres)
    yield check(w.data, "--model", anyres, "--images", w.images)


@advice("--tokenizer and --model are mutually exclusive; specify only one of them")
def a_tokenizer_and_a_model(w: World) -> Steps:
    yield check(w.data, "--tokenizer", w.llama, "--model", w.llava)
    yield check(w.data, "--model", w.llava)


@advice("a worker process was killed, possibly because memory ran out; if so, reduce --workers")
def a_killed_worker(w: World) -> Steps:
    from llava.data import pool

    with mock.patch.object(pool, "_run", _die), mock.patch.object(pool, "CHUNK", 10):
        yield ("data", "check", w.data, "--workers", 2)
    yield ("data", "check", w.data, "--workers", 1)


def _die(chunk: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------------- overlap


def overlap(w: World, *more: object) -> Run:
    return ("data", "overlap", w.data, w / "bench.json", "--workers", 0, *more)


def write_bench(w: World, *questions: dict[str, str]) -> None:
    (w / "bench.json").write_text(json.dumps(questions))


@advice("specify --images")
def pictures_of_training_data_that_are_not_compared(w: World) -> Steps:
    write_bench(w, {"question": "Is this a unicorn?"})
    yield overlap(w)
    yield overlap(w, "--images", w.images)


@advice("specify --bench-images")
def pictures_of_a_benchmark_that_are_not_compared(w: World) -> Steps:
    write_bench(w, {"question": "Is this a unicorn?", "image": w.picture.name})
    yield overlap(w)
    yield overlap(w, "--bench-images", w.picture.parent)


@advice("the rest is listed by --json", succeeds=False)
def many_questions_in_common(w: World) -> Steps:
    asked = [f"Is number {i} a unicorn?" for i in range(11)]
    write_bench(w, *[{"question": text} for text in asked])
    turns = [turn for text in asked for turn in ({"from": "human", "value": text}, TURNS[1])]
    file = write(w, {"conversations": turns}, name="train.json")
    yield ("data", "overlap", file, w / "bench.json")
    yield ("data", "overlap", file, w / "bench.json", "--json")


# ------------------------------------------------------------------------------------------------- files and pictures


@advice("expected a JSON array of samples; repair the file or download it again")
def a_truncated_data_file(w: World) -> Steps:
    file = w / "data.json"
    file.write_text(w.data.read_text()[:-100])
    yield check(file)
    shutil.copy(w.data, file)


@advice("no location given for the pictures; set images= (--images) to a folder, a .zip or a .tar")
def a_picture_without_a_location_in_python(w: World) -> Steps:
    from llava.data.samples import Samples

    yield lambda: Samples([w.data], None).picture("0.png")
    yield lambda: Samples([w.data], w.images).picture("0.png")


def tar_of(w: World, name: str, *pictures: str) -> Path:
    (w / "tars").mkdir(exist_ok=True)
    with tarfile.open(w / "tars" / name, "w") as tar:
        for picture in pictures:
            tar.add(w.images / picture, picture)
    return w / "tars"


@advice("a tar contains its own pictures; do not specify a separate location for them")
def a_tar_of_samples_with_a_location(w: World) -> Steps:
    tar = w / "samples.tar"
    with tarfile.open(tar, "w") as archive:
        for name, data in (("a.json", json.dumps({"id": "a", "conversations": TURNS})),):
            (w / name).write_text(data)
            archive.add(w / name, name)
    yield check(tar, "--images", w.images)
    yield check(tar)


def read(location: Path, name: str) -> Run:
    from llava.data.pictures import open_pictures

    return lambda: open_pictures(location).read(name)


@advice("cannot be read from {} ({}); download the archive again or unpack it")
def a_damaged_zip(w: World) -> Steps:
    file = w / "pictures.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(w.images / "0.png", "0.png")
    data = file.read_bytes()
    file.write_bytes(b"XX" + data[2:])
    yield read(file, "0.png")
    file.write_bytes(data)


@advice("names must be unique across archives; rename one of the members")
def a_name_in_two_tars(w: World) -> Steps:
    tar_of(w, "a.tar", "0.png")
    tars = tar_of(w, "b.tar", "0.png", "1.png")
    yield read(tars, "1.png")
    tar_of(w, "b.tar", "1.png")


@advice("expected a zip or an uncompressed tar; unpack the file or download it again")
def a_compressed_tar(w: World) -> Steps:
    with tarfile.open(w / "pictures.tar", "w:gz") as tar:
        tar.add(w.images, ".")
    yield read(w / "pictures.tar", "0.png")
    with tarfile.open(w / "pictures.tar") as tar:
        tar.extractall(w / "unpacked", filter="data")
    yield read(w / "unpacked", "0.png")


@advice("is encrypted; unpack the archive and use the folder instead")
def an_encrypted_zip(w: World) -> Steps:
    file = w / "pictures.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(w.images / "0.png", "0.png")
    data = bytearray(file.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(data)
    yield read(file, "0.png")
    yield read(w.images, "0.png")


@advice("{} {}; choose the location that contains {}")
def the_wrong_folder_of_pictures(w: World) -> Steps:
    yield read(w.images.parent, "0.png")
    yield read(w.images, "0.png")


# -------------------------------------------------------------------------------------------------------- outputs


@advice("{}: already exists; choose another path for {}")
def a_fixed_copy_that_exists(w: World) -> Steps:
    out = write(w, {}, name="fixed.json")
    yield check(w.data, "--fix", out)
    yield check(w.data, "--fix", w / "other.json")


@advice("{}: only JSON can be written; choose a .json or .jsonl file for {}")
def a_fixed_copy_as_a_tar(w: World) -> Steps:
    yield check(w.data, "--fix", w / "fixed.tar")
    yield check(w.data, "--fix", w / "fixed.jsonl")


@advice("the parent folder does not exist; create it first")
def a_fixed_copy_in_no_folder(w: World) -> Steps:
    yield check(w.data, "--fix", w / "new" / "fixed.json")
    (w / "new").mkdir()


@advice("no permission to write in this folder; choose another path for {}")
def a_fixed_copy_in_a_folder_of_others(w: World) -> Steps:
    with mock.patch("os.access", side_effect=lambda path, mode: mode != os.W_OK):
        yield check(w.data, "--fix", w / "fixed.json")


@advice("{}: cannot be written ({}); free some space, or choose another path")
def a_fixed_copy_on_a_disk_that_fills(w: World) -> Steps:
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        yield check(w.data, "--fix", w / "fixed.json")


# ------------------------------------------------------------------------------------------------------ ScienceQA


def science(w: World, name: str, *more: object) -> Run:
    write_problems(w.tmp, {"1": problem(1)}, {"train": ["1"]})
    return ("data", "convert", w.tmp, w / name, "--from", "scienceqa", *more)


@advice("{}: the name says neither split nor format, as in llava_train_QCM-LEA.json; add --split and --format")
def a_name_that_says_nothing(w: World) -> Steps:
    yield science(w, "out.json")
    yield science(w, "out.json", "--split", "train", "--format", "QCM-LEA")


@advice("--format is {}; choose one of {}")
def an_unknown_format(w: World) -> Steps:
    said = yield science(w, "out.json", "--split", "train", "--format", "QCM-ALE")
    assert "QCM-LEPA" in said.text
    yield science(w, "out.json", "--split", "train", "--format", "QCM-LEPA")


@advice("--split and --format are about ScienceQA; leave them out with --from {}")
def a_split_of_another_layout(w: World) -> Steps:
    command = ("data", "convert", write(w, {}), w / "out.json", "--from", "sharegpt")
    yield (*command, "--split", "train")
    yield command
