"""Bodies of completions for both kinds of tokenizers: with and without a space before the first word."""

from pathlib import Path

import pytest

import llava
from llava.engine.sampling_params import SamplingParams
from llava.serve.generation import Choice
from llava.serve.responses import CompletionBodies
from tests import tiny
from tests.conftest import Share

PROMPTS = [" The sea", "The sea", "   three", "Wörter, 漢字 und 😀", "<image> \\<image> <|endoftext|></s>\n", " "]


@pytest.fixture(scope="module")
def mpt(share: Share, clip: Path) -> Path:
    return share("mpt", lambda folder: tiny.write_mpt(folder, clip=clip))


@pytest.fixture(scope="module", params=["checkpoint", "mpt"])
def vlm(request: pytest.FixtureRequest) -> llava.Assistant:
    return llava.load(request.getfixturevalue(request.param), dtype="float32", device="cpu")


@pytest.mark.parametrize("n", [0, 6])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_and_offsets_cover_the_prompt_and_the_reply(vlm: llava.Assistant, prompt: str, n: int):
    params = SamplingParams(max_new_tokens=n, logprobs=1, prompt_logprobs=1, strip=False)
    choice = Choice(input=vlm.preprocessor.prepare(prompt, literal=True), params=params)
    stream = vlm.engine.stream(choice.input, params)
    for _ in stream:
        pass
    bodies = CompletionBodies(tokenizer=vlm.preprocessor.tokenizer, n_top=1, echo=True)
    body = bodies.whole(0, choice, stream.reply())
    text, found = body["text"], body["logprobs"]
    assert text == prompt + stream.reply().text
    assert "".join(found["tokens"]) == text
    ends = [*found["text_offset"][1:], len(text)]
    assert [text[a:b] for a, b in zip(found["text_offset"], ends, strict=True)] == found["tokens"]
    assert len(found["tokens"]) == len(choice.input.ids) + len(stream.reply().token_ids)
