"""On a GPU, steps of the fused decoder as graphs give what they give without, and what the plain decoder gives."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.assistant import Assistant
from llava.config import EngineOptions
from llava.engine.engine import Engine
from llava.engine.fused import FusedRunner
from llava.engine.sampling_params import SamplingParams
from llava.preprocess.inputs import ModelInput
from tests import tiny
from tests.schedules import WINDOW, Reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu"),
]

MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: tiny.write_llama(folder / "m"),
    "gqa": lambda folder: tiny.write_llama(folder / "m", num_key_value_heads=2),
    "window": lambda folder: tiny.write_llava(folder / "m", clip=tiny.write_clip(folder / "clip"), **WINDOW),
    "mpt": lambda folder: tiny.write_mpt(folder / "m", clip=tiny.write_clip(folder / "clip")),
}
N_ROWS = (1, 3, 5, 17)


@pytest.fixture(scope="module", params=MODELS)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    folder = MODELS[request.param](tmp_path_factory.mktemp(request.param))
    return llava.load(folder, device="cuda", dtype="bfloat16")


def prompt(vlm: Assistant, n_tokens: int, seed: int) -> ModelInput:
    """A prompt of random ids."""
    input = vlm.prepare("Hi")
    ids = torch.randint(3, tiny.PIECES, (n_tokens,), generator=torch.Generator().manual_seed(seed))
    return ModelInput(**{**input.__dict__, "ids": ids})


def engine(vlm: Assistant, *, graphs: bool, **options: Any) -> Engine:
    return Engine(vlm.engine.variants, EngineOptions(graphs=graphs, prefix_cache=False, **options))


def only(one: Engine) -> FusedRunner:
    (fused,) = one.runner.fused.values()
    return fused


def check(vlm: Assistant, asked: Sequence[ModelInput], replies: Sequence[Sequence[int]]) -> None:
    """A token may be another than that of the plain decoder in float32 only where rounding to bfloat16 allows it."""
    (variant,) = vlm.engine.variants.values()
    exact = Reference(variant._replace(model=copy.deepcopy(variant.model).float()))
    rounded = Reference(variant)
    for input, reply in zip(asked, replies, strict=True):
        wanted, near = (one.logits(input, list(reply))[: len(reply)] for one in (exact, rounded))
        allowed = 4 * (near - wanted).abs().amax()
        ids = torch.tensor(reply, device=wanted.device)
        assert (wanted.amax(-1) - wanted.gather(1, ids[:, None])[:, 0]).amax() < allowed


def greedy(one: Engine, asked: Sequence[ModelInput], n: int = 10) -> list[list[int]]:
    replies = one.generate(asked, SamplingParams(max_new_tokens=n))
    one.check()
    return [reply.token_ids for reply in replies]


def test_batches_of_every_size_get_the_greedy_replies_of_the_plain_decoder(vlm: Assistant) -> None:
    with_graphs, without = (engine(vlm, graphs=graphs) for graphs in (True, False))
    for n in N_ROWS:
        asked = [prompt(vlm, 10 + 3 * i, i) for i in range(n)]
        for one in (with_graphs, without):
            check(vlm, asked, greedy(one, asked))
    assert {bucket for bucket, *_ in only(with_graphs)._decoding} >= {1, 4, 8, 24}
    assert not only(without)._decoding


@pytest.mark.parametrize("overlap", [False, True])
def test_a_single_row_gets_the_same_replies_with_graphs_and_without(vlm: Assistant, overlap: bool) -> None:
    """A bucket of one row is not padded, so the same kernels run; the prompts are computed without graphs."""
    with_graphs, without = (
        Engine(vlm.engine.variants, EngineOptions(graphs=graphs, prefix_cache=False), overlap=overlap)
        for graphs in (True, False)
    )
    for seed in range(3):
        asked = [prompt(vlm, 40 + 64 * seed, seed)]
        assert greedy(with_graphs, asked, 24) == greedy(without, asked, 24)


def test_prompts_of_a_length_seen_before_run_as_graphs(vlm: Assistant) -> None:
    one = engine(vlm, graphs=True)
    for seed, n in enumerate((70, 70, 100, 128, 65, 20, 20)):
        asked = [prompt(vlm, n, seed)]
        check(vlm, asked, greedy(one, asked, 4))
    plain = only(one).fused.how
    expected = [] if plain.slopes is not None or plain.window is not None else [64, 128]
    assert sorted(only(one).prompts.captured) == expected


def test_chunks_beside_decoding_rows_get_the_replies_of_the_plain_decoder(vlm: Assistant) -> None:
    one = engine(vlm, graphs=True, chunk_tokens=24, max_batch=6, page_size=5)
    asked = [prompt(vlm, 11 + 7 * i, i) for i in range(12)]
    check(vlm, asked, greedy(one, asked, 12))


def test_adapters_beside_a_base_run_with_the_plain_decoder(clip: Path, tmp_path: Path) -> None:
    base = tiny.write_llama(tmp_path / "base")
    folder = tiny.write_lora(tmp_path / "cats", clip=clip)
    vlm = llava.load(base, adapters={"cats": folder}, device="cuda", dtype="bfloat16")
    one = engine(vlm, graphs=True)
    assert not one.runner.fused
    params = SamplingParams(max_new_tokens=8)
    replies = [one.generate(["Once upon a time"], params, adapter=name)[0].token_ids for name in (None, "cats")]
    assert replies[0] != replies[1]
    one.check()


def test_a_step_that_cannot_be_captured_runs_without_graphs_after_one_warning(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    vlm = llava.load(MODELS["llama"](tmp_path), device="cuda", dtype="bfloat16")
    asked = [prompt(vlm, 20, i) for i in range(3)]
    one = engine(vlm, graphs=True)
    step = only(one)._step

    def waiting(*arguments: Any) -> Any:
        result = step(*arguments)
        result[0].sum().item()  # waits for the device, which a capture does not allow
        return result

    only(one)._step = waiting  # type: ignore[method-assign]
    check(vlm, asked, greedy(one, asked))
    assert [record.name for record in caplog.records].count("llava.engine.graphs") == 1
    assert "--no-graphs" in caplog.text
    assert not only(one)._decoding
    assert torch.randn(2, device="cuda").isfinite().all()  # PyTorch can draw again
