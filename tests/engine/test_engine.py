"""The engine as its callers see it: requests in, outputs out, whatever else happens at the same time."""

import gc
import logging
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import llava
from llava.assistant import Assistant, question_about
from llava.config import EngineOptions
from llava.engine import input_processor
from llava.engine.engine import Engine, Request
from llava.engine.reply import Output
from llava.engine.sampling_params import SamplingParams
from llava.errors import ConfigError, ImageError, LlavaError, PromptError
from llava.model.paged import cache_bytes_per_token

pytestmark = pytest.mark.usefixtures("overlap")

PICTURE = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
OTHER = PICTURE.rotate(90, expand=True)
RAW = "A raw prompt without a picture. ASSISTANT:"
MESSAGES = question_about(PICTURE, "What is in the picture?")
MAX_STEPS = 5000  # far more than any test needs; a request that never finishes fails instead of hanging


@pytest.fixture(scope="module")
def vlm(overlap: bool) -> Assistant:
    return opened()


def opened(**options: Any) -> Assistant:
    return llava.load(dtype="float32", device="cpu", engine=EngineOptions(**options))


def pages(vlm: Assistant, n: int) -> int:
    """Returns the memory in bytes for `n` pages of 16 tokens and their dense copies."""
    return n * 2 * 16 * cache_bytes_per_token(vlm.config.decoder, torch.float32)


def greedy(n: int = 8, **options: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=n, **options)


def outputs(engine: Engine) -> dict[int, list[Output]]:
    """Computes steps until every request has finished. Returns the outputs of each."""
    found: dict[int, list[Output]] = {}
    for _ in range(MAX_STEPS):
        if not engine.has_requests:
            engine.check()
            assert engine.stats().pages_used == 0
            return found
        for output in engine.step():
            found.setdefault(output.request, []).append(output)
    raise AssertionError(f"requests are unfinished after {MAX_STEPS} steps: {engine.stats()}")


def ids(of_request: Iterable[Output]) -> list[int]:
    return [id for output in of_request for id in output.token_ids]


def text(of_request: Iterable[Output]) -> str:
    return "".join(output.text for output in of_request)


def alone(vlm: Assistant, requests: Sequence[Request], params: SamplingParams) -> list[list[int]]:
    return [vlm.engine.generate([request], params)[0].token_ids for request in requests]


def questions(n: int) -> list[Request]:
    return [f"Question {i}: what is {i} times {i + 3}? ASSISTANT:" for i in range(n)]


def long_prompt(vlm: Assistant) -> str:
    return "word " * (vlm.config.decoder.max_seq + 10)


def with_nan(vlm: Assistant) -> Request:
    """Returns a prepared question about a picture whose pixels are NaN."""
    input = vlm.prepare(question_about(OTHER, "What is broken here?"))
    assert input.pixels is not None
    return replace(input, pixels=torch.full_like(input.pixels, torch.nan))


def raising(vlm: Assistant, error: BaseException, *, after: int, times: int) -> Callable[[Sequence[int]], Tensor]:
    """Returns a logits_mask that allows everything, but raises an error this often, after so many tokens."""
    left = [error] * times

    def mask(reply: Sequence[int]) -> Tensor:
        if len(reply) >= after and left:
            raise left.pop()
        return torch.ones(vlm.config.decoder.vocab_size, dtype=torch.bool)

    return mask


# ------------------------------------------------------------------------------------------------------------- forms


def test_every_kind_of_input_gives_the_reply_of_generate(vlm: Assistant) -> None:
    prepared = vlm.prepare(MESSAGES)
    raw_with_picture = (f"<image>\n{RAW}", [PICTURE])
    expected = [
        vlm.generate(MESSAGES, max_new_tokens=8),
        vlm.generate(MESSAGES, max_new_tokens=8),
        vlm.generate(RAW, max_new_tokens=8),
        vlm.generate(raw_with_picture[0], images=[PICTURE], max_new_tokens=8),
    ]
    requests: list[Request] = [prepared, MESSAGES, RAW, raw_with_picture]
    numbers = [vlm.engine.add_request(request, greedy()) for request in requests]
    assert len(set(numbers)) == 4
    found = outputs(vlm.engine)
    for number, reply in zip(numbers, expected, strict=True):
        assert ids(found[number]) == reply.token_ids
        assert text(found[number]) == reply.text
        assert [one.finish_reason for one in found[number]] == [None] * (len(found[number]) - 1) + [reply.finish_reason]
        assert all(one.request == number and one.error is None for one in found[number])


