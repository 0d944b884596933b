"""Steps of the fused decoder, eagerly and as graphs. On the CPU, `RecordedGraphs` stand for CUDA graphs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.assistant import Assistant
from llava.config import EngineOptions
from llava.engine import draw, prompt_graphs, runner
from llava.engine.draw import Drawn
from llava.engine.engine import Engine
from llava.engine.fused import BUCKETS
from llava.engine.reply import Reply
from llava.engine.sampling_params import SamplingParams
from llava.engine.scheduler import Scheduled
from llava.preprocess.inputs import ModelInput
from tests import tiny
from tests.asking import opened
from tests.recorded import RecordedGraphs
from tests.schedules import WINDOW

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_p": 0.9},
    "logprobs": {"logprobs": 3},
    "mask": {"logits_mask": lambda reply: torch.arange(tiny.PIECES) > (reply[-1] // 2 if reply else 2)},
    "bias": {"logit_bias": {77: 3.0}},
}
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: tiny.write_llava(folder / "m", clip=tiny.write_clip(folder / "clip")),
    "gqa": lambda folder: tiny.write_llama(folder / "m", num_key_value_heads=2),
    "window": lambda folder: tiny.write_llava(folder / "m", clip=tiny.write_clip(folder / "clip"), **WINDOW),
    "mpt": lambda folder: tiny.write_mpt(folder / "m", clip=tiny.write_clip(folder / "clip")),
}


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> Assistant:
    return opened(checkpoint)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> RecordedGraphs:
    """The graphs of the next engine."""
    recorded = RecordedGraphs(poison=False)
    monkeypatch.setattr(runner, "Graphs", lambda device, active: recorded)
    return recorded


def prompt(vlm: Assistant, n_tokens: int, seed: int = 0) -> ModelInput:
    """A prompt of random ids."""
    input = vlm.prepare("Hi")
    ids = torch.randint(3, tiny.PIECES, (n_tokens,), generator=torch.Generator().manual_seed(seed))
    return ModelInput(**{**input.__dict__, "ids": ids})


def bits(reply: Reply) -> tuple[Any, ...]:
    return reply.token_ids, [round(one, 4) for one in reply.logprobs or ()]


def replies(engine: Engine, asked: Sequence[Any], params: Any) -> list[tuple[Any, ...]]:
    found = [bits(reply) for reply in engine.generate(asked, params)]
    engine.check()
    return found


def check_pool(engine: Engine) -> None:
    """Makes a step fail whose token pool does not contain exactly what it drew."""
    launch = engine.runner.launch

    def checked(scheduled: Sequence[Scheduled]) -> list[Drawn]:
        before = engine.runner.pool.clone()
        drawn = launch(scheduled)
        for one in drawn:
            before[[sequence.pool_slot for sequence in one.sequences]] = one.ids
        assert torch.equal(engine.runner.pool, before)
        return drawn

    engine.runner.launch = checked  # type: ignore[method-assign]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kinds", [tuple(KINDS), ("greedy",), ("greedy", "logprobs"), ("greedy", "mask")], ids=str)
def test_requests_of_all_kinds_in_one_batch_get_the_replies_of_the_plain_decoder(
    kinds: tuple[str, ...], overlap: bool, vlm: Assistant, graphs: RecordedGraphs
) -> None:
    asked = [f"Once upon a time there was a painter {i}" for i in range(7)]
    params = [
        SamplingParams(max_new_tokens=5 + 2 * i, seed=i, **KINDS[kinds[i % len(kinds)]]) for i in range(len(asked))
    ]
    expected = replies(Engine(vlm.engine.variants, fused=False), asked, params)
    engine = Engine(vlm.engine.variants, fused=True, overlap=overlap)
    check_pool(engine)
    assert replies(engine, asked, params) == expected
    assert graphs.n_replays > 5


@pytest.mark.parametrize("name", MODELS)
def test_prompts_and_batches_of_every_size_get_the_replies_of_the_plain_decoder(
    name: str, tmp_path: Path, graphs: RecordedGraphs
) -> None:
    """Each length of a prompt comes several times: the first is computed eagerly, the others as a graph."""
    vlm = llava.load(MODELS[name](tmp_path), dtype="float32", device="cpu")
    engine, plain = (Engine(vlm.engine.variants, fused=fused, overlap=fused) for fused in (True, False))
    params = SamplingParams(max_new_tokens=6)
    for i, n in enumerate((70, 90, 65, 128, 20, 3, 64)):
        asked = [prompt(vlm, n, i)]
        assert replies(engine, asked, params) == replies(plain, asked, params), n
    for n in (1, 3, 5, 17):
        asked = [prompt(vlm, 5 + i, i) for i in range(n)]
        assert replies(engine, asked, params) == replies(plain, asked, params), n
    (fused,) = engine.runner.fused.values()
    assert {bucket for bucket, *_ in fused._decoding} <= set(BUCKETS)
    assert sorted(fused.prompts.captured) == {"mpt": [], "window": []}.get(name, [64, 128])


def test_nan_in_a_prompt_does_not_reach_the_next_one_in_the_same_graph(vlm: Assistant, graphs: RecordedGraphs) -> None:
    engine = Engine(vlm.engine.variants, EngineOptions(prefix_cache=False), fused=True)
    params = SamplingParams(max_new_tokens=3)
    asked = [prompt(vlm, 70, 1)]
    expected = replies(engine, asked, params)
    assert replies(engine, asked, params) == expected
    (fused,) = engine.runner.fused.values()
    _, inputs, _ = fused.prompts.captured[128]
    with torch.inference_mode():
        inputs.fill_(torch.nan)  # as a prompt with NaN in its picture leaves behind
    assert replies(engine, asked, params) == expected


def arriving(engine: Engine, groups: Sequence[Sequence[ModelInput]], params: SamplingParams) -> list[list[int]]:
    """Adds a group of prompts every third step. Returns the replies in the order of the prompts."""
    found: dict[int, list[int]] = {}
    for step in range(200):
        for input in groups[step // 3] if step % 3 == 0 and step // 3 < len(groups) else ():
            found[engine.add_request(input, params)] = []
        for output in engine.step():
            found[output.request] += output.token_ids
    engine.check()
    return list(found.values())


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("poison", [False, True])
def test_prompts_beside_decoding_rows_run_as_graphs_also_if_their_beginning_is_cached(
    poison: bool, overlap: bool, vlm: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    if poison and overlap:
        pytest.skip("on a CPU, a step in flight has no memory of its own that a replay leaves alone")
    graphs = RecordedGraphs(poison=poison)
    monkeypatch.setattr(runner, "Graphs", lambda device, active: graphs)
    monkeypatch.setattr(prompt_graphs, "_FULL", 60)
    begin = prompt(vlm, 37, 99).ids
    inputs = [prompt(vlm, n, i) for i, n in enumerate((70, 80, 66, 100, 75, 90, 68))]
    inputs = [ModelInput(**{**one.__dict__, "ids": torch.cat([begin, one.ids])}) for one in inputs]
    groups = [inputs[:1], inputs[1:2], inputs[2:4], inputs[4:]]
    params = SamplingParams(max_new_tokens=12)
    plain = Engine(vlm.engine.variants, fused=False)
    engine = Engine(vlm.engine.variants, fused=True, overlap=overlap)
    with_graphs: list[int] = []
    (fused,) = engine.runner.fused.values()
    compute = fused.prompts.logits

    def counted(one: Scheduled, x: torch.Tensor) -> torch.Tensor | None:
        assert one.sequence.computed == 32  # two pages of the common beginning are reused
        with_graphs.append(sum(row.is_decoding for row in engine.scheduler.running))
        return compute(one, x)

    monkeypatch.setattr(fused.prompts, "logits", counted)
    assert arriving(engine, groups, params) == arriving(plain, groups, params)
    assert len(with_graphs) >= 4
    assert all(with_graphs)  # rows were decoding meanwhile


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_fails_after_the_decoder_is_computed_again_from_the_same_tokens(
    overlap: bool, vlm: Assistant, graphs: RecordedGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, params = ["Once upon a time", "There was a"], SamplingParams(max_new_tokens=9, logprobs=2)
    expected = replies(Engine(vlm.engine.variants, fused=False), asked, params)
    compute, calls = draw.top_logprobs, []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) in (4, 9):
            raise torch.OutOfMemoryError("out of memory")
        return compute(*arguments)

    monkeypatch.setattr(draw, "top_logprobs", failing)
    assert replies(Engine(vlm.engine.variants, fused=True, overlap=overlap), asked, params) == expected


def test_a_step_that_cannot_be_captured_runs_eagerly_after_one_warning(
    vlm: Assistant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(RecordedGraphs):
        def _capture(self, function: Callable[[], Any]) -> Any:
            function()
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(runner, "Graphs", lambda device, active: Failing())
    asked, params = ["Once upon a time", "Hi"], SamplingParams(max_new_tokens=6)
    expected = replies(Engine(vlm.engine.variants, fused=False), asked, params)
    assert replies(Engine(vlm.engine.variants, fused=True, overlap=True), asked, params) == expected
    assert [record.message.count("not permitted when") for record in caplog.records] == [1]
    assert "--no-graphs" in caplog.text


def test_after_a_failed_capture_earlier_graphs_are_not_used_either(
    vlm: Assistant, graphs: RecordedGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, params = ["Once upon a time", "Hi", "The sea"], SamplingParams(max_new_tokens=6)
    expected = replies(Engine(vlm.engine.variants, fused=False), asked, params)
    engine = Engine(vlm.engine.variants, fused=True)
    assert replies(engine, asked[:1], params) == expected[:1]
    recorded = graphs.n_replays
    assert recorded

    def fail(function: Callable[[], Any]) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(graphs, "_capture", fail)
    assert replies(engine, asked, params) == expected  # needs a graph of more rows, which fails
    assert replies(engine, asked[1:2], params) == expected[1:2]
    assert graphs.n_replays == recorded


def test_only_a_gpu_uses_the_fused_decoder_unless_told(vlm: Assistant) -> None:
    assert not Engine(vlm.engine.variants).runner.fused
    assert list(Engine(vlm.engine.variants, fused=True).runner.fused) == [None]
    assert not Engine(vlm.engine.variants, EngineOptions(batch_invariant=True), fused=True).runner.fused


def test_graphs_of_several_decoders_do_not_overwrite_each_others_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "Graphs", lambda device, active: RecordedGraphs())
    models = [llava.load(tiny.write_llama(tmp_path / str(seed), seed=seed), dtype="float32") for seed in (1, 2)]
    names, params = (None, "other"), SamplingParams(max_new_tokens=6)
    expected = [one.engine.generate(["Once upon a time"], params)[0].token_ids for one in models]
    variants = {name: one.engine.variants[None] for name, one in zip(names, models, strict=True)}
    engine = Engine(variants, fused=True)
    assert len(engine.runner.fused) == 2
    found: dict[int, list[int]] = {engine.add_request("Once upon a time", params, adapter=name): [] for name in names}
    while engine.has_requests:
        for output in engine.step():
            found[output.request] += output.token_ids
    assert list(found.values()) == expected
