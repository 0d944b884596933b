"""Streams: their chunks are those that OpenAI's clients expect, and together they are the whole answer."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving import TIMEOUT_S, Server, drawn, ours, picture, text, user

HELLO = user("Hello")
ENDLESS: dict[str, Any] = {"max_tokens": 900, "logit_bias": {"2": -100}}  # the end token is banned


def events(response: httpx.Response) -> Iterator[str]:
    """The data of server-sent events, each of which is one line."""
    for block in response.iter_lines():
        if block:
            assert block.startswith("data: ")
            yield block.removeprefix("data: ")


def streamed(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with the mark."""
    body = {"model": server.name, "temperature": 0, "stream": True, **body}
    with server.http.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        *found, end = events(response)
    assert end == "[DONE]"
    return [json.loads(one) for one in found]


def chats(server: Server, **body: Any) -> list[dict[str, Any]]:
    return streamed(server, "/v1/chat/completions", **{"messages": HELLO, **body})


def joined(chunks: list[dict[str, Any]], index: int) -> str:
    choices = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
    return "".join(one["delta"].get("content", "") for one in choices)


@pytest.mark.parametrize("n", [1, 3])
def test_chunks_begin_with_the_role_and_end_with_the_reason(server: Server, n: int):
    chunks = chats(server, max_tokens=6, n=n)
    assert len({one["id"] for one in chunks}) == 1
    assert {one["object"] for one in chunks} == {"chat.completion.chunk"}
    assert {one["model"] for one in chunks} == {server.name}
    assert not any("usage" in one for one in chunks)
    expected = server.vlm.generate(HELLO, max_new_tokens=6).text
    for index in range(n):
        mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in one["delta"] for one in mine[1:])
        assert mine[-1]["delta"] == {}
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + ["length"]
        assert len(mine) > 4  # text comes as it is generated
        assert joined(chunks, index) == expected


@pytest.mark.parametrize(
    "messages",
    [
        HELLO,
        user(picture(drawn()), text("What is in the picture?")),
        user("Wörter, 漢字 und 😀: say them again."),
    ],
    ids=["text", "picture", "characters"],
)
@pytest.mark.parametrize("options", [{}, {"seed": 3, "temperature": 2.0}, {"stop": ["i"]}], ids=str)
def test_a_stream_is_the_whole_answer(server: Server, messages: list[Any], options: dict[str, Any]):
    expected = server.vlm.generate(ours(messages), max_new_tokens=16, **options)
    chunks = list(server.chat(messages, max_tokens=16, stream=True, **options))
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason


def test_characters_of_several_tokens_come_whole(server: Server):
    """With a bias, every token is a byte of a character: the reply repeats the last two bytes of 漢 and others."""
    bias = {str(byte + 3): 100 for byte in (0xE6, 0xBC, 0xA2)}
    chunks = chats(server, max_tokens=30, temperature=1.0, seed=1, logit_bias=bias)
    options: dict[str, Any] = {"temperature": 1.0, "seed": 1, "logit_bias": {int(k): v for k, v in bias.items()}}
    assert joined(chunks, 0) == server.vlm.generate(HELLO, max_new_tokens=30, **options).text
    assert "漢" in joined(chunks, 0)


def test_usage_comes_in_a_last_chunk_if_asked_for(server: Server):
    options: dict[str, Any] = {"max_tokens": 5, "n": 2}
    chunks = chats(server, stream_options={"include_usage": True}, **options)
    assert chunks[-1]["choices"] == []
    whole = server.posted("/v1/chat/completions", messages=HELLO, temperature=0, **options)["usage"]
    cached = [one.pop("prompt_tokens_details")["cached_tokens"] for one in (chunks[-1]["usage"], whole)]
    assert chunks[-1]["usage"] == whole
    assert max(cached) < whole["prompt_tokens"]
    assert all(one["choices"] for one in chunks[:-1])
    assert "usage" not in chats(server, stream_options={"include_usage": False}, **options)[-1]


def test_cached_tokens_are_those_of_the_first_choice_also_if_another_one_ends_first(server: Server):
    """A prompt of two steps: its second choice finds it in the cache."""
    ended_first = set()
    for seed in range(2, 7):
        messages = user(f"{seed} hours, " + "one, two, " * 140)
        chunks = chats(server, messages=messages, n=2, seed=seed, temperature=1, stream_options={"include_usage": True})
        usage = chunks[-1]["usage"]
        assert usage["prompt_tokens"] > 512
        assert usage["prompt_tokens_details"]["cached_tokens"] < 100
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        ended_first.add(next(one["index"] for one in choices if one["finish_reason"]))
    assert 1 in ended_first


