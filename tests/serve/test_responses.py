"""Bodies of completions for both kinds of tokenizers: with and without a space before the first word."""

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.engine.reply import Output, joined
from llava.engine.sampling_params import SamplingParams
from llava.preprocess.inputs import ModelInput
from llava.serve.errors import ApiError
from llava.serve.generation import Choice
from llava.serve.limits import Limits
from llava.serve.responses import Body, CompletionBodies, Envelope, check_size, encoded
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
    ended = stream.reply().finish_reason == "stop"  # by a token, which is listed without text
    assert len(found["tokens"]) == len(choice.input.ids) + len(stream.reply().token_ids) + ended


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


HEAD = Envelope(id="cmpl-1", model="m", created=1, object="text_completion")


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 40])
def test_encoded_bodies_are_json(n: int):
    entries = [{"a": [i, None, "ü漢\n\u2028"], "b": {"c": [1.5] * i}} for i in range(n)]
    body = {"text": "😀", "none": None, "list": entries, "deep": {"maps": [[[0.25] * 20] * 20] * n, "empty": {}}}
    assert json.loads(encoded(body)) == body
    assert json.loads(HEAD.encoded(iter([body] * n), usage={"n": n})) == HEAD.body([body] * n, usage={"n": n})


def test_numbers_that_json_does_not_have_are_never_sent():
    with pytest.raises(ValueError, match="JSON"):
        encoded({"logprobs": [float("nan")]})


def large(n: int) -> Iterator[Body]:
    """Choices of a thousand tokens with twenty log-probabilities each."""
    for index in range(n):
        yield {
            "index": index,
            "logprobs": {"top_logprobs": [{f"{i} {j}": -1.5 for j in range(20)} for i in range(1000)]},
        }


def test_the_event_loop_runs_while_a_large_answer_is_encoded():
    async def longest_pause() -> tuple[float, float]:
        """The longest time between two turns of the event loop, and that for the whole answer, in seconds."""
        work = asyncio.ensure_future(asyncio.to_thread(HEAD.encoded, large(60)))
        began = last = time.perf_counter()
        longest = 0.0
        while not work.done():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        assert len(await work) > 10 * 2**20
        return longest, last - began

    longest, whole = asyncio.run(longest_pause())
    assert longest < whole / 4


def asked(n_choices: int, *, n_prompt: int, echo: bool = False, **params: Any) -> list[Choice]:
    """Choices as of a request for completions."""
    ids = torch.ones(n_prompt, dtype=torch.long)
    input = ModelInput(prompt="", token_ids=ids.tolist(), ids=ids, labels=ids, stop=None)
    logprobs = params.get("logprobs", 0)
    return [Choice(input=input, params=SamplingParams(**params, prompt_logprobs=logprobs * echo))] * n_choices


@pytest.mark.parametrize(
    ("choices", "param"),
    [
        (asked(4, n_prompt=10, max_new_tokens=251), "max_tokens"),
        (asked(2, n_prompt=10, max_new_tokens=100, logprobs=5), "max_tokens"),
        (asked(2, n_prompt=20, echo=True, max_new_tokens=80, logprobs=5), "max_tokens"),
        (asked(2, n_prompt=100, echo=True, max_new_tokens=0, logprobs=20), "logprobs"),
        (asked(2, n_prompt=83, echo=True, max_new_tokens=1, logprobs=5), "logprobs"),
        (asked(10, n_prompt=51, echo=True, max_new_tokens=0, logprobs=1), "prompt"),
    ],
)
def test_an_answer_that_could_be_too_large_is_refused_with_advice_that_works(choices: list[Choice], param: str):
    limits = Limits(answer_values=1000)
    with pytest.raises(ApiError) as raised:
        check_size(choices, 300, limits)
    assert (raised.value.status, raised.value.param) == (400, param)
    number, params = int(str(raised.value).split()[-1]) if param != "prompt" else 0, choices[0].params
    if param == "max_tokens":
        params = replace(params, max_new_tokens=number)
        too_many = replace(params, max_new_tokens=number + 1)
    elif param == "logprobs":
        params = replace(params, logprobs=number, prompt_logprobs=number)
        too_many = replace(params, logprobs=number + 1, prompt_logprobs=number + 1)
    else:
        check_size(choices[:-1], 300, limits)
        return
    check_size([replace(one, params=params) for one in choices], 300, limits)
    with pytest.raises(ApiError):
        check_size([replace(one, params=too_many) for one in choices], 300, limits)


@pytest.mark.parametrize(
    "choices",
    [
        asked(4, n_prompt=10, max_new_tokens=250),
        asked(4, n_prompt=50, max_new_tokens=2**31),  # the context ends them
        asked(2, n_prompt=83, echo=True, max_new_tokens=0, logprobs=5),
        asked(50, n_prompt=250, max_new_tokens=3, logprobs=5),  # prompts that are not repeated
    ],
)
def test_an_answer_within_the_limit_is_computed(choices: list[Choice]):
    check_size(choices, 300, Limits(answer_values=1000))
