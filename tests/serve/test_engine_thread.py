"""The engine's thread and the event loop: replies arrive whole, also if the event loop is late."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest

import llava
from llava.config import EngineOptions
from llava.engine.reply import Output
from llava.engine.sampling_params import SamplingParams
from llava.errors import LlavaError
from llava.serve.engine_thread import EngineThread

PROMPTS = ["A red apple", "Two spoons and a plate", "The word MENU"]
PARAMS = SamplingParams(max_new_tokens=40, logprobs=2)
Received = list[list[Output | LlavaError]]


@pytest.fixture(scope="module")
def vlm() -> llava.Assistant:
    return llava.load(device="cpu", engine=EngineOptions(batch_invariant=True))


async def run(vlm: llava.Assistant, blocked_s: float, stop: bool = False) -> Received:
    """Runs all prompts, during which the event loop does nothing else for some time. Returns what each received."""
    thread = EngineThread(vlm.engine, asyncio.get_running_loop())
    thread.start()
    received: Received = [[] for _ in PROMPTS]
    for prompt, own in zip(PROMPTS, received, strict=True):
        thread.add(vlm.prepare(prompt), PARAMS, own.append)
    time.sleep(blocked_s)
    if stop:
        await asyncio.to_thread(thread.stop)
    while not all(own and is_last(own[-1]) for own in received):
        await asyncio.sleep(0.01)
    thread.stop()
    return received


def is_last(output: Output | LlavaError) -> bool:
    return isinstance(output, LlavaError) or output.finish_reason is not None


def outputs_of(own: Sequence[Output | LlavaError]) -> list[Output]:
    assert all(isinstance(one, Output) for one in own)
    return [one for one in own if isinstance(one, Output)]


@pytest.mark.parametrize("blocked_s", [0.0, 3.0])
def test_outputs_form_the_reply(vlm: llava.Assistant, blocked_s: float) -> None:
    received = asyncio.run(asyncio.wait_for(run(vlm, blocked_s), 60))
    for prompt, own in zip(PROMPTS, received, strict=True):
        outputs, expected = outputs_of(own), vlm.generate(prompt, max_new_tokens=40, logprobs=2)
        assert [one.reply is not None for one in outputs] == [False] * (len(outputs) - 1) + [True]
        assert "".join(one.text for one in outputs) == expected.text
        assert [id for one in outputs for id in one.token_ids] == expected.token_ids
        assert [value for one in outputs for value in one.logprobs] == expected.logprobs
        assert [top for one in outputs for top in one.top_logprobs] == expected.top_logprobs
        assert outputs[-1].finish_reason == expected.finish_reason
        if blocked_s:
            assert len(outputs) == 1, "outputs of several steps are joined"


def test_requests_that_a_stop_cuts_off_receive_an_error_after_their_outputs(vlm: llava.Assistant) -> None:
    for own in asyncio.run(asyncio.wait_for(run(vlm, 0.05, stop=True), 60)):
        assert isinstance(own[-1], LlavaError)
        assert all(one.finish_reason is None for one in outputs_of(own[:-1]))


def test_an_abort_that_comes_while_another_one_is_taken_ends_its_request(
    vlm: llava.Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, finish, late = vlm.engine, vlm.engine._finish, list[int]()
    endless = SamplingParams(max_new_tokens=400, logit_bias={vlm.preprocessor.tokenizer.eos_id: -100.0})

    def interrupted(*arguments: Any) -> None:
        if not late:  # another client comes and goes at this moment
            late.append(engine.add_request(vlm.prepare("B"), endless))
            engine.abort(late[0])
        finish(*arguments)

    first = engine.add_request(vlm.prepare("A"), endless)
    engine.step()
    monkeypatch.setattr(engine, "_finish", interrupted)
    engine.abort(first)
    for _ in range(3):
        engine.step()
    assert late
    assert late[0] not in engine._unfinished


def test_text_before_an_error_is_received_though_the_event_loop_is_late(vlm: llava.Assistant) -> None:
    async def run() -> list[Output | LlavaError]:
        thread, received = EngineThread(vlm.engine, asyncio.get_running_loop()), list[Output | LlavaError]()
        text = Output(request=0, text="Hello", token_ids=[5], finish_reason=None)
        error = Output(request=0, text="", token_ids=[], finish_reason="error", error=LlavaError("broken"))
        thread._receivers[0] = received.append
        thread._deliver([text])
        thread._deliver([error])
        await asyncio.sleep(0)
        return received

    first, last = asyncio.run(run())
    assert isinstance(first, Output)
    assert (first.text, first.error) == ("Hello", None)
    assert isinstance(last, Output)
    assert str(last.error) == "broken"


def test_clients_that_vanish_leave_no_request_behind(vlm: llava.Assistant) -> None:
    async def run() -> None:
        thread = EngineThread(vlm.engine, asyncio.get_running_loop())
        thread.start()
        input, end = vlm.prepare("A"), time.monotonic() + 5

        def come_and_go() -> None:
            while time.monotonic() < end:
                for number in [thread.add(input, PARAMS, lambda output: None) for _ in range(8)]:
                    thread.abort(number)
                time.sleep(0.001)

        await asyncio.gather(*(asyncio.to_thread(come_and_go) for _ in range(4)))
        while vlm.engine.has_requests and time.monotonic() < end + 20:
            await asyncio.sleep(0.01)
        thread.stop()
        assert not vlm.engine.has_requests
        assert time.monotonic() < end + 1, "they were computed"

    asyncio.run(run())
