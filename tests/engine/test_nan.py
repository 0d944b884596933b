"""NaN stays in the request that it belongs to: not in pages that are used again, nor in those that are shared."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import llava
from llava.assistant import Assistant, question_about
from llava.config import EngineOptions
from llava.engine.engine import Engine
from llava.engine.sampling_params import SamplingParams
from llava.errors import LlavaError, PromptError
from llava.model.paged import cache_bytes_per_token
from llava.preprocess.inputs import ModelInput
from tests import tiny
from tests.asking import opened

pytestmark = pytest.mark.usefixtures("overlap")

PARAMS = SamplingParams(max_new_tokens=30)
QUESTIONS = [[{"role": "user", "content": text}] for text in ("Hi", "What is it? Tell me all about it.", "Why?")]


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> Assistant:
    return opened(checkpoint)


def with_nan(vlm: Assistant) -> ModelInput:
    """A question about a picture with pixels that are NaN; the beginning of the prompt is that of QUESTIONS."""
    input = vlm.prepare(question_about(Image.new("RGB", (50, 40), "red"), "What is broken here?"))
    assert input.pixels is not None
    return replace(input, pixels=torch.full_like(input.pixels, torch.nan))


def engine(vlm: Assistant, n_pages: int, **options: bool | int) -> Engine:
    """An engine with so few pages that all of them are soon used again."""
    page = 16 * cache_bytes_per_token(vlm.config.decoder, torch.float32)
    n_copies = 1 if options.get("batch_invariant") else 2
    return Engine(vlm.engine.variants, EngineOptions(cache_memory=n_copies * n_pages * page, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("chunk_tokens", [16, 40, 512])
def test_a_request_with_nan_spoils_no_other(
    vlm: Assistant, prefix_cache: bool, batch_invariant: bool, chunk_tokens: int
) -> None:
    expected = [vlm.generate(question, max_new_tokens=30).token_ids for question in QUESTIONS]
    one = engine(vlm, 22, prefix_cache=prefix_cache, batch_invariant=batch_invariant, chunk_tokens=chunk_tokens)
    for _ in range(3):  # the bad request comes first, between and last
        for order in ([3, 0, 1, 2], [0, 3, 1, 2], [0, 1, 2, 3]):
            numbers = {one.add_request([*QUESTIONS, with_nan(vlm)][i], PARAMS): i for i in order}
            ids: dict[int, list[int]] = {i: [] for i in order}
            errors: dict[int, LlavaError | None] = {}
            while one.has_requests:
                for output in one.step():
                    ids[numbers[output.request]] += output.token_ids
                    if output.finish_reason:
                        errors[numbers[output.request]] = output.error
            assert [ids[i] for i in range(3)] == expected
            assert [i for i in order if errors[i]] == [3]
            one.check()


def test_an_abort_in_the_middle_of_a_prompt_with_nan_spoils_no_other(vlm: Assistant) -> None:
    expected = [vlm.generate(question, max_new_tokens=30).token_ids for question in QUESTIONS]
    one = engine(vlm, 16, prefix_cache=False, chunk_tokens=70, max_batch=4)
    for _ in range(3):
        number = one.add_request(with_nan(vlm), PARAMS)
        one.step()
        one.abort(number)
        one.step()
        assert [reply.token_ids for reply in one.generate(QUESTIONS, PARAMS)] == expected


def test_an_input_prepared_for_another_adapter_is_refused(tmp_path: Path, clip: Path) -> None:
    tiny.write_lora(tmp_path / "cats", clip=clip)
    base = tiny.write_llama(tmp_path / "base")
    vlm = llava.load(base, adapters={"cats": tmp_path / "cats"}, dtype="float32", device="cpu")
    input = vlm.prepare(question_about(Image.new("RGB", (50, 40)), "What is it?"))
    with pytest.raises(PromptError, match="16 image tokens, where this model has 0: it was prepared for another"):
        vlm.engine.add_request(input, PARAMS, adapter=None)
    text = vlm.prepare("Hello")
    beyond = replace(text, ids=torch.tensor([1, tiny.PIECES]))
    with pytest.raises(PromptError, match="ids beyond the vocabulary"):
        vlm.engine.add_request(beyond, PARAMS, adapter="cats")