def test_outputs_never_contain_a_stop_string_that_spans_tokens(vlm: Assistant) -> None:
    whole = vlm.generate(RAW, max_new_tokens=24)
    for start in range(2, len(whole.text) - 6, 5):
        stop = whole.text[start : start + 5]
        params = greedy(24, stop=(stop,))
        reply = vlm.engine.generate([RAW], params)[0]
        number = vlm.engine.add_request(RAW, params)
        found = outputs(vlm.engine)[number]
        assert text(found) == reply.text == whole.text[: whole.text.index(stop)].rstrip()
        assert ids(found) == reply.token_ids == whole.token_ids[: len(reply.token_ids)]
        assert found[-1].finish_reason == reply.finish_reason == "stop"


def test_an_unknown_adapter_is_refused_when_the_request_is_added(vlm: Assistant) -> None:
    for call in (vlm.engine.add_request, vlm.engine.stream):
        with pytest.raises(ConfigError, match="unknown adapter 'cats'; available: none"):
            call(RAW, adapter="cats")
    with pytest.raises(ConfigError, match="unknown adapter 'cats'"):
        vlm.engine.generate([RAW], adapter="cats")
    assert not vlm.engine.has_requests


def test_lower_priority_numbers_are_served_first() -> None:
    engine = opened(max_batch=1).engine
    numbers = [engine.add_request(RAW, greedy(2), priority=priority) for priority in (2, 0, 1, -1)]
    finished = list(outputs(engine))
    assert finished == [numbers[3], numbers[1], numbers[2], numbers[0]]


@pytest.mark.parametrize("n_steps", [0, 1, 3])
def test_an_aborted_request_ends_at_the_next_step_with_what_it_has(vlm: Assistant, n_steps: int, overlap: bool) -> None:
    expected = alone(vlm, [RAW], greedy(20))[0]
    number = vlm.engine.add_request(RAW, greedy(20))
    found = [output for _ in range(n_steps) for output in vlm.engine.step()]
    vlm.engine.abort(number)
    found += vlm.engine.step()
    assert found[-1].finish_reason == "abort"
    assert found[-1].error is None
    assert ids(found) == expected[: max(0, n_steps - overlap)]  # without the token in flight
    assert not vlm.engine.has_requests
    vlm.engine.check()


def test_aborting_a_finished_or_unknown_request_does_nothing(vlm: Assistant) -> None:
    number = vlm.engine.add_request(RAW, greedy(2))
    outputs(vlm.engine)
    vlm.engine.abort(number)
    vlm.engine.abort(10**9)
    assert vlm.engine.step() == []
    assert len(vlm.engine.generate([RAW], greedy(2))[0].token_ids) == 2


def test_generate_replies_in_order_with_one_or_many_parameters(vlm: Assistant) -> None:
    requests = questions(6)
    lengths = [7, 1, 4, 0, 2, 9]
    expected = [own[:n] for own, n in zip(alone(vlm, requests, greedy(9)), lengths, strict=True)]
    replies = vlm.engine.generate(requests, [greedy(n) for n in lengths])
    assert [reply.token_ids for reply in replies] == expected
    assert [reply.usage.completion_tokens for reply in replies] == lengths
    assert [len(reply.token_ids) for reply in vlm.engine.generate(requests, greedy(3))] == [3] * 6
    assert vlm.engine.generate([], greedy(3)) == vlm.engine.generate([], []) == []


def test_generate_refuses_another_number_of_parameters(vlm: Assistant) -> None:
    with pytest.raises(ConfigError, match="params: found 2 for 3 inputs; expected one, or one per input"):
        vlm.engine.generate(questions(3), [greedy(), greedy()])


