"""With `overlap`, the next step is launched before the tokens of a step are read, and no reply changes."""

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import llava
from llava.assistant import Assistant, question_about
from llava.config import IMAGE, EngineOptions
from llava.engine.draw import Drawn, Token
from llava.engine.engine import Engine, Request
from llava.engine.reply import Reply
from llava.engine.sampling_params import SamplingParams
from llava.engine.scheduler import Scheduled
from llava.model.paged import cache_bytes_per_token
from tests import tiny
from tests.asking import opened

PICTURE = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
TEXT = "Once upon a time there was a painter who would only ever paint the sea."


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> Assistant:
    return opened(checkpoint)


def allowing_after(reply: Sequence[int]) -> Tensor:
    """A logits_mask that depends on the last token: it allows the ids above it, or half of them."""
    ids = torch.arange(tiny.PIECES)
    return ids > min(reply[-1], tiny.PIECES // 2) if reply else ids > 2


def requests() -> list[tuple[Request, SamplingParams]]:
    """Requests of all kinds: those that wait for the token before, and those that do not."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.7, "frequency_penalty": 0.4},
        {"repetition_penalty": 1.3},
        {"logits_mask": allowing_after},
        {"logprobs": 2, "stop": ("e", "is")},
        {"prompt_logprobs": 1, "temperature": 1.0},
        {"num_beams": 3},
    ]
    asked: list[Request] = [f"{TEXT} {i}" for i in range(7)]
    asked.append(question_about(PICTURE, "What is in the picture?"))
    return [
        (asked[(i + turn) % 8], SamplingParams(max_new_tokens=4 + 5 * turn + i, seed=i, **kind))
        for turn in range(3)
        for i, kind in enumerate(kinds)
    ]


def run(engine: Engine, *, preempt: float = 0.0) -> list[Reply]:
    """The replies to `requests`, some of which arrive late. preempt: how often a random sequence is preempted."""
    rng, sequences = random.Random(3), []
    waiting = requests()
    while waiting or engine.has_requests:
        for _ in range(min(len(waiting), rng.randint(0, 3))):
            engine.add_request(*waiting.pop(0))
            sequences.append(engine._inbox[-1])
        engine.step()
        engine.check()
        if engine.scheduler.running and rng.random() < preempt:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
        assert len(engine._in_flight) <= int(engine.overlap and bool(engine._unfinished))
    assert engine.stats().pages_used == 0
    return [Reply.of(one) for one in sequences]


def small(vlm: Assistant, n_pages: int) -> int:
    """The memory for `n_pages` pages of 4 tokens and their dense copies."""
    return 2 * n_pages * 4 * cache_bytes_per_token(vlm.config.decoder, torch.float32)


@pytest.mark.parametrize("preempt", [0.0, 0.3])
@pytest.mark.parametrize(
    "case", ["default", "small chunks", "tight cache", "no prefix cache", "one at a time", "invariant"]
)
def test_replies_are_those_of_steps_that_are_read_in_turn(vlm: Assistant, case: str, preempt: float) -> None:
    options = {
        "default": EngineOptions(),
        "small chunks": EngineOptions(chunk_tokens=7, max_batch=5, page_size=3),
        "tight cache": EngineOptions(page_size=4, max_batch=8, cache_memory=small(vlm, 150)),
        "no prefix cache": EngineOptions(prefix_cache=False, page_size=1),
        "one at a time": EngineOptions(max_batch=1),
        "invariant": EngineOptions(batch_invariant=True, chunk_tokens=30),
    }[case]
    variants = vlm.engine.variants
    expected = run(Engine(variants, options, overlap=False))
    found = run(Engine(variants, options, overlap=True), preempt=preempt)
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.top_logprobs == other.top_logprobs or one.logprobs
        assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=1e-4)
    assert {reply.finish_reason for reply in expected} == {"stop", "length"}


def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns a list that receives the requests of each step when it is launched, and "read" when it is read."""
    events: list[Any] = []
    launch, read = engine.runner.launch, Drawn.read

    def launching(scheduled: Sequence[Scheduled]) -> list[Drawn]:
        events.append({one.sequence.request for one in scheduled})
        return launch(scheduled)

    def reading(drawn: Drawn) -> Iterator[Token]:
        events.append("read")
        return read(drawn)

    monkeypatch.setattr(engine.runner, "launch", launching)
    monkeypatch.setattr(Drawn, "read", reading)
    return events


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_is_launched_before_the_one_before_it_is_read(
    vlm: Assistant, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(vlm.engine.variants, overlap=overlap)
    events = watched(engine, monkeypatch)
    reply = engine.generate([TEXT], SamplingParams(max_new_tokens=4))[0]
    assert len(reply.token_ids) == 4
    step = {0}
    in_turn = [step, "read"] * 4
    assert events == ([step, step, "read", step, "read", step, "read", "read"] if overlap else in_turn)


def test_only_rows_that_need_the_last_token_wait_for_it(vlm: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(vlm.engine.variants, overlap=True)
    events = watched(engine, monkeypatch)
    masked = engine.add_request(TEXT + "1", SamplingParams(max_new_tokens=3, logits_mask=allowing_after))
    other = engine.add_request("Another one", SamplingParams(max_new_tokens=6, temperature=1.0, logit_bias={77: 1.0}))
    while engine.has_requests:
        engine.step()
    launched = [event for event in events if event != "read"]
    assert launched == [{masked, other}, {other}, {masked, other}, {other}, {masked, other}, {other}]


def test_nothing_is_left_in_flight_when_requests_end(vlm: Assistant) -> None:
    """A reply that ends with a stop string while its next token is in flight, and one that is aborted."""
    whole = vlm.generate(TEXT, max_new_tokens=12)
    stop = whole.text[3:6]
    engine = Engine(vlm.engine.variants, EngineOptions(page_size=2), overlap=True)
    for _ in range(2):
        reply = engine.generate([TEXT], SamplingParams(max_new_tokens=12, stop=(stop,)))[0]
        assert (reply.finish_reason, reply.text) == ("stop", whole.text[: whole.text.index(stop)].rstrip())
        number = engine.add_request(TEXT, SamplingParams(max_new_tokens=12))
        engine.step()
        engine.step()
        engine.abort(number)
        assert [one.finish_reason for one in engine.step()] == ["abort"]
        assert not engine.has_requests
        assert not engine._in_flight
        assert engine.stats().pages_used == engine.stats().running == 0
        engine.check()


def test_pages_with_a_token_in_flight_are_cached_only_when_it_is_known(vlm: Assistant) -> None:
    """With pages of one token, each page of a reply is registered in the step in which its token is read."""
    options = EngineOptions(page_size=1)
    engine = Engine(vlm.engine.variants, options, overlap=True)
    stop = vlm.generate(TEXT, max_new_tokens=12).text[6:9]
    first = engine.generate([TEXT], SamplingParams(max_new_tokens=12, stop=(stop,)))[0]
    keys = [key for key in engine.blocks._key if key]
    ids = [array("q", key.content[32:40])[0] for key in keys]
    prompt = vlm.prepare(TEXT).ids.tolist()
    assert len(ids) >= len(prompt) + len(first.token_ids)
    assert all(id >= 0 or id == IMAGE for id in ids)
    longer = replace(vlm.prepare(TEXT), ids=torch.tensor([*prompt, *first.token_ids, 40, 50]))
    params = SamplingParams(max_new_tokens=9)
    expected = Engine(vlm.engine.variants, EngineOptions(prefix_cache=False)).generate([longer], params)[0]
    assert engine.generate([longer], params)[0].token_ids == expected.token_ids
    assert engine.stats().prefix_hit_tokens == len(prompt) + len(first.token_ids)


def test_a_step_that_fails_finds_the_tokens_in_flight_when_it_is_computed_again(clip: Path, tmp_path: Path) -> None:
    """Two adapters whose RoPE differs are computed one after the other; the second one's mask fails once."""
    stretched = {"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 1024}
    adapter = tiny.write_lora(tmp_path / "lora", clip=clip, **stretched)
    vlm = opened(tiny.write_llava(tmp_path / "model", clip=clip), adapters={"lora": adapter})
    params = SamplingParams(max_new_tokens=8, temperature=1.0, seed=1)
    expected = {name: vlm.engine.generate([TEXT], params, adapter=name)[0].token_ids for name in (None, "lora")}

    def failing(reply: Sequence[int]) -> Tensor:
        if len(reply) == 2:
            raise ValueError("on purpose")
        return torch.ones(tiny.PIECES, dtype=torch.bool)

    engine = Engine(vlm.engine.variants, overlap=True)
    bad = SamplingParams(max_new_tokens=8, logits_mask=failing)
    numbers = {engine.add_request(TEXT, params, adapter=name): name for name in expected}
    failed = engine.add_request(TEXT, bad, adapter="lora")
    ids: dict[int, list[int]] = {number: [] for number in [*numbers, failed]}
    while engine.has_requests:
        for output in engine.step():
            ids[output.request] += output.token_ids
            assert (output.error is not None) == (output.finish_reason == "error")
            assert output.request == failed or output.error is None
    assert {name: ids[number] for number, name in numbers.items()} == expected
    assert len(ids[failed]) == 2
    engine.check()


def test_only_a_gpu_overlaps_steps_unless_told(vlm: Assistant) -> None:
    assert not llava.load(dtype="float32", device="cpu").engine.overlap
    assert Engine(vlm.engine.variants, overlap=True).overlap
