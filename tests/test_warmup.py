"""A warm-up runs every kind of request, and the next process compiles nothing."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch

import llava
from llava.config import EngineOptions
from llava.warmup import batch_sizes, fill_caches, warm_up
from tests.command import LLAVA, assert_one_line_error, run, run_well

GPU = torch.cuda.is_available()


def test_a_picture_and_every_batch_size_run(checkpoint: Path):
    vlm = llava.load(checkpoint, device="cpu", engine=EngineOptions(max_batch=3))
    assert list(warm_up(vlm)) == ["picture", "sampling", "batch 1", "batch 2", "batch 3"]
    vlm.engine.check()
    assert not vlm.engine.has_requests
    assert vlm.engine.stats().prefix_hit_tokens == 0


def test_a_language_model_warms_up_without_a_picture(base: Path):
    vlm = llava.load(base, device="cpu", vision=False, engine=EngineOptions(max_batch=1))
    assert list(warm_up(vlm)) == ["sampling", "batch 1"]


def test_questions_that_begin_alike_share_their_beginning(base: Path):
    vlm = llava.load(base, device="cpu", vision=False, engine=EngineOptions(max_batch=16))
    assert list(warm_up(vlm))[:2] == ["sampling", "questions"]
    hits = vlm.engine.stats().prefix_hit_tokens / 15  # of each question after the first
    assert hits >= 64


@pytest.mark.parametrize(
    ("max_batch", "sizes"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (64, [1, 2, 4, 8, 16, 24, 32, 48, 64])]
)
def test_batch_sizes_are_those_of_graphs_and_the_largest_batch(max_batch: int, sizes: list[int]):
    assert batch_sizes(max_batch) == sizes


def test_kernels_that_were_in_the_cache_do_not_count_as_compiled(checkpoint: Path, tmp_path: Path):
    vlm = llava.load(checkpoint, device="cpu", engine=EngineOptions(max_batch=1))
    (tmp_path / "hash").mkdir()
    (tmp_path / "hash" / "add_kernel.cubin").write_bytes(b"x" * 2000)
    warmed = fill_caches(vlm, {"triton": tmp_path, "inductor": tmp_path / "none"})
    assert (warmed.compiled, warmed.cached) == ([], 1)
    assert warmed.cache_bytes == {str(tmp_path): 2000, str(tmp_path / "none"): 0}
    assert "compiled 0 kernels; 1 were in the cache" in warmed.text()
    assert f"{tmp_path}: 2.00 kB" in warmed.text()


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_a_cpu_needs_no_warm_up_and_no_model_is_loaded(tmp_path: Path):
    assert run_well("warmup", tmp_path / "no-model").stdout.startswith("nothing to warm up: the device is cpu")
    found = json.loads(run_well("warmup", tmp_path / "no-model", "--json").stdout)
    assert found == {"device": "cpu", "seconds": {}, "compiled": [], "cached": 0, "cache_bytes": {}}


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [(("--max-batch", 0), "--max-batch is 0"), (("--device", "cuda:99"), "device 'cuda:99' does not exist")],
)
def test_wrong_options_are_refused(tmp_path: Path, arguments: tuple[object, ...], mention: str):
    assert_one_line_error(run("warmup", tmp_path / "no-model", *arguments), mention)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU: pytest -m gpu")
def test_a_second_process_compiles_nothing(checkpoint: Path, tmp_path: Path):
    unset = {"TRITON_CACHE_DIR": "", "TORCHINDUCTOR_CACHE_DIR": "", "TRITON_HOME": ""}
    environment = os.environ | unset | {"XDG_CACHE_HOME": str(tmp_path)}
    warmup = ("warmup", checkpoint, "--max-batch", 4, "--dtype", "bfloat16", "--json")
    first, second = (json.loads(run_well(*warmup, env=environment, command=LLAVA).stdout) for _ in range(2))
    assert (second["compiled"], second["cached"]) == ([], len(first["compiled"]))
    assert stat.S_IMODE((tmp_path / "llava" / "kernels").stat().st_mode) == 0o700
