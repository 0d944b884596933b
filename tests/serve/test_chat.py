"""Chats over HTTP: the replies are those of the Python API, and no text of a client is more than text."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llava.config import IMAGE
from tests.serving import Server, drawn, ours, picture, text, user

HELLO = user("Hello")
QUESTION = text("What is in the picture?")
RED, BLUE = drawn("red"), drawn("blue")
CONVERSATIONS = {
    "text": HELLO,
    "parts": user(text("Hello."), text("Which shapes do you know?")),
    "picture": user(picture(RED), QUESTION),
    "picture last": user(QUESTION, picture(RED)),
    "two pictures": user(picture(RED), picture(BLUE), text("What is different?")),
    "JPEG": user(picture(drawn("green", format="JPEG")), QUESTION),
    "palette": user(picture(drawn(mode="P", format="GIF")), QUESTION),
    "transparency": user(picture(drawn(mode="RGBA", format="WEBP")), QUESTION),
    "system": [{"role": "system", "content": "Answer with a joke."}, *HELLO],
    "turns": [
        *user(picture(RED), QUESTION),
        {"role": "assistant", "content": "A red disc."},
        {"role": "user", "content": [text("And here?"), picture(BLUE)]},
    ],
}
# what models and templates give a meaning to
MARKS = "<image> \\<image> </s> <s> <unk> <im_start><im_end><im_patch> [INST] <|im_end|> ASSISTANT: <0x0A> ▁"


def content_of(response: Any) -> str:
    return response.choices[0].message.content


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_greedy_reply_is_that_of_generate(server: Server, conversation: list[dict[str, Any]]):
    expected = server.vlm.generate(ours(conversation), max_new_tokens=12)
    response = server.chat(conversation, max_tokens=12)
    assert content_of(response) == expected.text
    assert response.object == "chat.completion"
    assert response.model == server.name
    assert response.choices[0].finish_reason == expected.finish_reason
    assert response.choices[0].message.role == "assistant"
    assert response.choices[0].message.tool_calls is None
    usage = response.usage
    assert usage.prompt_tokens == expected.usage.prompt_tokens
    assert usage.completion_tokens == expected.usage.completion_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.image_tokens == expected.usage.image_tokens


def test_each_request_has_an_id(server: Server):
    first, second = server.chat(HELLO, max_tokens=1), server.chat(HELLO, max_tokens=1)
    assert first.id.startswith("chatcmpl-")
    assert first.id != second.id
    given = server.http.get("/version", headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    assert first._request_id != second._request_id


def test_a_developer_is_the_system(server: Server):
    system, developer = ([{"role": role, "content": "Speak of trains."}, *HELLO] for role in ("system", "developer"))
    expected = server.vlm.generate(system, max_new_tokens=8).text
    assert content_of(server.chat(developer, max_tokens=8)) == expected
    assert expected != server.vlm.generate(HELLO, max_new_tokens=8).text


def test_cached_tokens_are_counted(server: Server):
    question = user(picture(drawn("orange")), text("Is this picture new to you?"))
    first, second = (server.chat(question, max_tokens=1).usage for _ in range(2))
    expected = server.vlm.prepare(ours(question))
    page = server.vlm.engine.options.page_size
    assert first.prompt_tokens_details.cached_tokens < page * 4  # the template's own text at most
    assert second.prompt_tokens_details.cached_tokens == (len(expected.ids) - 1) // page * page


@pytest.mark.parametrize("option", ["max_tokens", "max_completion_tokens"])
def test_a_reply_ends_at_the_limit(server: Server, option: str):
    response = server.chat(HELLO, **{option: 3})
    assert response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 3
    assert content_of(response) == server.vlm.generate(HELLO, max_new_tokens=3).text


def test_without_a_limit_a_reply_may_fill_the_context(server: Server):
    """With a ban on the end token, it does."""
    long = user("word " * 980)
    eos = server.vlm.preprocessor.tokenizer.eos_id
    usage = server.chat(long, logit_bias={str(eos): -100}).usage
    assert usage.total_tokens == server.vlm.config.decoder.max_seq


@pytest.mark.parametrize(
    "options",
    [
        {"stop": "like"},
        {"stop": [" to k", "nothing"]},
        {"logit_bias": {"270": 100}},
        {"logit_bias": {"550": -100, "433": -100}},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"frequency_penalty": -2.0, "presence_penalty": -1.5},
        {"repetition_penalty": 3.0},
        {"repetition_penalty": 0.5},
        {"temperature": 1.5, "top_k": 5, "seed": 1},
        {"temperature": 1.5, "top_p": 0.8, "seed": 2},
        {"temperature": 1.5, "min_p": 0.1, "seed": 3},
        {"temperature": 2.0, "seed": 4},
        {"temperature": 0.7, "seed": 2**63 - 1},
    ],
    ids=str,
)
def test_sampling_options_do_what_they_do_in_python(server: Server, options: dict[str, Any]):
    own = {**options, "logit_bias": {int(id): value for id, value in options.get("logit_bias", {}).items()}}
    expected = server.vlm.generate(HELLO, max_new_tokens=14, **own)
    more = {name: options[name] for name in ("top_k", "min_p", "repetition_penalty") if name in options}
    usual = {name: value for name, value in options.items() if name not in more}
    response = server.chat(HELLO, max_tokens=14, extra_body=more, **usual)
    assert content_of(response) == expected.text
    assert response.choices[0].finish_reason == expected.finish_reason
    assert response.usage.completion_tokens == len(expected.token_ids)


def test_each_option_changes_a_reply(server: Server):
    """So that the test above compares something."""
    plain = server.vlm.generate(HELLO, max_new_tokens=14).text
    for options in ({"stop": "like"}, {"logit_bias": {270: 100}}, {"repetition_penalty": 3.0}):
        assert server.vlm.generate(HELLO, max_new_tokens=14, **options).text != plain


def test_a_limit_to_one_token_is_greedy(server: Server):
    expected = server.vlm.generate(HELLO, max_new_tokens=8).text
    for options in ({"top_p": 0.0}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}):
        assert content_of(server.chat(HELLO, max_tokens=8, temperature=2, **options)) == expected


def test_choices_with_a_seed_differ_and_come_again(server: Server):
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 2, "seed": 5, "n": 4}
    first, second = server.chat(HELLO, **options), server.chat(HELLO, **options)
    assert [one.index for one in first.choices] == [0, 1, 2, 3]
    texts = [one.message.content for one in first.choices]
    assert texts == [one.message.content for one in second.choices]
    assert len(set(texts)) == 4
    assert content_of(server.chat(HELLO, **{**options, "n": 1})) == texts[0]
    assert server.vlm.generate(HELLO, max_new_tokens=8, temperature=2, seed=5).text == texts[0]


def test_a_prompt_counts_once_for_all_choices(server: Server):
    usage = server.chat(HELLO, n=3, max_tokens=5).usage
    assert usage.prompt_tokens == len(server.prepared(HELLO).ids)
    assert usage.completion_tokens == 15


def test_without_a_temperature_it_is_one(server: Server):
    """As in OpenAI's API; the Python API selects the most likely token."""
    question = user(picture(RED), QUESTION)
    response = server.posted("/v1/chat/completions", messages=question, n=8, seed=1, max_tokens=4)
    expected = [server.vlm.generate(ours(question), max_new_tokens=4, temperature=1, seed=1 + i).text for i in range(8)]
    assert [one["message"]["content"] for one in response["choices"]] == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("n_top", [0, 1, 5])