def test_generate_raises_the_first_error_after_the_others_have_finished(vlm: Assistant) -> None:
    seen: dict[int, int] = {}

    def recording(i: int) -> Callable[[Sequence[int]], Tensor]:
        def mask(reply: Sequence[int]) -> Tensor:
            seen[i] = len(reply) + 1
            return torch.ones(vlm.config.decoder.vocab_size, dtype=torch.bool)

        return mask

    each = [greedy(6, logits_mask=recording(i)) for i in range(4)]
    each[1] = greedy(6, logits_mask=raising(vlm, ValueError("the first"), after=3, times=2))
    requests = [*questions(3), long_prompt(vlm)]
    with pytest.raises(LlavaError, match="the first"):
        vlm.engine.generate(requests, each)
    assert seen == {0: 6, 2: 6}
    assert not vlm.engine.has_requests
    vlm.engine.check()


def test_stats_count_sequences_pages_and_hits() -> None:
    vlm = opened(max_batch=2)
    engine = vlm.engine
    n_pages = engine.stats().pages_free
    assert engine.stats() == type(engine.stats())(
        running=0,
        waiting=0,
        pages_used=0,
        pages_free=n_pages,
        prefix_hit_tokens=0,
        feature_hits=0,
        feature_misses=0,
        vision_s=0.0,
    )
    for question in questions(3):
        engine.add_request(question, greedy(4))
    assert (engine.stats().running, engine.stats().waiting) == (0, 3)
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (2, 1)
    assert stats.pages_used > 0
    assert stats.pages_used + stats.pages_free == n_pages
    outputs(engine)
    assert engine.stats().pages_free == n_pages


# ------------------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("fault", ["bad picture", "too long", "logits_mask", "nan"])
def test_a_fault_in_one_request_does_not_touch_the_others(vlm: Assistant, fault: str) -> None:
    others: list[Request] = [*questions(3), MESSAGES]
    expected = alone(vlm, others, greedy(12))
    engine = opened().engine
    numbers = [engine.add_request(request, greedy(12)) for request in others]
    found = [output for _ in range(2) for output in engine.step()]
    failed = None
    if fault == "bad picture":
        with pytest.raises(ImageError):
            engine.add_request(("<image>\nWhat?", [b"no picture"]))
    elif fault == "too long":
        with pytest.raises(PromptError, match="exceeds the model's context"):
            engine.add_request(long_prompt(vlm))
    elif fault == "logits_mask":
        failed = engine.add_request(
            RAW, greedy(12, logits_mask=raising(vlm, ZeroDivisionError("oops"), after=2, times=2))
        )
    else:
        failed = engine.add_request(with_nan(vlm), greedy(12))
    late = engine.add_request(RAW, greedy(12))
    by_request = {number: [one for one in found if one.request == number] for number in numbers}
    for number, more in outputs(engine).items():
        by_request.setdefault(number, []).extend(more)
    assert [ids(by_request[number]) for number in numbers] == expected
    assert ids(by_request[late]) == alone(vlm, [RAW], greedy(12))[0]
    if failed is not None:
        last = by_request[failed][-1]
        assert last.finish_reason == "error"
        assert isinstance(last.error, LlavaError)
        assert ("oops" if fault == "logits_mask" else "NaN") in str(last.error)


