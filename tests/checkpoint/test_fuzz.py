"""Corrupted checkpoint folders load correctly or fail with one clear error: random corruptions, and past findings."""

import contextlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.checkpoint.inspect import describe
from llava.errors import LlavaError
from tests import mutate, tiny
from tests.conftest import PROJECT


def run(n: int, seed: int, folder: Path) -> dict[str, Any]:
    """Runs `python -m tests.fuzz`, which forks workers, and returns its results."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--n", str(n), "--seed", str(seed)]
    command += ["--out", str(folder / "results.json")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, errors="replace", check=False)
    assert (folder / "results.json").is_file(), done.stderr[-2000:]
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def assert_all_good(results: dict[str, Any], n: int) -> None:
    assert results["failures"] == []
    assert sum(results["outcomes"].values()) == n
    assert results["outcomes"]["refused"] > n // 4
    assert results["outcomes"]["same"] > n // 10
    assert len(results["kinds"]) == len(mutate.MUTATIONS)


def test_two_hundred_corrupted_folders_load_correctly_or_fail_with_one_clear_error(tmp_path: Path) -> None:
    assert_all_good(run(200, 2026, tmp_path), 200)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_corrupted_folders_load_correctly_or_fail_with_one_clear_error(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("markexpr") != "slow":
        pytest.skip("takes minutes; run it with: python -m pytest -m slow tests/checkpoint/test_fuzz.py")
    assert_all_good(run(2000, 0, tmp_path), 2000)


def test_the_fuzz_detects_code_and_writes(tmp_path: Path) -> None:
    """`Watch` records new files and folders and new processes while it is on."""
    code = """
import os, sys, pickle
from pathlib import Path
from tests import fuzz
watch = fuzz.Watch()
watch.on = True
Path("a").write_text("x")
os.mkdir("b")
os.system("true")
watch.on = False
Path("c").write_text("x")
print(len(watch.seen), "a" in watch.seen[0], "b" in watch.seen[1], "os.system" in watch.seen[2])
"""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["3", "True", "True", "True"]


# ---------------------------------------------------------------------------------------- past findings


def config(word: str, **changes: Any) -> Callable[[Path], str]:
    """A fault in config.json; applying it returns the word that the error must contain."""

    def spoil(folder: Path) -> str:
        tiny.edit_json(folder / "config.json", **changes)
        return word

    return spoil


def json_file(name: str, word: str, **changes: Any) -> Callable[[Path], str]:
    def spoil(folder: Path) -> str:
        before = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps({**before, **changes}))
        return word

    return spoil


def tower(key: str, value: Any) -> Callable[[Path], str]:
    def spoil(folder: Path) -> str:
        clip = folder.parent / "clip"
        values = json.loads((clip / "config.json").read_text())
        values["vision_config"][key] = value
        tiny.write_json(clip / "config.json", values)
        return "vision"

    return spoil


def entry(make: Callable[[torch.Tensor], Any], name: str = "model.norm.weight") -> Callable[[Path], str]:
    """A fault in a .bin file: another object in place of one tensor."""

    def spoil(folder: Path) -> str:
        path = folder / "pytorch_model.bin"
        tensors = torch.load(path)
        torch.save({**tensors, name: make(tensors[name])}, path)
        return path.name

    return spoil


def numbered(folder: Path) -> str:
    path = folder / "pytorch_model.bin"
    torch.save({5: torch.zeros(2), **torch.load(path)}, path)
    return path.name


def tar(folder: Path) -> str:
    """A tar archive in place of a .bin file; torch.load would unpack it."""
    path = folder / "pytorch_model.bin"
    with tarfile.open(path, "w") as archive:
        archive.add(folder / "config.json", "storages")
    return path.name


def deep(folder: Path) -> str:
    (folder / "generation_config.json").write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
    return "generation_config.json"


def empty_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.model").write_bytes(b"")
    return "tokenizer.model"


def a_device(folder: Path) -> str:
    """A link to a device that can be read without end."""
    (folder.parent / "clip" / "config.json").unlink()
    (folder.parent / "clip" / "config.json").symlink_to("/dev/zero")
    return "config.json"


def two_lines(folder: Path) -> str:
    path = folder / "pytorch_model.bin"
    torch.save({"a\nb": torch.zeros(2), **torch.load(path)}, path)
    return r"a\nb"


Q = "model.layers.0.self_attn.q_proj.weight"
FOUND: dict[str, Callable[[Path], str]] = {
    "a million layers": config("layers", num_hidden_layers=10**6),
    "a width that overflows": config("dim", hidden_size=2**62),
    "an MLP that overflows": config("mlp_dim", intermediate_size=2**62),
    "NaN for eps": config("eps", rms_norm_eps=float("nan")),
    "no heads": config("config.json", num_attention_heads=0),
    "architectures that are numbers": config("config.json", architectures=5),
    "rope scaling in words": config("rope_scaling", rope_scaling="linear"),
    "rope scaling without bounds": config("factor", rope_scaling={"type": "linear", "factor": 1e300}),
    "a canvas of a terapixel": config("pinpoints", image_aspect_ratio="anyres", image_grid_pinpoints=[[10**6, 10**6]]),
    "a canvas that is no multiple": config("pinpoints", image_aspect_ratio="anyres", image_grid_pinpoints=[[57, 55]]),
    "an activation in numbers": tower("hidden_act", 3),
    "a tower of a million layers": tower("num_hidden_layers", 10**6),
    "pictures of a gigapixel": tower("image_size", 10**9),
    "a token with a negative id": json_file("added_tokens.json", "tokens", x=-200),
    "a token with an id of 70 bits": json_file("added_tokens.json", "tokens", x=2**70),
    "two tokens with one id": json_file("added_tokens.json", "tokens", x=512, y=512),
    "an end token in numbers": json_file("tokenizer_config.json", "eos_token", eos_token=5),
    "a surrogate": json_file("added_tokens.json", "tokens", **{"\ud800": 513}),
    "deep nesting": deep,
    "an empty tokenizer": empty_tokenizer,
    "a device": a_device,
    "a sparse tensor": entry(lambda t: t.to_sparse()),
    "a complex tensor": entry(lambda t: t.to(torch.complex64)),
    "a tensor on no device": entry(lambda t: t.to("meta")),
    "a few bytes stretched to terabytes": entry(lambda t: t[:1].expand(10**6, 10**6)),
    "a single number among stacked parts": entry(lambda t: t.flatten()[0], Q),
    "parts of two widths": entry(lambda t: t[:, :32].clone(), Q),
    "names that are numbers": numbered,
    "a name of two lines": two_lines,
    "a tar": tar,
}


@pytest.mark.parametrize("fault", FOUND)
def test_past_findings_of_the_fuzz_are_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    clip = tiny.write_clip(tmp_path / "clip")
    folder = tiny.write_llava(tmp_path / "llava", clip=clip, layout="bin")
    word = FOUND[fault](folder)
    with pytest.raises(LlavaError) as caught:
        llava.load(folder)
    assert word in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("fault", FOUND)
def test_inspect_describes_or_refuses_past_findings_of_the_fuzz(tmp_path: Path, fault: str) -> None:
    clip = tiny.write_clip(tmp_path / "clip")
    folder = tiny.write_llava(tmp_path / "llava", clip=clip, layout="bin")
    FOUND[fault](folder)
    with contextlib.suppress(LlavaError):
        json.dumps(describe(folder).sizes)