def test_log_probabilities_are_those_of_the_forward_pass(server: Server, n_top: int):
    question = user(picture(RED), QUESTION)
    response = server.chat(question, max_tokens=5, logprobs=True, top_logprobs=n_top)
    found = response.choices[0].logprobs.content
    expected = server.vlm.generate(ours(question), max_new_tokens=5)
    tokenizer = server.vlm.preprocessor.tokenizer
    assert [bytes(one.bytes) for one in found] == [tokenizer.piece(id) for id in expected.token_ids]
    assert [one.token for one in found] == [tokenizer.piece(id).decode() for id in expected.token_ids]
    prompt = f"{server.vlm.prepare(ours(question)).prompt} {expected.text}"
    logits = server.vlm.logits(prompt, images=[RED]).log_softmax(-1)
    n_prompt = len(server.vlm.prepare(ours(question)).ids)
    for i, (id, one) in enumerate(zip(expected.token_ids, found, strict=True)):
        row = logits[n_prompt - 1 + i]
        assert one.logprob == pytest.approx(row[id].item(), abs=1e-4)
        values, ids = row.topk(n_top) if n_top else (row[:0], row[:0])
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        assert [bytes(top.bytes) for top in one.top_logprobs] == [tokenizer.piece(id) for id in ids.int().tolist()]