def test_pages_that_held_nan_can_be_used_again(vlm: Assistant) -> None:
    requests = [*questions(4), MESSAGES]
    expected = alone(vlm, requests, greedy(12))
    engine = opened(cache_memory=pages(vlm, vlm.config.decoder.max_seq // 16), max_batch=4, prefix_cache=False).engine
    for _ in range(3):
        with pytest.raises(LlavaError, match="NaN"):
            engine.generate([with_nan(vlm)] * 2, greedy(12))
        assert [reply.token_ids for reply in engine.generate(requests, greedy(12))] == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["KeyboardInterrupt", "SystemExit"])
@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupted_step_is_computed_again(vlm: Assistant, error: BaseException, after: int) -> None:
    others: list[Request] = [*questions(3), MESSAGES]
    expected = alone(vlm, [*others, RAW], greedy(10))
    engine = opened().engine
    numbers = [engine.add_request(request, greedy(10)) for request in others]
    numbers.append(engine.add_request(RAW, greedy(10, logits_mask=raising(vlm, error, after=after, times=1))))
    found: dict[int, list[Output]] = {number: [] for number in numbers}
    interrupts = 0
    for _ in range(MAX_STEPS):
        if not engine.has_requests:
            break
        try:
            for output in engine.step():
                found[output.request].append(output)
        except (KeyboardInterrupt, SystemExit):
            interrupts += 1
            engine.check()
    assert interrupts == 1
    assert [ids(found[number]) for number in numbers] == expected
    engine.check()


@pytest.mark.parametrize("part", ["scheduler.remove", "scheduler.release", "blocks.release"])
def test_an_interrupt_while_a_request_ends_does_not_make_it_wait_for_ever(
    vlm: Assistant, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(vlm, [RAW, MESSAGES], greedy(4))
    engine = opened().engine
    owner, name = part.split(".")
    original, left = getattr(getattr(engine, owner), name), [KeyboardInterrupt()]

    def interrupted(*args: Any) -> None:
        if left:
            raise left.pop()
        original(*args)

    numbers = [engine.add_request(request, greedy(4)) for request in (RAW, MESSAGES)]
    monkeypatch.setattr(getattr(engine, owner), name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        outputs(engine)
    found = outputs(engine)
    assert [found[number][-1].finish_reason for number in numbers] == ["length", "length"]
    # the first three steps of each were taken by the call that has been interrupted
    assert [ids(found[number]) for number in numbers] == [own[3:] for own in expected]


# ----------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("end", ["dropped", "closed"])
def test_a_stream_that_nobody_reads_is_aborted(vlm: Assistant, end: str) -> None:
    engine = vlm.engine
    streams = [engine.stream(RAW, greedy(50))]
    next(streams[0])
    assert engine.stats().running == 1
    if end == "closed":
        streams[0].close()
    else:
        streams.clear()
        gc.collect()
    assert engine.step() == []
    assert not engine.has_requests
    assert engine.stats().running == engine.stats().pages_used == 0
    engine.check()


def test_two_streams_can_be_read_in_turn(vlm: Assistant) -> None:
    expected = [vlm.generate(question, max_new_tokens=12).text for question in (RAW, MESSAGES)]
    streams = [vlm.begin(question, max_new_tokens=12) for question in (RAW, MESSAGES)]
    found = ["", ""]
    for _ in range(12):
        for i, stream in enumerate(streams):
            found[i] += next(stream, "")
    assert found == expected
    assert [stream.reply().text for stream in streams] == expected


def test_outputs_of_streams_are_not_returned_by_step(vlm: Assistant) -> None:
    stream = vlm.engine.stream(RAW, greedy(6))
    number = vlm.engine.add_request(MESSAGES, greedy(9))
    assert set(outputs(vlm.engine)) == {number}
    assert "".join(stream) == vlm.generate(RAW, max_new_tokens=6).text


def test_threads_share_the_engine(vlm: Assistant) -> None:
    texts = [f"Question {i}" for i in range(4)]
    expected = [vlm.ask(PICTURE, question, max_new_tokens=6) for question in texts]
    added = questions(6)
    expected_ids = alone(vlm, added, greedy(6))
    answers: list[list[str]] = [[] for _ in texts]
    found: dict[int, list[Output]] = {}
    numbers: list[int] = []

    def ask(i: int) -> None:
        for _ in range(4):
            answers[i].append(vlm.ask(PICTURE, texts[i], max_new_tokens=6))

    def run() -> None:
        for question in added:
            numbers.append(vlm.engine.add_request(question, greedy(6)))
            vlm.engine.abort(vlm.engine.add_request(question, greedy(6)))
            for output in vlm.engine.step():
                found.setdefault(output.request, []).append(output)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)] + [threading.Thread(target=run)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for number, more in outputs(vlm.engine).items():
        found.setdefault(number, []).extend(more)
    assert answers == [[one] * 4 for one in expected]
    assert [ids(found[number]) for number in numbers] == expected_ids


# ------------------------------------------------------------------------------- seeds, prefixes, and several pictures


def test_a_seed_gives_the_same_text_alone_in_a_batch_and_under_preemption(vlm: Assistant) -> None:
    endless = {vlm.preprocessor.tokenizer.eos_id: -torch.inf}
    each = [greedy(40, temperature=1.0, seed=i, top_p=0.95, logit_bias=endless) for i in range(8)]
    requests = questions(8)
    expected = [vlm.engine.generate([request], own)[0].text for request, own in zip(requests, each, strict=True)]
    assert len(set(expected)) == 8
    assert [reply.text for reply in vlm.engine.generate(requests, each)] == expected
    longest = max(len(vlm.prepare(request).ids) for request in requests)  # type: ignore[arg-type]
    small = opened(cache_memory=pages(vlm, 2 * (-(-(longest + 40) // 16)))).engine
    preempted: list[int] = []
    preempt = small.scheduler.preempt
    small.scheduler.preempt = lambda sequence: (preempted.append(sequence.id), preempt(sequence))[1]  # type: ignore
    assert [reply.text for reply in small.generate(requests, each)] == expected
    assert preempted
    small.check()


def test_the_second_turn_of_a_chat_computes_only_what_is_new() -> None:
    vlm = opened()
    first = vlm.generate(MESSAGES, max_new_tokens=20)
    before = vlm.engine.stats()
    assert before.prefix_hit_tokens == before.feature_hits == 0
    turn = [*MESSAGES, {"role": "assistant", "content": first.text}, {"role": "user", "content": "Is that all?"}]
    second = vlm.generate(turn, max_new_tokens=20)
    hits = vlm.engine.stats().prefix_hit_tokens
    assert hits >= first.usage.prompt_tokens - 2 * 16
    assert second.token_ids == opened(prefix_cache=False).generate(turn, max_new_tokens=20).token_ids


def test_another_question_about_a_picture_does_not_encode_it_again() -> None:
    vlm = opened(prefix_cache=False)
    for n, question in enumerate(("What is it?", "Where is it?", "Who is it?")):
        vlm.ask(PICTURE, question, max_new_tokens=2)
        assert vlm.engine.stats().feature_hits == n


def test_several_pictures_are_accepted_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    vlm = opened()
    requests: list[Request] = [question_about([PICTURE, OTHER], f"Question {i}") for i in range(3)]
    with caplog.at_level(logging.WARNING, "llava"):
        assert len(vlm.engine.generate([*requests, MESSAGES], greedy(2))) == 4
        vlm.ask([PICTURE, OTHER], "What differs?", max_new_tokens=2)
    assert [record.message for record in caplog.records if "several images" in record.message] == [
        "the prompt contains several images; LLaVA models are trained with one image per conversation, so replies "
        "about several may be worse"
    ]


# ---------------------------------------------------------------------------------------------------------- fairness


def test_no_request_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that arrives `_LATER` requests after one of the next lower priority no longer overtakes it."""
    monkeypatch.setattr(input_processor, "_LATER", 20)
    engine = opened(max_batch=1).engine
    engine.add_request(RAW, greedy(2))
    low = engine.add_request(RAW, greedy(2), priority=1)
    found: list[Output] = []
    n_steps = 0
    while not any(output.request == low and output.finish_reason for output in found):
        for _ in range(2):  # more than can be served
            engine.add_request(RAW, greedy(2))
        found = engine.step()
        n_steps += 1
        assert n_steps < 90
    assert n_steps > 10


@pytest.mark.parametrize("max_batch", [1, 5])
def test_hundreds_of_waiting_requests_finish_with_the_right_tokens(vlm: Assistant, max_batch: int) -> None:
    kinds = questions(7)
    expected = alone(vlm, kinds, greedy(3))
    engine = opened(max_batch=max_batch).engine
    rng = random.Random(0)
    lengths = [rng.randint(1, 3) for _ in range(300)]
    numbers = [engine.add_request(kinds[i % 7], greedy(n), priority=i % 3) for i, n in enumerate(lengths)]
    found = outputs(engine)
    assert [ids(found[number]) for number in numbers] == [expected[i % 7][:n] for i, n in enumerate(lengths)]
    assert engine.stats().running == engine.stats().waiting == 0
