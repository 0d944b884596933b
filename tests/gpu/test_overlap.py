"""On a GPU, launching a step never waits for the device, and a step in flight changes no reply."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import llava
from llava.assistant import Assistant, question_about
from llava.config import EngineOptions
from llava.engine.engine import Engine, Request
from llava.engine.sampling_params import SamplingParams
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu"),
]

PICTURE = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "bias": {"temperature": 1.0, "logit_bias": {77: 2.0}},
    "penalties": {"temperature": 1.0, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    "mask": {"logits_mask": lambda reply: torch.arange(tiny.PIECES) > (reply[-1] // 2 if reply else 2)},
    "logprobs": {"logprobs": 3},
    "stop": {"stop": ("e", "is")},
}


@pytest.fixture(scope="module")
def gpu(checkpoint: Path) -> Assistant:
    return llava.load(checkpoint, device="cuda", dtype="float32")


def requests() -> list[tuple[Request, SamplingParams]]:
    asked = [question_about(PICTURE, "What is it?"), "Once upon a time there was", "Name the colours."]
    return [
        (asked[i % 3], SamplingParams(max_new_tokens=12 + i, seed=i, **kind)) for i, kind in enumerate(KINDS.values())
    ]


def test_launching_a_step_does_not_wait_for_the_device(gpu: Assistant) -> None:
    engine = Engine(gpu.engine.variants, EngineOptions(chunk_tokens=24, page_size=4))
    assert engine.overlap
    engine.generate(*map(list, zip(*requests(), strict=True)))  # makes the libraries' handles and workspaces
    launch = engine._launch

    def watched() -> bool:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine._launch = watched  # type: ignore[method-assign]
    for request, params in requests():
        engine.add_request(request, params)
    while engine.has_requests:
        for output in engine.step():
            assert output.error is None
    engine.check()


@pytest.mark.parametrize(
    "options", [EngineOptions(), EngineOptions(chunk_tokens=24, page_size=5, max_batch=3), EngineOptions(max_batch=1)]
)
def test_replies_are_those_of_steps_that_are_read_in_turn(gpu: Assistant, options: EngineOptions) -> None:
    asked, params = map(list, zip(*requests(), strict=True))

    def ids(overlap: bool) -> Sequence[list[int]]:
        engine = Engine(gpu.engine.variants, options, overlap=overlap)
        replies = engine.generate(asked, params)
        engine.check()
        return [reply.token_ids for reply in replies]

    assert ids(overlap=True) == ids(overlap=False)


def test_a_token_in_flight_is_read_after_the_work_before_it(gpu: Assistant) -> None:
    """The copy to the host comes after a long product on the same stream; reading it early would find old memory."""
    engine = Engine(gpu.engine.variants)
    expected = engine.generate(["Once upon a time"], SamplingParams(max_new_tokens=6))[0].token_ids
    run, big = engine.runner.run, torch.randn(4096, 4096, device="cuda")

    def late(*args: Any) -> Any:
        result = run(*args)
        x: Tensor = big
        for _ in range(20):
            x = x @ big
        return [one._replace(values=one.values + 0 * x[0, 0].nan_to_num(0, 0, 0)) for one in result]

    engine.runner.run = late  # type: ignore[method-assign]
    assert engine.generate(["Once upon a time"], SamplingParams(max_new_tokens=6))[0].token_ids == expected
