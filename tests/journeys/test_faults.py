"""Faulty input gives one line that names the file, exit code 2 and no partial files. Uses real files and signals."""

import functools
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import llava
from llava import features
from llava.errors import LlavaError
from tests import command, tiny
from tests.command import assert_one_line_error, run

SHARD = "pytorch_model-00002-of-00003.bin"  # holds block 1
INDEX = "pytorch_model.bin.index.json"
KEY = "model.layers.1.self_attn.o_proj.weight"


def edit_shard(folder: Path, edit: Callable[[dict[str, Any]], Any], name: str = SHARD) -> None:
    tensors = torch.load(folder / name)
    edit(tensors)
    torch.save(tensors, folder / name)


# ------------------------------------------------------------------------------------------------ broken checkpoints


class Touch:
    """Creates a file when unpickled, as a malicious .bin could run any command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def missing_shard(folder: Path) -> str:
    (folder / SHARD).unlink()
    return SHARD


def truncated_shard(folder: Path) -> str:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-2000])
    return SHARD


def empty_shard(folder: Path) -> str:
    (folder / SHARD).write_bytes(b"")
    return SHARD


def truncated_safetensors(folder: Path) -> str:
    name = "model-00002-of-00003.safetensors"
    (folder / name).write_bytes((folder / name).read_bytes()[:-2000])
    return name


def safetensors_that_are_text(folder: Path) -> str:
    name = "model-00002-of-00003.safetensors"
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    return name


def wrong_index_entry(folder: Path) -> str:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][KEY] = "pytorch_model-00001-of-00003.bin"
    tiny.write_json(folder / INDEX, index)
    return "pytorch_model-00001-of-00003.bin"


def index_of_a_tensor_that_is_nowhere(folder: Path) -> str:
    edit_shard(folder, lambda tensors: tensors.pop(KEY))
    return SHARD


def index_that_is_no_json(folder: Path) -> str:
    (folder / INDEX).write_text("{")
    return INDEX


def malicious_zip(folder: Path) -> str:
    torch.save({KEY: Touch(folder.parent / "executed")}, folder / SHARD)
    return SHARD


def malicious_pickle(folder: Path) -> str:
    (folder / SHARD).write_bytes(pickle.dumps({KEY: Touch(folder.parent / "executed")}, protocol=2))
    return SHARD


def malicious_legacy_file(folder: Path) -> str:
    torch.save({KEY: Touch(folder.parent / "executed")}, folder / SHARD, _use_new_zipfile_serialization=False)
    return SHARD


def shape_mismatch(folder: Path) -> str:
    edit_shard(folder, lambda tensors: tensors.update({KEY: torch.ones(64, 60).half()}))
    return SHARD


def nan_weights(folder: Path) -> str:
    edit_shard(folder, lambda tensors: tensors[KEY][1, 2].fill_(torch.nan))
    return SHARD


def inf_weights(folder: Path) -> str:
    edit_shard(folder, lambda tensors: tensors[KEY][1, 2].fill_(-torch.inf))
    return SHARD


def unknown_keys(folder: Path) -> str:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.strange.weight"] = SHARD
    tiny.write_json(folder / INDEX, index)
    edit_shard(folder, lambda tensors: tensors.update({"model.strange.weight": torch.ones(3)}))
    return SHARD


def missing_block(folder: Path) -> str:
    """A tensor is missing from both the index and the shards."""
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][KEY]
    tiny.write_json(folder / INDEX, index)
    edit_shard(folder, lambda tensors: tensors.pop(KEY))
    return "o_proj"


def empty_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder.name


def config_that_is_no_json(folder: Path) -> str:
    (folder / "config.json").write_text('{"hidden_size": 64,')
    return "config.json"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.model").unlink()
    return "tokenizer"


def broken_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.model").write_bytes(b"\x00" * 100)
    return "tokenizer.model"


# fault -> layout, and the command that must refuse it
FAULTS: dict[Callable[[Path], str], tuple[tiny.Layout, str]] = {
    missing_shard: ("bin-shards", "convert"),
    truncated_shard: ("bin-shards", "convert"),
    empty_shard: ("bin-shards", "convert"),
    truncated_safetensors: ("safetensors-shards", "convert"),
    safetensors_that_are_text: ("safetensors-shards", "ask"),
    wrong_index_entry: ("bin-shards", "convert"),
    index_of_a_tensor_that_is_nowhere: ("bin-shards", "ask"),
    index_that_is_no_json: ("bin-shards", "convert"),
    malicious_zip: ("bin-shards", "convert"),
    malicious_pickle: ("bin-shards", "ask"),
    malicious_legacy_file: ("bin-shards", "convert"),
    shape_mismatch: ("bin-shards", "convert"),
    nan_weights: ("bin-shards", "ask"),
    inf_weights: ("bin-shards", "ask"),
    unknown_keys: ("bin-shards", "convert"),
    missing_block: ("bin-shards", "convert"),
    empty_folder: ("bin-shards", "convert"),
    config_that_is_no_json: ("bin-shards", "ask"),
    no_config: ("bin-shards", "ask"),
    no_tokenizer: ("bin-shards", "ask"),
    broken_tokenizer: ("bin-shards", "ask"),
}


@dataclass
class Outcome:
    """The result of a command on a broken checkpoint, the name it should print, and the files before and after."""

    done: Any
    name: str
    before: dict[str, int]
    after: dict[str, int]


@pytest.fixture(scope="module")
def outcomes(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Outcome]]]:
    """Runs a command on every broken checkpoint, two processes at a time, as most of the time is spent on imports."""

    def attempt(fault: Callable[[Path], str]) -> Outcome:
        layout, job = FAULTS[fault]
        around = rooms[fault]
        name = fault(tiny.write_llava(around / "llava", layout=layout, clip=clip))
        before = command.files(around)
        options = ["ask", "Say hello.", "--model", around / "llava"]
        done = run(*options) if job == "ask" else run("convert", around / "llava", around / "out")
        return Outcome(done, name, before, command.files(around))

    rooms = {fault: tmp_path_factory.mktemp(fault.__name__) for fault in FAULTS}
    with ThreadPoolExecutor(2) as pool:
        yield {fault.__name__: pool.submit(attempt, fault) for fault in FAULTS}


@pytest.mark.parametrize("fault", [fault.__name__ for fault in FAULTS])
def test_a_broken_checkpoint_gives_one_line_that_names_the_file(
    outcomes: dict[str, Future[Outcome]], fault: str
) -> None:
    outcome = outcomes[fault].result()
    assert_one_line_error(outcome.done, outcome.name)
    assert outcome.done.stdout.strip() == ""
    assert outcome.after == outcome.before  # no partial files, and no malicious pickle was run


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_raises_a_llava_error_in_python(
    clip: Path, tmp_path: Path, fault: Callable[[Path], str]
) -> None:
    folder = tiny.write_llava(tmp_path / "llava", layout=FAULTS[fault][0], clip=clip)
    name = fault(folder)
    with pytest.raises(LlavaError) as caught:
        llava.load(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_unpickling_the_malicious_files_would_run_them(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Touch(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_a_broken_clip_folder_is_named(tmp_path: Path) -> None:
    for fault in ("config.json", "preprocessor_config.json", "pytorch_model.bin"):
        clip = tiny.write_clip(tmp_path / fault / "clip")
        folder = tiny.write_llava(tmp_path / fault / "llava", clip=clip)
        (clip / fault).write_bytes((clip / fault).read_bytes()[:-50])
        with pytest.raises(LlavaError, match=fault):
            llava.load(folder)


def test_a_legacy_bin_loads_with_a_warning_that_it_cannot_be_mapped(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "llava")
    for path in folder.glob("*.bin"):
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    done = command.run_well("ask", "Say hello.", "--model", folder, "--max-new-tokens", 8)
    assert "map" in done.stderr
    assert SHARD in done.stderr
    assert done.stdout.strip() == llava.load(checkpoint).ask(None, "Say hello.", max_new_tokens=8)


# ------------------------------------------------------------------------------------------------ pictures and prompts


def bomb(path: Path) -> Path:
    """A PNG of a few hundred bytes whose header declares 900 million pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(30_000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def picture_faults(folder: Path) -> dict[str, Path]:
    noise = torch.randint(256, (60, 90, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "whole.jpg")
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    (folder / "words.jpg").write_text("a thousand of them")
    (folder / "folder.jpg").mkdir()
    names = ("half.jpg", "words.jpg", "nowhere.jpg", "folder.jpg")
    return {**{name: folder / name for name in names}, "bomb.png": bomb(folder / "bomb.png")}


def test_bad_pictures_give_one_line_that_names_the_file(checkpoint: Path, tmp_path: Path) -> None:
    pictures = picture_faults(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        ask = functools.partial(run, "ask", "--model", checkpoint)
        for name, done in zip(pictures, pool.map(lambda path: ask(path, "?"), pictures.values()), strict=True):
            assert_one_line_error(done, name)
            assert done.stdout == ""


@pytest.mark.parametrize("name", ["half.jpg", "words.jpg", "nowhere.jpg", "folder.jpg", "bomb.png"])
def test_bad_pictures_raise_llava_errors_in_python(checkpoint: Path, tmp_path: Path, name: str) -> None:
    vlm = llava.load(checkpoint)
    with pytest.raises(LlavaError, match=name) as caught:
        vlm.ask(picture_faults(tmp_path)[name], "What is it?")
    assert "\n" not in str(caught.value)


def test_a_thin_picture_and_an_animated_one_are_answered(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1, 4000), "red").save(tmp_path / "thin.png")
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    pictures = [tmp_path / "thin.png", tmp_path / "moving.gif"]
    done = command.run_well("ask", *pictures, "Compare.", "--model", checkpoint, "--max-new-tokens", 8)
    assert done.stdout.strip() == llava.load(checkpoint).ask([pictures[0], frames[0]], "Compare.", max_new_tokens=8)


def test_a_prompt_longer_than_the_context_states_tokens_and_limit(clip: Path, tmp_path: Path) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=clip, max_position_embeddings=128)
    longer = llava.load(tiny.write_llava(tmp_path / "longer", clip=clip))
    question = "Why? " * 200
    tokens = len(longer.prepare([{"role": "user", "content": question}]).ids)
    assert_one_line_error(run("ask", question, "--model", folder), str(tokens), "128")


def test_a_hub_model_that_cannot_be_reached_is_named() -> None:
    assert_one_line_error(run("ask", "Say hello.", "--model", "nobody/no-such-model"), "nobody/no-such-model")


# ------------------------------------------------------------------------------------------------ a full disk


def small_files_only() -> None:
    """In the child process: limits files to 100 kB, so that writing fails midway with an error, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("options", [[], ["--to", "llama"]], ids=["native", "llama"])
def test_converting_on_a_full_disk_leaves_no_files(checkpoint: Path, tmp_path: Path, options: list[str]) -> None:
    done = run("convert", checkpoint, tmp_path / "out", *options, preexec_fn=small_files_only)
    assert_one_line_error(done, "out")
    assert command.files(tmp_path) == {}


def test_the_documented_script_on_a_full_disk_leaves_no_files(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "llava")
    before = command.files(tmp_path)
    done = run("--checkpoint_dir", folder, command=command.CONVERT_HF, preexec_fn=small_files_only)
    assert_one_line_error(done, "model.pth")
    assert command.files(tmp_path) == before


def test_features_on_a_full_disk_leave_no_files(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Once upon a time there was a painter\n" * 20)
    before = command.files(tmp_path)
    options = ["--input", tmp_path / "texts.txt", "--layers", "0,1,-1", "--out", tmp_path / "out.safetensors"]
    done = run("features", checkpoint, *options, preexec_fn=small_files_only)
    assert_one_line_error(done, "out.safetensors")
    assert command.files(tmp_path) == before


def test_features_that_do_not_fit_on_the_disk_are_refused_before_the_first_row(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    rows = [features.Row("Once upon a time there was a painter", None)] * 20
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=60_000))  # the header fits
    with pytest.raises(llava.LlavaError, match=r"out\.safetensors: needs \d+\.\d\d kB"):
        features.extract(
            llava.load(checkpoint, device="cpu"), rows, [0, 1, -1], tmp_path / "out.safetensors",
            progress=lambda done, total: told.append(done),
        )  # fmt: skip
    assert not told
    assert command.files(tmp_path) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_converting_to_a_small_file_system_leaves_no_files(checkpoint: Path, small_disk: Path) -> None:
    done = run("convert", checkpoint, small_disk / "out")
    assert_one_line_error(done, "out")
    assert command.files(small_disk) == {}


# ------------------------------------------------------------------------------------------------ Ctrl-C


@pytest.fixture(scope="module")
def slow(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 200 MB, large enough to interrupt every command midway."""
    folder = tmp_path_factory.mktemp("slow") / "llava"
    tiny.write_llava(folder, clip=clip, layout="bin", hidden_size=128, intermediate_size=4)
    tensors = torch.load(folder / "pytorch_model.bin")
    for i in range(2):
        for name, shape in (("gate", (131072, 128)), ("up", (131072, 128)), ("down", (128, 131072))):
            small = torch.linspace(-0.002, 0.002, shape[1]).half()
            tensors[f"model.layers.{i}.mlp.{name}_proj.weight"] = small.expand(shape).contiguous()
    torch.save(tensors, folder / "pytorch_model.bin")
    tiny.edit_json(folder / "config.json", intermediate_size=131072)
    return folder


def assert_interrupted(code: int, err: str) -> None:
    assert code in (2, 130), (code, err)
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.strip()]) <= 1, err


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_converting_leaves_no_files(slow: Path, tmp_path: Path, kind: signal.Signals) -> None:
    process = command.start("convert", slow, tmp_path / "out")
    while process.poll() is None and not any(path.is_file() for path in tmp_path.rglob("*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)  # so that the signal arrives midway on any disk
    assert command.files(tmp_path)
    assert not (tmp_path / "out" / "config.json").exists()
    process.send_signal(kind)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=command.TIMEOUT_S)
    assert_interrupted(process.returncode, err.decode())
    assert command.files(tmp_path) == {}


EARLY = """if True:
    import os, signal, sys
    at = sys.argv.pop(1)

    class Interrupter:
        def find_spec(self, name, path=None, target=None):
            if name == at:
                os.kill(os.getpid(), signal.SIGINT)

    sys.meta_path.insert(0, Interrupter())
    from llava.cli import main
    main()"""


@pytest.mark.parametrize("module", ["typer", "llava.cli.zoo", "llava.checkpoint.inspect", "torch", "safetensors"])
def test_ctrl_c_during_an_import_is_quiet(module: str, slow: Path) -> None:
    argv = [sys.executable, "-c", EARLY, module, "inspect", str(slow)]
    done = subprocess.run(argv, capture_output=True, timeout=command.TIMEOUT_S, cwd=command.PROJECT, check=False)
    assert_interrupted(done.returncode, done.stderr.decode())
    assert done.stdout == b""


def test_ctrl_c_while_the_script_writes_leaves_no_files(slow: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.pth"
    argv = [*command.CONVERT_HF, "--checkpoint_dir", str(slow), "--output", str(target)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.001)
    assert not target.exists()
    code, _, err = command.interrupt(process)
    assert_interrupted(code, err)
    assert command.files(tmp_path) == {}


def test_ctrl_c_while_answering_exits_quietly(slow: Path) -> None:
    process = command.start("ask", "Say hello.", "--model", slow, "--max-new-tokens", 3000)
    seen = command.wait_for_output(process)  # which also shows that the answer is streamed
    assert seen
    code, _, err = command.interrupt(process)
    assert_interrupted(code, err)


def test_ctrl_c_in_a_chat_stops_the_reply_and_keeps_the_conversation(slow: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    process = command.start("chat", "--model", slow, "--max-new-tokens", 3000, "--temperature", 0)
    assert process.stdin is not None
    process.stdin.write(b"Say hello.\n")
    before = command.wait_for_output(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, before
    process.stdin.write(f"/save {saved}\n/quit\n".encode())
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert b"Traceback" not in err
    assert "Say hello." in saved.read_text(), out
