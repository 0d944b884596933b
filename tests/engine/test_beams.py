"""Beam search in the engine equals that of transformers, whatever else the engine does."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.config import IMAGE, EngineOptions
from llava.engine.engine import Request
from llava.engine.sampling_params import SamplingParams
from tests import tiny
from tests.oracles.test_transformers import PICTURE, PROMPT, random_llama, random_llava

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("overlap")

NEW = 40


def pages(n: int) -> int:
    """Returns the memory for n pages of 4 tokens and their dense copies: 3 layers with 2 heads of 16 values."""
    return n * 2 * 4 * 2 * 3 * 2 * 16 * 4


ABOUT_PICTURE = "USER: <image>\nWhat is in the picture? ASSISTANT:"
ENGINES: dict[str, dict[str, Any]] = {
    "default": {},
    "pages of one token": {"page_size": 1},
    "pages of three tokens": {"page_size": 3, "chunk_tokens": 8, "max_batch": 8},
    "no prefix cache": {"page_size": 3, "prefix_cache": False},
    "fewer requests at a time than beams": {"max_batch": 2, "page_size": 4},
    "batch-invariant": {"batch_invariant": True, "page_size": 5},
    "a tight cache": {"page_size": 4, "cache_memory": pages(72), "max_batch": 6},
    "a tight cache without prefixes": {
        "page_size": 4,
        "cache_memory": pages(112),
        "max_batch": 6,
        "prefix_cache": False,
    },
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, random_llama(folder, num_key_value_heads=2)


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llava-hf")
    return folder, random_llava(folder, "llava")


def opened(folder: Path, **engine: Any) -> llava.Assistant:
    return llava.load(folder, dtype="float32", device="cpu", engine=EngineOptions(**engine))


def by_transformers(model: Any, ids: list[int], num_beams: int, **inputs: Any) -> list[int]:
    row = torch.tensor([ids])
    out = model.generate(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=NEW,
        num_beams=num_beams,
        do_sample=False,
        **inputs,
    )
    return [id for id in out[0, row.shape[1] :].tolist() if id not in (0, 2)]


def prompts(n: int) -> list[str]:
    return [PROMPT + "Every morning she walked down to the beach. "[: 6 * i] for i in range(n)]


@pytest.mark.parametrize("case", ENGINES)
def test_beams_beside_other_requests_equal_those_of_transformers(llama: tuple[Path, Any], case: str) -> None:
    folder, model = llama
    vlm = opened(folder, **ENGINES[case])
    texts = prompts(5)
    beams = [3, 1, 5, 2, 4]
    expected = [by_transformers(model, vlm.prepare(text).ids.tolist(), k) for text, k in zip(texts, beams, strict=True)]
    params = [SamplingParams(max_new_tokens=NEW, num_beams=k) for k in beams]
    for _ in range(2):  # the second time with a filled prefix cache
        found = vlm.engine.generate(texts, params)
        assert [reply.token_ids for reply in found] == expected
        vlm.engine.check()
        stats = vlm.engine.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_about_a_picture_equal_those_of_transformers(llava_hf: tuple[Path, Any], num_beams: int) -> None:
    folder, model = llava_hf
    vlm = opened(folder, page_size=3, chunk_tokens=16, max_batch=4)
    input = vlm.prepare(ABOUT_PICTURE, images=[PICTURE])
    ids = [tiny.PIECES if id == IMAGE else id for id in input.ids.tolist()]
    expected = by_transformers(model, ids, num_beams, pixel_values=input.pixels)
    beams = SamplingParams(max_new_tokens=NEW, num_beams=num_beams)
    greedy = SamplingParams(max_new_tokens=NEW)
    requests: list[Request] = [(ABOUT_PICTURE, [PICTURE]), (ABOUT_PICTURE, [PICTURE]), PROMPT]
    assert vlm.engine.generate(requests, [beams, greedy, greedy])[0].token_ids == expected
    assert vlm.generate(ABOUT_PICTURE, images=[PICTURE], max_new_tokens=NEW, num_beams=num_beams).token_ids == expected
    vlm.engine.check()


def test_aborted_beams_give_back_their_pages(llama: tuple[Path, Any]) -> None:
    vlm = opened(llama[0], page_size=2)
    stopped = vlm.engine.add_request(PROMPT, SamplingParams(max_new_tokens=50, num_beams=4))
    other = vlm.engine.add_request(PROMPT, SamplingParams(max_new_tokens=NEW))
    for _ in range(5):
        vlm.engine.step()
    vlm.engine.check()
    vlm.engine.abort(stopped)
    reasons = {}
    while vlm.engine.has_requests:
        reasons |= {output.request: output.finish_reason for output in vlm.engine.step()}
        vlm.engine.check()
    assert reasons == {stopped: "abort", other: "length"}
    assert vlm.engine.stats().pages_used == 0


def test_a_stop_string_ends_the_best_beam(llama: tuple[Path, Any]) -> None:
    vlm = opened(llama[0])
    text = vlm.generate(PROMPT, max_new_tokens=NEW, num_beams=3).text
    stop = text[len(text) // 2 :][:3]
    reply = vlm.generate(PROMPT, max_new_tokens=NEW, num_beams=3, stop=(stop,))
    assert (reply.text, reply.finish_reason) == (text[: text.index(stop)].rstrip(), "stop")


def test_beams_have_the_log_probabilities_of_the_prompt_once(llama: tuple[Path, Any]) -> None:
    params = {"max_new_tokens": NEW, "prompt_logprobs": 1}
    vlm = opened(llama[0], page_size=4, cache_memory=pages(100), max_batch=3)
    expected = vlm.generate(PROMPT, **params).prompt_logprobs
    assert expected
    beams = [SamplingParams(**params, num_beams=k) for k in (3, 4, 2)]
    for reply in vlm.engine.generate([PROMPT] * 3, beams):
        assert reply.prompt_logprobs == pytest.approx(expected, abs=1e-4)


def test_an_error_in_beams_ends_only_their_request(llama: tuple[Path, Any]) -> None:
    vlm = opened(llama[0])

    def failing(ids: list[int]) -> torch.Tensor:
        return torch.ones(tiny.PIECES if len(ids) < 3 else 5, dtype=torch.bool)

    def nothing(ids: list[int]) -> torch.Tensor:
        return torch.full((tiny.PIECES,), len(ids) < 3)

    expected = vlm.generate(PROMPT, max_new_tokens=NEW, num_beams=2).token_ids
    good = SamplingParams(max_new_tokens=NEW, num_beams=2)
    for mask, message in ((failing, "logits_mask returned"), (nothing, "no token is allowed")):
        bad = SamplingParams(max_new_tokens=NEW, num_beams=3, logits_mask=mask)
        numbers = [vlm.engine.add_request(PROMPT, params) for params in (good, bad, good)]
        ids: dict[int, list[int]] = {number: [] for number in numbers}
        errors = {}
        while vlm.engine.has_requests:
            for output in vlm.engine.step():
                ids[output.request] += output.token_ids
                if output.error:
                    errors[output.request] = str(output.error)
        assert list(errors) == [numbers[1]]
        assert message in errors[numbers[1]]
        assert ids[numbers[0]] == ids[numbers[2]] == expected
        vlm.engine.check()


@pytest.mark.parametrize("engine", [{"max_batch": 2}, {"max_batch": 3, "prefix_cache": False}, {"max_batch": 64}])
def test_preempted_beams_go_on_where_they_were(llama: tuple[Path, Any], engine: dict[str, Any]) -> None:
    """Preempts a random sequence after most steps, also beams that wait for the others."""
    vlm = opened(llama[0], page_size=4, cache_memory=pages(112), **engine)
    params = [SamplingParams(max_new_tokens=NEW, num_beams=k) for k in (4, 1, 3)]
    expected = [reply.token_ids for reply in opened(llama[0]).engine.generate(prompts(3), params)]
    chosen = random.Random(0)
    numbers = [vlm.engine.add_request(*request) for request in zip(prompts(3), params, strict=True)]
    ids: dict[int, list[int]] = {number: [] for number in numbers}
    for _ in range(2000):
        for output in vlm.engine.step():
            assert output.error is None
            ids[output.request] += output.token_ids
        vlm.engine.check()
        if running := vlm.engine.scheduler.running:
            if chosen.random() < 0.6:
                vlm.engine.scheduler.preempt(chosen.choice(running))
        elif not vlm.engine.has_requests:
            break
    assert list(ids.values()) == expected
