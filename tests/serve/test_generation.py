"""Generations end when their client goes or their time is over, whatever the event loop is doing."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from llava.engine.reply import Output
from llava.engine.sampling_params import SamplingParams
from llava.preprocess.inputs import ModelInput
from llava.serve.errors import ApiError
from llava.serve.generation import Choice, Generation, Origin
from llava.serve.metrics import Metrics


class Engine:
    """Stands for the engine's thread, so that a test decides when an output arrives."""

    def __init__(self) -> None:
        self.receivers: dict[int, Callable[[Output], None]] = {}

    def add(self, input: ModelInput, params: SamplingParams, receive: Callable[[Output], None], **_: Any) -> int:
        """Returns the number of a request."""
        self.receivers[len(self.receivers)] = receive
        return len(self.receivers) - 1

    def abort(self, number: int) -> None:
        """Ends a request."""
        del self.receivers[number]


async def started(engine: Engine, ended: list[bool], *, seconds: float = 60.0, n: int = 2) -> Generation:
    """Starts a generation of `n` choices."""
    now = time.perf_counter()
    input = ModelInput(prompt="a", token_ids=[1], ids=torch.tensor([1]), labels=torch.tensor([1]), stop=None)
    generation = Generation(
        engine,  # type: ignore[arg-type]
        [Choice(input=input, params=SamplingParams())] * n,
        Origin(adapter=None, salt=b"", arrived=now, prepare_s=0.0),
        Metrics(),
        deadline=now + seconds,
        on_end=lambda: ended.append(True),
    )
    await generation.start()
    return generation


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Runs a test in an event loop, for at most 20 s."""

    async def limited() -> None:
        await asyncio.wait_for(test(), 20)

    asyncio.run(limited())


async def drain(generation: Generation, texts: list[str] | None = None) -> None:
    """Reads all outputs."""
    async for _, output in generation.outputs():
        if texts is not None:
            texts.append(output.text)


@pytest.mark.parametrize("n_turns", range(6))
def test_a_cancellation_is_never_lost_when_an_output_arrives_at_the_same_time(n_turns: int) -> None:
    async def test() -> None:
        engine, ended = Engine(), list[bool]()
        reading = asyncio.ensure_future(drain(await started(engine, ended)))
        await asyncio.sleep(0.01)
        engine.receivers[0](Output(request=0, text="a", token_ids=[5], finish_reason=None))
        for _ in range(n_turns):
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert engine.receivers == {}
        assert ended == [True]

    run(test)


def test_choices_end_at_the_deadline_though_nobody_reads_them() -> None:
    async def test() -> None:
        engine, ended = Engine(), list[bool]()
        generation = await started(engine, ended, seconds=0.05)
        await asyncio.sleep(0.2)
        assert engine.receivers == {}
        assert ended == [True]
        with pytest.raises(ApiError, match="took too long"):
            await drain(generation)
        assert ended == [True]

    run(test)


def test_outputs_before_the_deadline_are_read_before_its_error() -> None:
    async def test() -> None:
        engine, texts = Engine(), list[str]()
        generation = await started(engine, [], seconds=0.05, n=1)
        engine.receivers[0](Output(request=0, text="a", token_ids=[5], finish_reason=None))
        await asyncio.sleep(0.2)
        with pytest.raises(ApiError, match="took too long"):
            await drain(generation, texts)
        assert texts == ["a"]

    run(test)
