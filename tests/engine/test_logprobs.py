"""Log-probabilities, masks and biases of requests that share a batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.config import IMAGE, EngineOptions
from llava.engine.engine import Request
from llava.engine.sampling_params import SamplingParams
from tests import tiny
from tests.oracles.test_transformers import PICTURE, PROMPT

pytestmark = pytest.mark.usefixtures("overlap")

ENGINES: dict[str, dict[str, Any]] = {
    "default": {},
    "chunked": {"chunk_tokens": 7, "max_batch": 4, "page_size": 3},
    "batch-invariant": {"batch_invariant": True, "chunk_tokens": 16},
}
ABOUT_PICTURE = "USER: <image>\nWhat is in the picture? ASSISTANT:"


def opened(folder: Path, **options: Any) -> llava.Assistant:
    engine = EngineOptions(**options.pop("engine", {}))
    return llava.load(folder, dtype="float32", device="cpu", engine=engine, **options)


@pytest.mark.parametrize("adapter", [None, "cats"])
@pytest.mark.parametrize("engine", ENGINES)
def test_log_probabilities_are_those_of_the_plain_forward_pass(
    checkpoint: Path, lora: Path, engine: str, adapter: str | None
) -> None:
    vlm = opened(checkpoint, adapters={"cats": lora}, engine=ENGINES[engine])
    vlm.adapter(adapter)
    params = [SamplingParams(max_new_tokens=6, logprobs=i, prompt_logprobs=3 - i) for i in range(4)]
    requests: list[Request] = [PROMPT, (ABOUT_PICTURE, [PICTURE]), PROMPT, (ABOUT_PICTURE, [PICTURE])]
    for request, own, reply in zip(
        requests, params, vlm.engine.generate(requests, params, adapter=adapter), strict=True
    ):
        text, images = (request, None) if isinstance(request, str) else request
        input = vlm.prepare(text, images=images)
        ids = input.ids.tolist()
        wanted = vlm.logits(text, images=images).log_softmax(-1)
        if own.prompt_logprobs:
            assert reply.prompt_logprobs
            assert reply.prompt_top_logprobs
            assert len(reply.prompt_logprobs) == len(reply.prompt_top_logprobs) == len(ids) - 1
            for i, (value, top) in enumerate(zip(reply.prompt_logprobs, reply.prompt_top_logprobs, strict=True)):
                if ids[i + 1] == IMAGE:
                    assert value is top is None
                    continue
                assert value == pytest.approx(wanted[i, ids[i + 1]].item(), abs=1e-4)
                values, order = wanted[i].topk(own.prompt_logprobs)
                assert top == pytest.approx(dict(zip(order.tolist(), values.tolist(), strict=True)), abs=1e-4)
        else:
            assert reply.prompt_logprobs is None
        if own.logprobs:
            assert reply.logprobs
            assert reply.top_logprobs
            assert reply.logprobs[0] == pytest.approx(wanted[-1, reply.token_ids[0]].item(), abs=1e-4)
            assert [len(top) for top in reply.top_logprobs] == [own.logprobs] * 6


def test_log_probabilities_are_recorded_once_beside_a_request_that_fails(checkpoint: Path) -> None:
    """The step is computed again without the request that fails."""
    vlm = opened(checkpoint)

    def wrong(ids: list[int]) -> Any:
        raise ValueError("no grammar")

    good = SamplingParams(max_new_tokens=4, logprobs=1, prompt_logprobs=1)
    expected = vlm.generate(PROMPT, max_new_tokens=4, logprobs=1, prompt_logprobs=1)
    streams = [vlm.engine.stream(PROMPT, params) for params in (good, SamplingParams(logits_mask=wrong), good)]
    with pytest.raises(llava.ConfigError, match="logits_mask failed: ValueError: no grammar"):
        list(streams[1])
    for stream in (streams[0], streams[2]):
        list(stream)
        reply = stream.reply()
        assert (reply.token_ids, len(reply.logprobs or [])) == (expected.token_ids, 4)
        assert reply.prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=1e-5)
    vlm.engine.check()


def test_a_mask_decides_which_tokens_a_reply_has(checkpoint: Path) -> None:
    vlm = opened(checkpoint)
    allowed = [40, 50, 60]
    seen: list[list[int]] = []

    def mask(ids: list[int]) -> torch.Tensor:
        seen.append(list(ids))
        result = torch.zeros(tiny.PIECES, dtype=torch.bool)
        result[allowed[len(ids) % 3]] = True
        return result

    assert vlm.generate(PROMPT, max_new_tokens=5, logits_mask=mask).token_ids == [40, 50, 60, 40, 50]
    assert seen == [[40, 50, 60, 40, 50][:i] for i in range(5)]


@pytest.mark.parametrize(
    "result",
    [torch.ones(5, dtype=torch.bool), torch.ones(tiny.PIECES), [True] * tiny.PIECES, None],
    ids=["too short", "not bool", "a list", "None"],
)
def test_a_wrong_mask_ends_only_its_request(checkpoint: Path, result: Any) -> None:
    vlm = opened(checkpoint)
    bad = SamplingParams(max_new_tokens=5, logits_mask=lambda ids: result)
    good = SamplingParams(max_new_tokens=5)
    expected = vlm.generate(PROMPT, max_new_tokens=5).token_ids
    streams = [vlm.engine.stream(PROMPT, params) for params in (good, bad, good)]
    with pytest.raises(
        llava.ConfigError, match=rf"logits_mask returned .*expected a tensor torch.bool \[{tiny.PIECES}\]"
    ):
        list(streams[1])
    assert streams[1].reply().finish_reason == "error"
    for stream in (streams[0], streams[2]):
        list(stream)
        assert stream.reply().token_ids == expected


def test_biases_and_penalties_reach_the_reply(checkpoint: Path) -> None:
    vlm = opened(checkpoint)
    assert vlm.generate(PROMPT, max_new_tokens=4, logit_bias={77: 1e4}).token_ids == [77] * 4
    falling = {77: 1e4, 78: 0.9e4}
    once = vlm.generate(PROMPT, max_new_tokens=4, logit_bias=falling, presence_penalty=2e3).token_ids
    assert once == [77, 78, 77, 77]
    often = vlm.generate(PROMPT, max_new_tokens=4, logit_bias=falling, frequency_penalty=2e3).token_ids
    assert often == [77, 78, 77, 78]