def test_streamed_log_probabilities_are_those_of_the_whole_answer(server: Server):
    options: dict[str, Any] = {"max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    whole = server.chat(HELLO, **options).choices[0].logprobs.content
    chunks = list(server.chat(HELLO, stream=True, **options))
    found = [token for one in chunks if one.choices[0].logprobs for token in one.choices[0].logprobs.content]
    assert [one.token for one in found] == [one.token for one in whole]
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in whole], abs=1e-4)
    assert [[top.token for top in one.top_logprobs] for one in found] == [
        [top.token for top in one.top_logprobs] for one in whole
    ]


@pytest.mark.parametrize("echo", [False, True])
def test_streams_of_completions_are_the_whole_answers(server: Server, echo: bool):
    prompts = ["The picture shows", "Hi <image> </s>"]
    options: dict[str, Any] = {"max_tokens": 6, "n": 2, "echo": echo, "seed": 2, "temperature": 1.5}
    whole = server.complete(prompts, **options)
    chunks = streamed(server, "/v1/completions", prompt=prompts, stream_options={"include_usage": True}, **options)
    *chunks, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole.usage.completion_tokens
    assert last["usage"]["prompt_tokens"] == whole.usage.prompt_tokens
    for choice in whole.choices:
        mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice.index]
        assert "".join(one["text"] for one in mine) == choice.text
        assert mine[-1]["finish_reason"] == choice.finish_reason
        assert all(one["finish_reason"] is None for one in mine[:-1])
    assert {one["object"] for one in chunks} == {"text_completion"}


@pytest.mark.parametrize("prompt", ["The picture shows", [1], [1, 550, 233, 191]], ids=str)
@pytest.mark.parametrize("stop", [None, ["ed", "plz"], ["edX", "plez", "aX", "nX", " tQ"]], ids=str)
def test_streamed_tokens_and_offsets_are_those_of_the_whole_completion(server: Server, prompt: Any, stop: Any):
    """Also if text was sent before its tokens, because it could be the beginning of a stop string."""
    options: dict[str, Any] = {"prompt": prompt, "max_tokens": 12, "logprobs": 2, "n": 2, "stop": stop}
    whole = server.complete(**options)
    chunks = list(server.complete(stream=True, **options))
    for choice in whole.choices:
        mine = [one.choices[0] for one in chunks if one.choices[0].index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        lists = [one.logprobs for one in mine]
        assert [token for one in lists for token in one.tokens] == choice.logprobs.tokens
        assert [offset for one in lists for offset in one.text_offset] == choice.logprobs.text_offset
        values = [value for one in lists for value in one.token_logprobs]
        assert values == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
        tops = [list(top) for one in lists for top in one.top_logprobs]
        assert tops == [list(top) for top in choice.logprobs.top_logprobs]


def test_a_stream_with_a_mistake_is_an_ordinary_error(server: Server):
    response = server.post("/v1/chat/completions", messages=HELLO, stream=True, temperature=-1)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("n", [1, 4])
def test_a_client_that_leaves_a_stream_ends_the_request(server: Server, path: str, n: int):
    server.waits_until("llava_num_requests_running", 0)
    prompt = {"messages": HELLO} if "chat" in path else {"prompt": "Hello"}
    before = server.metric("llava_generation_tokens_total")
    body = {"model": server.name, "stream": True, "n": n, **prompt, **ENDLESS}
    with server.http.stream("POST", path, json=body) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
        server.waits_until("llava_num_requests_running", n)
    server.waits_until("llava_num_requests_running", 0)
    assert server.metric("llava_generation_tokens_total") - before < 900 * n / 2


def test_a_client_that_leaves_before_the_answer_ends_the_request(server: Server):
    server.waits_until("llava_num_requests_running", 0)
    with httpx.Client(base_url=server.url, timeout=httpx.Timeout(TIMEOUT_S, read=0.3)) as impatient:
        with pytest.raises(httpx.ReadTimeout):
            impatient.post("/v1/chat/completions", json={"model": server.name, "messages": HELLO, **ENDLESS})
        assert server.metric("llava_num_requests_running") <= 1
    server.waits_until("llava_num_requests_running", 0)
    assert server.chat(HELLO, max_tokens=1).usage.completion_tokens == 1


def test_a_client_that_closes_the_connection_while_the_body_is_sent_leaves_nothing(server: Server):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n{")
    assert server.http.get("/ready").status_code == 200