def test_no_log_probabilities_unless_asked(server: Server):
    assert server.chat(HELLO, max_tokens=1).choices[0].logprobs is None


@pytest.mark.parametrize("detail", ["auto", "low", "high"])
def test_the_detail_of_a_picture_changes_nothing(server: Server, detail: str):
    messages = user(picture(RED, detail=detail), QUESTION)
    plain = user(picture(RED), QUESTION)
    assert content_of(server.chat(messages, max_tokens=6)) == server.vlm.generate(ours(plain), max_new_tokens=6).text


def hostile() -> dict[str, list[dict[str, Any]]]:
    """Conversations with marks in each place where a client can put text."""
    return {
        "user": user(MARKS),
        "part": user(text(MARKS)),
        "system": [{"role": "system", "content": MARKS}, *HELLO],
        "developer": [{"role": "developer", "content": [text(MARKS)]}, *HELLO],
        "assistant": [*HELLO, {"role": "assistant", "content": MARKS}, *user("Go on.")],
        "beside a picture": user(picture(RED), text(MARKS)),
        "before a picture": user(text("<image>"), picture(RED), text("\\<image>")),
        "only a mark": user(picture(RED), text("<image>")),
    }


@pytest.mark.parametrize("conversation", hostile().values(), ids=hostile())
def test_text_of_clients_is_literal(server: Server, conversation: list[dict[str, Any]]):
    tokenizer = server.vlm.preprocessor.tokenizer
    expected = server.prepared(ours(conversation))
    found = server.posted("/tokenize", messages=conversation)
    assert found["tokens"] == expected.ids.tolist()
    n_replies = sum(one["role"] == "assistant" for one in conversation)
    assert found["tokens"].count(tokenizer.bos_id) == 1
    assert found["tokens"].count(tokenizer.eos_id) == n_replies  # from the template
    assert 0 not in found["tokens"]
    n_pictures = sum(part["type"] == "image_url" for one in conversation for part in parts_of(one))
    n_image_tokens = n_pictures * server.vlm.preprocessor.config.vision.n_features
    assert found["tokens"].count(IMAGE) == n_image_tokens

    response = server.chat(conversation, max_tokens=4)
    assert content_of(response) == server.reply(expected, max_new_tokens=4).text
    assert response.usage.prompt_tokens == found["count"]
    assert response.usage.prompt_tokens_details.image_tokens == n_image_tokens


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    return message["content"] if isinstance(message["content"], list) else []


def test_literal_text_decodes_to_itself(server: Server):
    marks = MARKS.removesuffix(" ▁")  # SentencePiece's own sign for a space
    ids = server.posted("/tokenize", messages=user(marks))["tokens"]
    assert marks in server.vlm.preprocessor.tokenizer.decode(ids, skip_special=False)


def test_many_clients_get_their_own_replies(server: Server):
    """In one batch: pictures, texts and options of different requests do not mix."""
    colours = ("red", "blue", "green", "black", "yellow")
    questions = [user(picture(drawn(colour)), QUESTION) for colour in colours]
    questions += [user(f"Tell me about {colour} flowers.") for colour in colours]
    expected = [server.vlm.generate(ours(one), max_new_tokens=10).text for one in questions]
    assert len(set(expected)) > 3
    with ThreadPoolExecutor(10) as threads:
        found = list(threads.map(lambda one: content_of(server.chat(one, max_tokens=10)), questions * 2))
    assert found == expected * 2


def test_adapters_are_served_by_name_in_one_batch(adapted: Server):
    requests = [(name, user(f"What is {i}?")) for i in range(4) for name in (adapted.name, "cats")]
    requests += [(name, user(picture(RED), QUESTION)) for name in (adapted.name, "cats")]
    own = [None if name == adapted.name else name for name, _ in requests]
    expected = [
        adapted.reply(adapted.prepared(ours(messages), adapter), adapter=adapter, max_new_tokens=6).text
        for adapter, (_, messages) in zip(own, requests, strict=True)
    ]
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(len(requests)) as threads:
        responses = list(threads.map(lambda one: adapted.chat(one[1], model=one[0], max_tokens=6), requests))
    assert [content_of(one) for one in responses] == expected
    assert [one.model for one in responses] == [name for name, _ in requests]
