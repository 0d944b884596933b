"""An interrupt at any line of the engine leaves requests that finish as if nothing had happened."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import llava.engine
from llava.assistant import Assistant
from llava.config import EngineOptions
from llava.engine.engine import Engine
from llava.engine.reply import Reply
from llava.engine.sampling_params import SamplingParams
from tests.asking import opened

pytestmark = pytest.mark.usefixtures("overlap")

FOLDER = str(Path(llava.engine.__file__).parent)
OPTIONS = EngineOptions(chunk_tokens=60, max_batch=3, page_size=8)
REQUESTS = [
    ("Hi", SamplingParams(max_new_tokens=6, logprobs=1)),
    ("What is it?", SamplingParams(max_new_tokens=40, stop=("e", "is"), logprobs=2)),
    ("Name three colours.", SamplingParams(max_new_tokens=5, num_beams=3)),
    ("Hi", SamplingParams(max_new_tokens=7, temperature=1.0, seed=4)),
    ("Say hello.", SamplingParams(max_new_tokens=2, prompt_logprobs=1)),
]
Trace = Callable[[FrameType, str, Any], Any]


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> Assistant:
    return opened(checkpoint)


class Interrupt:
    """Raises KeyboardInterrupt before line number `n` of those that run in llava/engine. Counts these lines."""

    def __init__(self, n: int | None):
        self.n, self.count, self.where = n, 0, ""

    def trace(self, frame: FrameType, event: str, argument: Any) -> Trace | None:
        return self._line if frame.f_code.co_filename.startswith(FOLDER) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Trace:
        if event == "line":
            self.count += 1
            if self.count == self.n:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def replies(vlm: Assistant, interrupt: Interrupt) -> tuple[list[Reply], list[str], list[list[int]]]:
    """The replies to REQUESTS, and their texts and ids according to the outputs, if a step is interrupted."""
    engine = Engine(vlm.engine.variants, OPTIONS)
    sequences = []
    for question, params in REQUESTS:
        engine.add_request([{"role": "user", "content": question}], params)
        sequences.append(engine._inbox[-1])
    texts, ids = [""] * len(REQUESTS), [list[int]() for _ in REQUESTS]
    for _ in range(300):
        if not engine.has_requests:
            break
        outputs = []
        before = sys.gettrace()
        sys.settrace(interrupt.trace)
        try:
            outputs = engine.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        for output in outputs:
            texts[output.request] += output.text
            ids[output.request] += output.token_ids
    assert not engine.has_requests, interrupt.where
    engine.check()
    assert engine.stats().pages_used == 0
    return [Reply.of(one) for one in sequences], texts, ids


def test_an_interrupt_at_any_line_of_the_engine_changes_no_reply(vlm: Assistant) -> None:
    whole = Interrupt(None)
    expected, texts, ids = replies(vlm, whole)
    assert texts == [reply.text for reply in expected]
    assert ids == [reply.token_ids for reply in expected]
    for n in random.Random(12).sample(range(1, whole.count), 40):
        interrupt = Interrupt(n)
        found, texts, ids = replies(vlm, interrupt)
        assert interrupt.where
        for one, other in zip(found, expected, strict=True):
            assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4), interrupt.where
            assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=1e-4), interrupt.where
        assert texts == [reply.text for reply in expected], interrupt.where
        assert ids == [reply.token_ids for reply in expected], interrupt.where
