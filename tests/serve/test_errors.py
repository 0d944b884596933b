"""Errors over HTTP: OpenAI's body and the right status, with the name of the parameter and no words of a library."""

import itertools
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.serving import TIMEOUT_S, Server, data_url, drawn, picture, text, user

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": user("Hi"), "max_tokens": 1},
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 1},
    TOKENIZE: {"prompt": "Hi"},
}
TYPES = {404: "not_found_error", 429: "rate_limit_error"}
# names of libraries and of their parts, words from their messages, and Python's spelling of JSON's values
FOREIGN = re.compile(
    r"(?i:pydantic|fastapi|starlette|uvicorn|h11|pillow|PIL\b|torch|numpy|llguidance|sentencepiece|traceback|Error\b"
    r"|Expecting|Extra data|Input should|Field required|validation|unrecognized|codec)"
    r"|\bNone\b|\bTrue\b|\bFalse\b|\bdict\b|\bnan\b|\binf\b"
)


def check(response: httpx.Response, status: int, param: str | None = None, *mentions: str) -> dict[str, Any]:
    """Asserts an error of this status about this parameter, and returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == TYPES.get(status, "invalid_request_error")
    assert error["param"] == param, error
    assert isinstance(error["message"], str)
    assert not FOREIGN.search(error["message"]), error["message"]
    assert 10 < len(error["message"]) < 300
    for mention in mentions:
        assert mention in error["message"]
    return error


def raw(server: Server, path: str, body: bytes, **headers: str) -> httpx.Response:
    return server.http.post(path, content=body, headers={"content-type": "application/json", **headers})


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
UNSUPPORTED: dict[str, list[Any]] = {
    "audio": [{"voice": "alloy", "format": "wav"}],
    "best_of": [2],
    "function_call": ["f", {"name": "f"}],
    "functions": [[{"name": "f"}]],
    "guided_json": [{"type": "object"}],
    "ignore_eos": [True],
    "modalities": [["audio"], ["text", "audio"]],
    "moderation": [True],
    "parallel_tool_calls": [1.5],
    "prediction": [{"type": "content", "content": "a"}],
    "reasoning_effort": ["low"],
    "service_tier": ["flex"],
    "store": [True],
    "suffix": ["after"],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "tools": [[TOOL]],
    "verbosity": ["low"],
    "web_search_options": [{"search_context_size": "low"}],
    "made_up": [1, -0.5, "a", True, [0], {"a": None}],
}
NEUTRAL: dict[str, list[Any]] = {
    "best_of": [1],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "metadata": [{"run": "5"}],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "prompt_cache_key": ["a"],
    "safety_identifier": ["a"],
    "service_tier": ["auto", "default"],
    "store": [False],
    "suffix": [""],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "user": ["someone"],
    "web_search_options": [{}],
    "made_up": [0, False, "", [], {}],
}


def pairs(values: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, one, id=f"{name}={one!s:.30}") for name, found in values.items() for one in found]


@pytest.mark.parametrize(("name", "value"), pairs(UNSUPPORTED))
def test_a_parameter_that_is_not_there_is_named(server: Server, name: str, value: Any):
    for path in (CHAT, COMPLETIONS):
        check(server.post(path, **PROMPTS[path], **{name: value}), 400, name, name, "leave it out")
    check(server.post(TOKENIZE, **PROMPTS[TOKENIZE], **{name: value}), 400, name, name)


@pytest.mark.parametrize(("name", "value"), pairs(NEUTRAL))
def test_values_without_effect_pass(server: Server, name: str, value: Any):
    for path, other in itertools.product((CHAT, COMPLETIONS), (value, None)):
        server.posted(path, **PROMPTS[path], **{name: other})


@pytest.mark.parametrize("name", ["echo", "best_of", "suffix", "prompt"])
def test_parameters_of_completions_are_not_those_of_chats(server: Server, name: str):
    check(server.post(CHAT, **PROMPTS[CHAT], **{name: "a"}), 400, name, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("messages", user("a")), ("response_format", {"type": "json_object"}), ("top_logprobs", 2)],
    ids=["messages", "response_format", "top_logprobs"],
)
def test_parameters_of_chats_are_not_those_of_completions(server: Server, name: str, value: Any):
    check(server.post(COMPLETIONS, **PROMPTS[COMPLETIONS], **{name: value}), 400, name, name)


def test_every_parameter_may_be_null(server: Server):
    for path in (CHAT, COMPLETIONS):
        names = server.http.get("/openapi.json").json()["components"]["schemas"]
        schema = names["ChatRequest" if path == CHAT else "CompletionRequest"]
        optional = set(schema["properties"]) - set(schema["required"]) - {"max_tokens"}
        assert len(optional) > 15
        server.posted(path, **PROMPTS[path], **dict.fromkeys(optional))


WRONG: dict[str, list[Any]] = {  # in both kinds of requests
    "model": [5, None, ["llava-tiny"], {}],
    "temperature": ["hot", -0.1, 2.1, True, [1]],
    "top_p": ["a", -0.5, 1.5],
    "top_k": [-2, 1.5, "5", 2**40],
    "min_p": [-0.1, 1.1],
    "n": [0, -1, 17, 1.5, "2", 10**30],
    "max_tokens": [-1, 1.5, "5", 10**12, 10**400],
    "seed": [1.5, "a", 2**63, -(2**63) - 1],
    "presence_penalty": [2.5, -2.5, "a"],
    "frequency_penalty": [2.5, -2.5, {}],
    "repetition_penalty": [0, -1, 101],
    "stop": ["", ["a", ""], ["a"] * 17, ["a" * 257], 5, {"a": 1}],
    "logit_bias": [[1], "a", {"a": 1}, {"-1": 1}, {"1024": 1}, {"1.5": 1}, {"5": 101}, {"5": -100.5}, {"²": 1}],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, 5],
    "user": [5],
}
WRONG_OF_CHATS: dict[str, list[Any]] = {
    "logprobs": [1, "yes"],
    "top_logprobs": [2, -1, 21, "a"],
    "max_tokens": [0],
    "max_completion_tokens": [0, 5],
    "response_format": ["json", {"type": "json_schema"}],
    "messages": [None, [], "Hi", {"role": "user", "content": "Hi"}],
}
WRONG_OF_COMPLETIONS: dict[str, list[Any]] = {
    "logprobs": [True, -1, 21, "a"],
    "echo": [1, "yes"],
    "prompt": [
        *(None, "", [], [""], [[]], ["a", ""], 5, {"a": 1}),  # another type, or empty
        *([1, "a"], [True], [1.5], [None], [["a"]], [[1], "a"]),  # of several types
        *([5000], [-1], [[1], [1024]], ["a"] * 65, "word " * 3000, [1] * 1025),  # beyond a limit
    ],
}


@pytest.mark.parametrize(("name", "value"), pairs(WRONG))
def test_wrong_values_are_named(server: Server, name: str, value: Any):
    for path in (CHAT, COMPLETIONS):
        check(server.post(path, **{**PROMPTS[path], name: value}), 400, name, name)


@pytest.mark.parametrize(("name", "value"), pairs(WRONG_OF_CHATS))
def test_wrong_values_of_chats_are_named(server: Server, name: str, value: Any):
    check(server.post(CHAT, **{**PROMPTS[CHAT], name: value}), 400, name, name)


@pytest.mark.parametrize(("name", "value"), pairs(WRONG_OF_COMPLETIONS))
def test_wrong_values_of_completions_are_named(server: Server, name: str, value: Any):
    check(server.post(COMPLETIONS, **{**PROMPTS[COMPLETIONS], name: value}), 400, name, name)


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_parameter_is_named(server: Server, missing: str):
    body = {"model": server.name, **PROMPTS[CHAT]}
    del body[missing]
    check(server.http.post(CHAT, json=body), 400, missing, f"{missing} is missing")


def test_values_within_lists_are_named_by_their_position(server: Server):
    check(server.post(COMPLETIONS, prompt="a", stop=["a", 5]), 400, "stop[1]", "stop[1] is 5; expected a string")
    wrong = [*user("Hi"), {"role": "user", "content": [text("Hi"), {"type": "text", "text": None}]}]
    name = "messages[1].content[1].text"
    check(server.post(CHAT, messages=wrong), 400, name, f"{name} is null; expected a string")


def message(**changes: Any) -> list[Any]:
    return [{"role": "user", "content": "Hi", **changes}]


MESSAGES: dict[str, tuple[list[Any], str, str]] = {
    "role": (message(role="tool"), "messages[0].role", "'developer'"),
    "no role": ([{"content": "Hi"}], "messages[0].role", "missing"),
    "no content": ([{"role": "user"}], "messages[0].content", "missing"),
    "content": (message(content=5), "messages[0].content", "expected a string"),
    "kind of part": (message(content=[{"type": "video"}]), "messages[0].content[0]", "image_url"),
    "part without a kind": (message(content=[{"text": "a"}]), "messages[0].content[0]", "type"),
    "part without text": (message(content=[{"type": "text"}]), "messages[0].content[0].text", "missing"),
    "part of another type": (message(content=["a"]), "messages[0].content[0]", "expected an object"),
    "key of a part": (message(content=[{**text("a"), "x": 1}]), "messages[0].content[0].x", "not supported"),
    "tool calls": (message(tool_calls=[TOOL]), "messages", "tool_calls"),
    "not a message": (["Hi"], "messages[0]", "expected an object"),
    "order": ([*user("Hi"), *user("Hi")], "messages", "alternating"),
    "only a system": ([{"role": "system", "content": "Hi"}], "messages", "from the user"),
    "late system": ([*user("Hi"), {"role": "system", "content": "Hi"}, *user("Hi")], "messages", "only the first"),
    "answer": ([*user("Hi"), {"role": "assistant", "content": "Hi"}], "messages", "from the user"),
    "surrogate": (user("\ud800"), "messages", "not valid UTF-8"),
    "long": (user("word " * 3000), "messages", "exceeds the model's context of 1024"),
}


@pytest.mark.parametrize(("messages", "param", "mention"), MESSAGES.values(), ids=MESSAGES)
def test_what_is_wrong_with_a_message_is_said(server: Server, messages: list[Any], param: str, mention: str):
    body = json.dumps({"model": server.name, "messages": messages}).encode()
    check(raw(server, CHAT, body), 400, param, mention)


def test_a_prompt_beyond_the_context_has_openais_code(server: Server):
    for response in (
        server.post(CHAT, messages=user("word " * 3000)),
        server.post(COMPLETIONS, prompt="word " * 3000),
        server.post(COMPLETIONS, prompt=[1] * 1024, max_tokens=1),
    ):
        assert response.json()["error"]["code"] == "context_length_exceeded"


def with_url(url: Any) -> list[Any]:
    return user(text("What is it?"), {"type": "image_url", "image_url": {"url": url}})


PNG = drawn()
PICTURES: dict[str, tuple[str, int]] = {
    "no URL": ("a picture", 400),
    "path": ("/etc/passwd", 400),
    "file": ("file:///etc/passwd", 400),
    "base64": ("data:image/png;base64,!!!!", 400),
    "padding": ("data:image/png;base64,abc", 400),
    "not base64": ("data:image/png,abc", 400),
    "empty": ("data:image/png;base64,", 400),
    "no comma": ("data:image/png;base64", 400),
    "text": ("data:text/plain;base64,aGVsbG8=", 415),
    "no type": ("data:;base64,aGVsbG8=", 415),
    "words": (data_url(b"hello"), 400),
    "cut off": (data_url(PNG[: len(PNG) // 2]), 400),
    "SVG": (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), 400),
    "header only": (data_url(PNG[:33]), 400),
}


@pytest.mark.parametrize(("url", "status"), PICTURES.values(), ids=PICTURES)
def test_a_picture_that_cannot_be_read_is_refused(server: Server, url: str, status: int):
    error = check(server.post(CHAT, messages=with_url(url)), status, "messages")
    assert "etc/passwd" not in error["message"]


def test_too_many_pictures_are_refused(server: Server):
    messages = user(*[picture(PNG)] * 17, text("What are they?"))
    check(server.post(CHAT, messages=messages), 400, "messages", "17 pictures; expected at most 16")


def test_only_users_have_pictures(server: Server):
    messages = [{"role": "system", "content": [picture(PNG)]}, *user("Hi")]
    check(server.post(CHAT, messages=messages), 400, "messages", "only user messages can contain images")


def test_a_model_without_vision_refuses_pictures(adapted: Server):
    """Its adapters have vision, and take them."""
    messages = user(picture(PNG), text("Hi"))
    check(adapted.post(CHAT, messages=messages), 400, "messages", "no vision tower")
    assert adapted.post(CHAT, messages=messages, model="cats", max_tokens=1).status_code == 200


NO_OBJECTS = [b"", b" ", b"null", b"[]", b"5", b'"text"', b"true"]
NO_JSON = [b"{", b"{'model': 1}", b'{"model": }', b"\xff\xfe", b'{"a": 1} x', b"model=llava-tiny", b'{"a": "\x01"}']


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize("body", NO_OBJECTS, ids=repr)
def test_a_body_must_be_an_object(server: Server, path: str, body: bytes):
    check(raw(server, path, body), 400)


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize("body", NO_JSON, ids=repr)
def test_a_body_must_be_json(server: Server, path: str, body: bytes):
    check(raw(server, path, body), 400, None, "not valid JSON")


@pytest.mark.parametrize("deep", [b"[" * 200_000, b'{"a":' * 200_000, b'{"model":' + b"[" * 5000 + b"]" * 5000 + b"}"])
def test_deep_bodies_are_refused(server: Server, deep: bytes):
    assert raw(server, CHAT, deep).status_code in (400, 413)
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "presence_penalty", "seed", "n", "model"])
def test_numbers_must_be_finite(server: Server, name: str, number: str):
    body = f'{{"model": "{server.name}", "prompt": "a", "max_tokens": 1, "{name}": {number}}}'
    check(raw(server, COMPLETIONS, body.encode()), 400, name)


def test_a_bias_must_be_finite(server: Server):
    body = f'{{"model": "{server.name}", "prompt": "a", "logit_bias": {{"5": NaN}}}}'
    check(raw(server, COMPLETIONS, body.encode()), 400, "logit_bias")


@pytest.mark.parametrize(
    "key", ["\ud800", "k" * 100_000, "a\nb", "é"], ids=["surrogate", "long", "line break", "accent"]
)
def test_strange_keys_are_refused(server: Server, key: str):
    body = {"model": server.name, **PROMPTS[COMPLETIONS], key: 1}
    response = raw(server, COMPLETIONS, json.dumps(body).encode())
    assert response.status_code == 400
    assert len(response.content) < 1000


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "application/jsonp"],
)
def test_a_body_of_another_type_is_refused(server: Server, kind: str):
    body = json.dumps({"model": server.name, **PROMPTS[CHAT]}).encode()
    check(raw(server, CHAT, body, **{"content-type": kind}), 415, None, "application/json")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_the_type_may_have_parameters(server: Server, kind: str):
    body = json.dumps({"model": server.name, **PROMPTS[CHAT]}).encode()
    assert raw(server, CHAT, body, **{"content-type": kind}).status_code == 200


def blocks(n: int) -> Iterator[bytes]:
    yield b'{"model": "'
    for _ in range(n):
        yield b"a" * 2**20


@pytest.mark.parametrize("content", [b"a" * (33 * 2**20), 33], ids=["announced", "in chunks"])
def test_a_large_body_is_refused(server: Server, content: Any):
    body = content if isinstance(content, bytes) else blocks(content)
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as http:
        response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    check(response, 413, None, "33554432 bytes")
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize("length", ["99999999999", "9" * 400, "-1", "+5", "1e3", "ten"])
def test_a_length_that_lies_is_refused(server: Server, length: str):
    """The body is not waited for."""
    address = httpx.URL(server.url)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
    with socket.create_connection((address.host, address.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).split()[1] in (b"400", b"413")


METHODS = [
    ("GET", CHAT, "POST"),
    ("PUT", COMPLETIONS, "POST"),
    ("DELETE", TOKENIZE, "POST"),
    ("DELETE", "/v1/models", "GET"),
    ("PATCH", "/v1/models/llava-tiny", "GET"),
    ("POST", "/health", "GET, HEAD"),
    ("POST", "/metrics", "GET"),
    ("OPTIONS", CHAT, "POST"),
    ("TRACE", "/version", "GET"),
]


@pytest.mark.parametrize(("method", "path", "allowed"), METHODS)
def test_a_wrong_method_is_answered_with_the_right_one(server: Server, method: str, path: str, allowed: str):
    response = server.http.request(method, path, headers={"content-type": "application/json"})
    check(response, 405, None, "does not take this method")
    assert sorted(response.headers["allow"].split(", ")) == sorted(allowed.split(", "))


@pytest.mark.parametrize("path", ["/v1", "/v1/embeddings", "/docs", "/redoc", "/v1/chat/completions/", "/%00", "/../x"])
def test_an_unknown_path_is_not_found(server: Server, path: str):
    check(server.http.get(path), 404, None, "does not exist")
    check(server.http.post(path, json={}), 404, None, "does not exist")


def test_more_choices_than_ever_run_are_refused_for_good(server: Server):
    """429 would promise that they fit later."""
    check(server.post(COMPLETIONS, prompt=["a"] * 20, n=16), 400, "n", "320 choices; expected at most 256")


def test_a_full_queue_is_busy_for_now(server: Server):
    """The largest requests fill it, and the server recovers."""
    body = {"model": server.name, "prompt": ["a"] * 16, "n": 16, "stream": True, "max_tokens": 500}
    with server.http.stream("POST", COMPLETIONS, json={**body, "logit_bias": {"2": -100}}) as response:
        lines = response.iter_lines()  # the connection is closed with it
        next(lines)
        busy = server.post(COMPLETIONS, prompt="a", max_tokens=1)
        assert check(busy, 429, None, "try again later")["code"] == "queue_full"
        assert busy.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            server.complete("a")
    server.waits_until("llava_num_requests_running", 0)
    assert server.post(COMPLETIONS, prompt="a", max_tokens=1).status_code == 200


def test_openais_client_raises_its_own_errors(server: Server):
    with pytest.raises(openai.BadRequestError, match="temperature is -1") as caught:
        server.chat(user("Hi"), temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported"):
        server.chat(user("Hi"), tools=[TOOL])
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.2).chat.completions.create(
            model=server.name, messages=user("Hi"), max_tokens=900, logit_bias={"2": -100}
        )


def test_errors_end_no_other_request(server: Server):
    with server.http.stream(
        "POST",
        COMPLETIONS,
        json={"model": server.name, "prompt": "a", "stream": True, "max_tokens": 60, "temperature": 0},
    ) as response:
        for value in (-1, "hot", None, 10**400):
            server.post(CHAT, messages=user("Hi"), temperature=value, max_tokens=1)
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    content = "".join(one["choices"][0]["text"] for one in chunks)
    assert content == server.complete("a", max_tokens=60).choices[0].text
