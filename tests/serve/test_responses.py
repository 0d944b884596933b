"""Bodies of completions for both kinds of tokenizers: with and without a space before the first word."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import llava
from llava.engine.reply import Output, joined
from llava.engine.sampling_params import SamplingParams
from llava.serve.generation import Choice
from llava.serve.responses import CompletionBodies
from tests import tiny
from tests.conftest import Share

PROMPTS = [" The sea", "The sea", "   three", "Wörter, 漢字 und 😀", "<image> \\<image> <|endoftext|></s>\n", " "]


@pytest.fixture(scope="module")
def mpt(share: Share, clip: Path) -> Path:
    return share("mpt", lambda folder: tiny.write_mpt(folder, clip=clip))


@pytest.fixture(scope="module", params=["llava-tiny", "checkpoint", "mpt"])
def vlm(request: pytest.FixtureRequest) -> llava.Assistant:
    if request.param == "llava-tiny":
        return llava.load(device="cpu")
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


IDS: dict[str, list[int]] = {
    "only BOS": [1],
    "without BOS": [433, 432],
    "special tokens": [1, 433, 2],
    "spaces": [1, 35, 35],
    "an incomplete character": [1, 433, 233, 191],
    "an invalid byte": [1, 433, 258],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stops that are held back": {"stop": ("ed", "plz")},
    "stops within words": {"stop": ("edX", "plez", "aX", "nX", " tQ", "e", "in")},
    "bytes": {"temperature": 1.0, "logit_bias": {byte + 3: 100.0 for byte in (0xE6, 0xBC, 0xA2)}},
    "special tokens": {"temperature": 1.0, "logit_bias": {id: 8.0 for id in (0, 1, 433)}},
}


def outputs(vlm: llava.Assistant, choices: Sequence[Choice]) -> list[list[Output]]:
    """The outputs of choices that run together."""
    requests = [vlm.engine.add_request(one.input, one.params) for one in choices]
    found: dict[int, list[Output]] = {request: [] for request in requests}
    while vlm.engine.has_requests:
        for output in vlm.engine.step():
            found[output.request].append(output)
    return [found[request] for request in requests]


def grouped(one: Sequence[Output], rng: random.Random) -> list[Output]:
    """The outputs of a reply, of which random neighbours are joined, as for an event loop that is late."""
    cuts = sorted(rng.sample(range(1, len(one)), rng.randrange(len(one))))
    return [joined(one[a:b]) for a, b in zip([0, *cuts], [*cuts, len(one)], strict=True)]


@pytest.mark.parametrize("echo", [False, True], ids=["reply", "echo"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("prompt", [*IDS.values(), "Wörter, 漢字 und 😀", " "], ids=str)
def test_chunks_are_together_the_whole_completion_however_late_the_event_loop_is(
    vlm: llava.Assistant, prompt: str | list[int], options: dict[str, Any], echo: bool
):
    if isinstance(prompt, str):
        input = vlm.preprocessor.prepare(prompt, literal=True)
    else:
        input = vlm.preprocessor.prepare_ids(prompt)
    choices = [
        Choice(
            input=input,
            params=SamplingParams(
                **{
                    "max_new_tokens": 14,
                    "logprobs": 2,
                    "prompt_logprobs": 2 * echo,
                    "strip": False,
                    "seed": i,
                    **options,
                }
            ),
        )
        for i in range(2)
    ]
    options_of_bodies: dict[str, Any] = {"tokenizer": vlm.preprocessor.tokenizer, "n_top": 2, "echo": echo}
    replies, rng = outputs(vlm, choices), random.Random(1)
    n = len(input.ids) * echo
    for turn in range(4):
        bodies = CompletionBodies(**options_of_bodies)
        for index, (choice, own) in enumerate(zip(choices, replies, strict=True)):
            last = own[-1].reply
            assert last
            whole = bodies.whole(index, choice, last)
            chunks = [bodies.chunk(index, choice, one) for one in (grouped(own, rng) if turn else own)]
            first = bodies.first(index, choice)
            assert (first["text"] if first else "") + "".join(one["text"] for one in chunks) == whole["text"]
            assert chunks[-1]["finish_reason"] == whole["finish_reason"]
            for name, expected in whole["logprobs"].items():
                assert [value for one in chunks for value in one["logprobs"][name]] == expected[n:], name


@pytest.mark.parametrize("stop", [(), ("ed", "plz"), ("edX", "plez", "aX", "nX", " tQ")], ids=str)
@pytest.mark.parametrize("prompt", IDS.values(), ids=IDS)
def test_offsets_are_those_of_the_tokens_in_the_text(vlm: llava.Assistant, prompt: list[int], stop: tuple[str, ...]):
    params = SamplingParams(max_new_tokens=12, logprobs=1, strip=False, stop=stop)
    choice = Choice(input=vlm.preprocessor.prepare_ids(prompt), params=params)
    ((*_, last),) = outputs(vlm, [choice])
    assert last.reply
    bodies = CompletionBodies(tokenizer=vlm.preprocessor.tokenizer, n_top=1, echo=False)
    body = bodies.whole(0, choice, last.reply)
    found = body["logprobs"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert body["text"][offset : offset + len(token)] == token
