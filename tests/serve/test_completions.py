"""Completions over HTTP: text and token ids, repeated prompts and log-probabilities, as lm-evaluation-harness reads."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llava.preprocess.inputs import ModelInput
from tests.serving import Server

TEXT = "The picture shows a red disc"
SPECIAL = 3  # <unk>, <s> and </s> have the lowest ids
PROMPTS = {
    "text": TEXT,
    "one letter": "a",
    "white space": "  two  spaces\n\n and lines \t ",
    "only a space": " ",
    "marks": "Hi <image> \\<image> </s><s> <unk> <im_start>\n",
    "characters of several tokens": "Wörter, 漢字 und 😀!",
    "combining": "e\u0301 \u200d\U0001f468\u200d\U0001f469",
    "invalid character": "a \ufffd b",
}


def expected_logprobs(server: Server, ids: list[int]) -> tuple[list[float], list[bool]]:
    """Log-probabilities of the ids after the first under teacher forcing, and whether each is the most likely one."""
    preprocessor = server.vlm.preprocessor
    prepared = preprocessor.prepare_ids(ids)
    rows = logits(server, prepared).log_softmax(-1)[:-1]
    after = prepared.ids[1:]
    values = rows.gather(-1, after[:, None])[:, 0]
    return values.tolist(), (rows.argmax(-1) == after).tolist()


def logits(server: Server, prepared: ModelInput) -> Any:
    model = server.vlm.model
    return model.decoder.logits(model.decoder(model.embed(prepared.ids, [])[None]))[0]


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_text_gets_bos_and_is_literal(server: Server, prompt: str):
    preprocessor = server.vlm.preprocessor
    prepared = server.prepared(prompt)
    found = server.posted("/tokenize", prompt=prompt)
    assert found == {"tokens": prepared.ids.tolist(), "count": len(prepared.ids), "max_model_len": 1024}
    assert found["tokens"][0] == preprocessor.tokenizer.bos_id
    assert min(found["tokens"][1:]) >= SPECIAL
    bare = server.posted("/tokenize", prompt=prompt, add_special_tokens=False)
    assert bare["tokens"] == found["tokens"][1:]
    response = server.complete(prompt, max_tokens=5)
    assert response.choices[0].text == server.reply(prepared, max_new_tokens=5, strip=False).text
    assert response.usage.prompt_tokens == found["count"]
    assert response.usage.prompt_tokens_details.image_tokens == 0


def test_a_completion_has_sixteen_tokens_by_default(server: Server):
    response = server.complete(TEXT, logit_bias={"2": -100})
    assert response.object == "text_completion"
    assert response.id.startswith("cmpl-")
    assert response.usage.completion_tokens == 16
    assert response.choices[0].finish_reason == "length"


@pytest.mark.parametrize("ids", [[1, 550, 433, 959], [550, 433, 959], [2, 1, 1, 550], [550, 0, 2, 433]], ids=str)
def test_token_ids_are_taken_as_they_are(server: Server, ids: list[int]):
    prepared = server.vlm.preprocessor.prepare_ids(ids)
    assert prepared.ids.tolist() == ids
    response = server.complete(ids, max_tokens=6)
    assert response.choices[0].text == server.reply(prepared, max_new_tokens=6, strip=False).text
    assert response.usage.prompt_tokens == len(ids)


def test_a_text_and_its_ids_have_the_same_completion(server: Server):
    ids = server.posted("/tokenize", prompt=TEXT)["tokens"]
    assert server.complete(ids).choices[0].text == server.complete(TEXT).choices[0].text


def test_the_text_of_a_completion_continues_the_prompt(server: Server):
    """White space before it is kept."""
    assert server.complete("The picture shows", max_tokens=3).choices[0].text.startswith(" ")


@pytest.mark.parametrize("as_ids", [False, True], ids=["texts", "ids"])
def test_choices_of_several_prompts_are_in_order(server: Server, as_ids: bool):
    texts = ["Hello", TEXT, "a"]
    prompts: Any = [server.posted("/tokenize", prompt=one)["tokens"] for one in texts] if as_ids else texts
    response = server.complete(prompts, n=2, max_tokens=4, temperature=1, seed=7)
    assert [one.index for one in response.choices] == list(range(6))
    expected = [
        server.reply(server.prepared(one), max_new_tokens=4, temperature=1.0, seed=seed, strip=False)
        for one in texts
        for seed in (7, 8)
    ]
    assert [one.text for one in response.choices] == [one.text for one in expected]
    assert response.usage.completion_tokens == sum(len(one.token_ids) for one in expected)
    prompt_tokens = sum(len(server.prepared(one).ids) for one in texts)
    assert response.usage.prompt_tokens == prompt_tokens


def test_no_tokens_may_be_asked_for(server: Server):
    response = server.complete(TEXT, max_tokens=0)
    assert response.choices[0].text == ""
    assert response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 0
    assert server.complete(TEXT, max_tokens=0, echo=True).choices[0].text == TEXT


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("logprobs", [None, 2])
def test_echo_repeats_the_text_of_the_client(server: Server, prompt: str, logprobs: int | None):
    plain = server.complete(prompt, max_tokens=4).choices[0].text
    assert server.complete(prompt, max_tokens=4, echo=True, logprobs=logprobs).choices[0].text == prompt + plain


def check_tokens(found: Any, text: str) -> None:
    """Tokens and offsets cover the text."""
    assert "".join(found.tokens) == text
    ends = [*found.text_offset[1:], len(text)]
    assert [text[start:end] for start, end in zip(found.text_offset, ends, strict=True)] == found.tokens
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_echoed_log_probabilities_are_those_of_teacher_forcing(server: Server, prompt: str):
    response = server.complete(prompt, max_tokens=4, echo=True, logprobs=1)
    choice = response.choices[0]
    check_tokens(choice.logprobs, choice.text)
    prepared = server.prepared(prompt)
    reply = server.reply(prepared, max_new_tokens=4, strip=False)
    end = [server.vlm.preprocessor.tokenizer.eos_id] if reply.finish_reason == "stop" else []
    values, are_greedy = expected_logprobs(server, [*prepared.ids.tolist(), *reply.token_ids, *end])
    assert choice.logprobs.token_logprobs[0] is choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(values, abs=1e-4)
    for value, top, is_greedy in zip(
        choice.logprobs.token_logprobs[1:], choice.logprobs.top_logprobs[1:], are_greedy, strict=True
    ):
        assert (value == max(top.values())) == is_greedy


@pytest.mark.parametrize("n_top", [0, 1, 5])
def test_top_log_probabilities_hold_the_most_likely_tokens_and_the_chosen_one(server: Server, n_top: int):
    response = server.complete(TEXT, max_tokens=3, echo=True, logprobs=n_top)
    found, prepared = response.choices[0].logprobs, server.prepared(TEXT)
    tokenizer = server.vlm.preprocessor.tokenizer
    ids = prepared.ids.tolist() + server.reply(prepared, max_new_tokens=3, strip=False).token_ids
    rows = logits(server, server.vlm.preprocessor.prepare_ids(ids)).log_softmax(-1)
    for i, top in enumerate(found.top_logprobs[1:]):
        values, likely = rows[i].topk(max(1, n_top))
        expected = {
            tokenizer.piece(id).decode(): value for id, value in zip(likely.tolist(), values.tolist(), strict=True)
        }
        expected[tokenizer.piece(ids[i + 1]).decode()] = rows[i, ids[i + 1]].item()
        assert top == pytest.approx(expected, abs=1e-4)


def test_without_echo_log_probabilities_are_of_the_reply(server: Server):
    whole = server.complete(TEXT, max_tokens=4, echo=True, logprobs=2).choices[0].logprobs
    choice = server.complete(TEXT, max_tokens=4, logprobs=2).choices[0]
    check_tokens(choice.logprobs, choice.text)
    assert choice.logprobs.tokens == whole.tokens[-4:]
    assert choice.logprobs.token_logprobs == pytest.approx(whole.token_logprobs[-4:], abs=1e-4)
    assert server.complete(TEXT, max_tokens=1).choices[0].logprobs is None


@pytest.mark.parametrize("bias", [{}, {"2": 100}], ids=["a token follows", "the reply ends at once"])
def test_lm_evaluation_harness_reads_log_likelihoods(server: Server, bias: dict[str, int]):
    """Its `local-completions` sends batches of context + continuation as ids, and reads the answers so.

    It leaves the last token out, because it asks for one, which may be the one that ends a text.
    """
    contexts = ["What is in the picture?", "The sky is", "One, two,"]
    ids = [server.posted("/tokenize", prompt=one)["tokens"] for one in contexts]
    greedy = [server.reply(server.vlm.preprocessor.prepare_ids(one), max_new_tokens=3).token_ids for one in ids]
    requests = [context + after for context, own in zip(ids, greedy, strict=True) for after in (own, [550, 433])]
    body = {"prompt": requests, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = server.posted("/v1/completions", logit_bias=bias, **body)["choices"]
    assert len(choices) == len(requests)
    for i, choice in enumerate(sorted(choices, key=lambda one: one["index"])):
        n_context = len(ids[i // 2])
        values = choice["logprobs"]["token_logprobs"][n_context:-1]
        tops = choice["logprobs"]["top_logprobs"][n_context:-1]
        is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        expected, are_greedy = expected_logprobs(server, requests[i])
        assert sum(values) == pytest.approx(sum(expected[n_context - 1 :]), abs=1e-3)
        assert is_greedy == all(are_greedy[n_context - 1 :]) == (i % 2 == 0)


IDS = {
    "special tokens": [1, 550, 2, 550, 1],
    "only special tokens": [1, 2],
    "without BOS": [550, 433],
    "spaces": [952, 952, 550],
    "an incomplete character": [1, 550, 233, 191],
    "an invalid byte": [1, 258, 550],
}


@pytest.mark.parametrize("bias", [{}, {"165": 100}], ids=["plain", "completed"])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_tokens_of_ids_cover_the_text(server: Server, ids: list[int], bias: dict[str, int]):
    """Also if a reply completes a character that the prompt has begun, or is cut off within one."""
    options: dict[str, Any] = {"logprobs": 1, "logit_bias": bias}
    for n in (0, 1, 3):
        echoed = server.complete(ids, max_tokens=n, echo=True, **options).choices[0]
        check_tokens(echoed.logprobs, echoed.text)
        assert len(echoed.logprobs.tokens) == len(ids) + n
        if n:
            own = server.complete(ids, max_tokens=n, logprobs=1, logit_bias=bias).choices[0]
            assert own.text
            assert echoed.text.endswith(own.text)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_token_that_ends_a_completion_is_listed_without_text(server: Server, stream: bool):
    """As other servers do; the text of the reply lacks it."""
    found = server.complete(TEXT, max_tokens=5, logprobs=1, logit_bias={"2": 100}, stream=stream)
    (logprobs,) = [one.choices[0].logprobs for one in (found if stream else [found])]
    expected = logits(server, server.prepared(TEXT)).log_softmax(-1)[-1][2].item()
    assert logprobs.tokens == [""]
    assert logprobs.token_logprobs == pytest.approx([expected], abs=1e-4)
    assert logprobs.top_logprobs[0]["</s>"] == pytest.approx(expected, abs=1e-4)


def test_log_probabilities_are_those_before_sampling_options(server: Server):
    plain = server.complete(TEXT, max_tokens=1, logprobs=3).choices[0].logprobs
    biased = server.complete(TEXT, max_tokens=1, logprobs=3, logit_bias={"550": 100}, temperature=0.5)
    found = biased.choices[0].logprobs
    row = logits(server, server.prepared(TEXT)).log_softmax(-1)[-1]
    assert found.tokens == [" H"]
    assert found.token_logprobs[0] == pytest.approx(row[550].item(), abs=1e-4)
    assert set(plain.top_logprobs[0].items()) <= set(found.top_logprobs[0].items())


@pytest.mark.parametrize("stop", [" a", ["xyz", "e"], "\n"])
def test_a_stop_string_ends_a_completion(server: Server, stop: Any):
    prepared = server.prepared(TEXT)
    expected = server.reply(prepared, max_new_tokens=20, strip=False, stop=stop)
    choice = server.complete(TEXT, max_tokens=20, stop=stop, echo=True, logprobs=1).choices[0]
    assert choice.text == TEXT + expected.text
    assert choice.finish_reason == expected.finish_reason
    assert choice.text.startswith("".join(choice.logprobs.tokens))


def test_a_prompt_may_fill_the_context(server: Server):
    full = [1, *[550] * 1023]
    assert server.complete(full, max_tokens=0).usage.total_tokens == 1024
    response = server.complete(full[:-1], max_tokens=16)
    assert response.usage.completion_tokens == 1
    assert response.choices[0].finish_reason == "length"


def test_adapters_complete_text(adapted: Server):
    prepared = adapted.prepared(TEXT, "cats")
    expected = adapted.reply(prepared, adapter="cats", max_new_tokens=6, strip=False).text
    assert adapted.complete(TEXT, model="cats", max_tokens=6).choices[0].text == expected
    assert adapted.complete(TEXT, max_tokens=6).choices[0].text != expected


def max_health_latency(server: Server, **large: Any) -> float:
    """Returns the maximum latency of /health in seconds while the server computes and encodes a large completion."""
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(server.post, "/v1/completions", **large)
        latency_s = 0.0
        while not asked.done():
            began = time.perf_counter()
            assert server.http.get("/health").status_code == 200
            latency_s = max(latency_s, time.perf_counter() - began)
            time.sleep(0.01)
    tokens = [one["logprobs"]["tokens"] for one in asked.result().json()["choices"]]
    assert list(map(len, tokens)) == list(map(len, large["prompt"]))
    return latency_s


def test_the_server_answers_others_while_a_large_answer_is_built(server: Server):
    """The best of three attempts counts, because other processes may delay the server."""
    rng = random.Random(1)
    prompts = [[1] + [rng.randrange(300, 700) for _ in range(899)] for _ in range(16)]
    large: dict[str, Any] = {"prompt": prompts, "echo": True, "logprobs": 20, "max_tokens": 0}
    assert any(max_health_latency(server, **large) < 0.4 for _ in range(3))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": [[1] * 900] * 64, "echo": True, "logprobs": 20, "max_tokens": 0}, "logprobs"),
        ({"prompt": ["a"] * 60, "n": 4, "logprobs": 5, "max_tokens": 1000}, "max_tokens"),
        ({"prompt": ["a"] * 60, "n": 4, "logprobs": 5, "max_tokens": 1000, "stream": True}, "max_tokens"),
    ],
    ids=["prompts", "replies", "stream"],
)
def test_an_answer_that_could_be_too_large_is_refused(server: Server, options: dict[str, Any], param: str):
    server.waits_until("llava_num_requests_running", 0)
    before = server.metric("llava_generation_tokens_total")
    response = server.post("/v1/completions", **options)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert "tokens and log-probabilities; expected at most 1000000" in error["message"]
    assert server.metric("llava_generation_tokens_total") == before
    assert server.complete(["a"] * 60, n=4, max_tokens=1).usage.completion_tokens == 240  # none of them is counted
