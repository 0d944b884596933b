"""What hostile clients do to the server: malformed requests, bombs, tricks with headers, and vanishing."""

import json
import os
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from tests.hostile import (
    CHAT,
    COMPLETION,
    EXPLAIN,
    KEY,
    MODEL,
    TOKENIZE,
    Victim,
    chat,
    completion,
    data_url,
    head,
    picture,
    post,
    read,
    refused,
    resized_png,
    served,
    wait_until,
)
from tests.malformed import send_all

AUTHORIZED = f"Authorization: Bearer {KEY}"
SURROGATE = "\ud800"
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """llava-tiny, served with a key to all tests of this file."""
    with served(tmp_path_factory.mktemp("attacked") / "log") as victim:
        yield victim


@pytest.fixture
def victim(server: Victim) -> Iterator[Victim]:
    """The server, which has to be unharmed after each test."""
    yield server
    server.assert_unharmed()


def test_malformed_requests_get_errors_in_our_own_words_and_harm_nobody(victim: Victim) -> None:
    report = send_all(victim, seed=0, n=int(os.environ.get("LLAVA_FUZZ_REQUESTS", "300")))
    assert report["failures"] == []
    assert sum(sum(found.values()) for found in report["statuses"].values()) == report["requests"]


# --------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("depth", [100, 900, 1100, 100_000])
@pytest.mark.parametrize("bracket", ["[]", '{"a":}'])
def test_deeply_nested_json_is_refused(victim: Victim, depth: int, bracket: str) -> None:
    nested = bracket[:-1] * depth + "1" + bracket[-1] * depth
    schema = f'{{"type": "json_schema", "json_schema": {{"schema": {{"const": {nested}}}}}}}'
    for body in (nested, f'{{"model": "{MODEL}", "prompt": "a", "x": {nested}}}'):
        refused(victim.post(COMPLETION, body), 400)
    answer = victim.post(CHAT, f'{{"model": "{MODEL}", "messages": [], "response_format": {schema}}}')
    refused(answer, 400)
    with_schema = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "a"}}], "max_tokens": 1, '
    answer = victim.post(CHAT, f'{with_schema}"response_format": {schema}}}')
    assert answer.status in (200, 400)  # 200: as deep as llguidance allows
    assert answer.status == 200 or answer.message


MANY = 2 * MIB // 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETION, '{"prompt": [' + "{}," * MANY + "{}]}"),
        (COMPLETION, '{"prompt": [' + "[]," * MANY + "[]]}"),
        (COMPLETION, '{"prompt": "a", "stop": [' + "10," * MANY + "1]}"),
        (CHAT, '{"messages": [' + "{}," * MANY + "{}]}"),
        (CHAT, '{"messages": [{"role": "user", "content": [' + "{}," * MANY + "{}]}]}"),
        (TOKENIZE, "{" + ",".join(f'"{i}": 0' for i in range(MANY // 4)) + "}"),
    ],
    ids=["prompts", "empty prompts", "stops", "messages", "parts", "keys"],
)
def test_a_body_of_many_small_values_takes_neither_memory_nor_time(victim: Victim, path: str, body: str) -> None:
    before, started = victim.memory(), time.monotonic()
    victim.reset_peak()
    refused(victim.post(path, body), 413, "values")
    assert victim.memory("VmHWM") - before < 50 * MIB  # it was 1.5 GiB when each value was validated
    assert time.monotonic() - started < 2


def test_a_list_ends_at_its_first_wrong_value(victim: Victim) -> None:
    before = victim.memory()
    victim.reset_peak()
    refused(victim.post(CHAT, '{"messages": [' + "{}," * 70_000 + "{}]}"), 400, "is missing")
    assert victim.memory("VmHWM") - before < 150 * MIB


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(victim: Victim) -> None:
    started = time.monotonic()
    for text in ("a" * 2_000_000, "\ufdfa" * 300_000, "<image>" * 300_000):
        refused(victim.post(COMPLETION, completion(text)), 400, "characters", "shorten")
        refused(victim.post(COMPLETION, completion(["a", text])), 400, "characters")
        refused(victim.post(CHAT, chat(text)), 400, "characters")
        refused(victim.post(CHAT, chat([{"type": "text", "text": text[::2]}] * 2)), 400, "characters")
        refused(victim.post(TOKENIZE, {"prompt": text}), 400, "characters")
    assert time.monotonic() - started < 10  # tokenising one of them takes as long


def test_texts_that_fit_the_context_are_not_refused_for_their_length(victim: Victim) -> None:
    spaces = victim.post(TOKENIZE, {"prompt": " " * 4000})
    assert spaces.status == 200 or "tokens" in spaces.message


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETION, completion(SURROGATE)),
        (COMPLETION, completion(["a", SURROGATE])),
        (COMPLETION, completion(**{SURROGATE: 1})),
        (COMPLETION, completion(logit_bias={SURROGATE: 1})),
        (CHAT, chat(SURROGATE)),
        (CHAT, chat([{"type": SURROGATE}])),
        (CHAT, chat([{"type": "text", "text": "a", SURROGATE: 1}])),
        (CHAT, chat([{"type": "image_url", "image_url": {"url": SURROGATE}}])),
        (CHAT, chat(stream=True, stream_options={SURROGATE: True})),
        (TOKENIZE, {"prompt": SURROGATE}),
        (TOKENIZE, {SURROGATE: 1}),
    ],
)
def test_half_a_surrogate_pair_is_refused(victim: Victim, path: str, body: Any) -> None:
    refused(victim.post(path, body), 400)


def test_half_a_surrogate_pair_names_no_model(victim: Victim) -> None:
    refused(victim.post(COMPLETION, {"model": SURROGATE, "prompt": "a"}), 404, r"\ud800")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, '"1"', "{}", "[]"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "n", "seed", "repetition_penalty", "max_tokens"])
def test_numbers_beyond_all_bounds_are_refused(server: Victim, name: str, value: str) -> None:
    refused(server.post(COMPLETION, f'{{"model": "{MODEL}", "prompt": "a", "{name}": {value}}}'), 400)


@pytest.mark.parametrize("value", ["5e-324", "1e-300", "-0.0"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_the_smallest_numbers_stop_no_step(server: Victim, name: str, value: str) -> None:
    answer = server.post(COMPLETION, f'{{"model": "{MODEL}", "prompt": "a", "max_tokens": 2, "{name}": {value}}}')
    assert answer.status == 200 or (answer.status, name) == (400, "repetition_penalty")


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ([{"type": "text"}], "messages[0].content[0].text is missing"),
        ([{"type": "image_url", "image_url": "x"}], 'messages[0].content[0].image_url is "x"; expected an object'),
        ([{"type": "text", "text": 5}], "messages[0].content[0].text is 5; expected a string"),
        (5, "messages[0].content is 5; expected a string"),
    ],
)
def test_an_error_names_the_deepest_problem(server: Victim, parts: Any, name: str) -> None:
    refused(server.post(CHAT, chat(parts)), 400, name)


@pytest.mark.parametrize("path", [CHAT, EXPLAIN, TOKENIZE])
def test_a_conversation_without_messages_is_refused(server: Victim, path: str) -> None:
    body = {"messages": []} if path == TOKENIZE else chat() | {"messages": []}
    refused(server.post(path, body), 400, "messages is an empty list")


# ------------------------------------------------------------------------------------------------------ schemas


def _formatted(schema: object, **options: object) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return chat(response_format=form, temperature=0, **options)


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [SURROGATE]},
        {SURROGATE: 1},
        {"minimum": float("nan"), "type": "number"},
        {"maximum": float("inf"), "type": "number"},
        {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "(?=a)a"},
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"$ref": "http://127.0.0.1/schema"},
        {"$ref": "file:///etc/passwd"},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}},
        {"enum": []},
        {"description": "a" * 70_000},
    ],
    ids=range(14),
)
def test_a_schema_that_no_reply_can_follow_is_refused(victim: Victim, schema: object) -> None:
    refused(victim.post(CHAT, _formatted(schema, n=16)), 400, "response_format", "schema")


def test_a_schema_that_becomes_too_complex_within_a_reply_ends_only_that_reply(victim: Victim) -> None:
    inner = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}
    schema = {"type": "object", "properties": {"a": inner}, "required": ["a"], "additionalProperties": False}
    expected = victim.honest()
    with ThreadPoolExecutor(1) as pool:
        complex_ = pool.submit(victim.post, CHAT, _formatted(schema, max_tokens=64))
        while not complex_.done():
            assert victim.honest() == expected
    refused(complex_.result(), 400, "too complex")
    streamed = victim.post(CHAT, _formatted(schema, max_tokens=64, stream=True))
    assert streamed.status == 200
    assert b"too complex" in streamed.body
    assert b"server_error" not in streamed.body


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "string", "pattern": r"\p{L}{9000}"},
        {"type": "string", "pattern": "((a{0,100}){0,100}){0,100}"},
        {"type": "array", "minItems": 10**9},
        {"type": "string", "minLength": 10**9, "maxLength": 10**9},
        {"enum": [f"value {i}" for i in range(3000)]},
        {"$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}}, "required": ["b"]}}, "$ref": "#/$defs/a"},
    ],
    ids=range(7),
)
def test_a_costly_schema_holds_nobody_up(victim: Victim, schema: object) -> None:
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        costly = pool.submit(victim.post, CHAT, _formatted(schema, n=4, max_tokens=8))
        slowest = 0.0
        while not costly.done():
            asked = time.monotonic()
            assert victim.get("/health").status == 200
            slowest = max(slowest, time.monotonic() - asked)
    assert costly.result().status == 200
    assert slowest < 2
    assert time.monotonic() - started < 10


# --------------------------------------------------------------------------------------------------------- HTTP


POST = f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\n{AUTHORIZED}\r\nContent-Type: application/json\r\n".encode()


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\r\n\r\n",  # https
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\0b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000,
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        POST + b"Content-Length: -1\r\n\r\n{}",
        POST + b"Content-Length: 0x2\r\n\r\n{}",
        POST + b"Transfer-Encoding: identity\r\n\r\n{}",
        POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}",
        POST + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}",
    ],
    ids=range(13),
)
def test_what_is_not_http_gets_an_error_of_ours_and_is_logged_and_counted(victim: Victim, request_: bytes) -> None:
    before = n_responses(victim, 400)
    answer = victim.send(request_)
    refused(answer, 400, "not valid HTTP")
    assert answer.headers["connection"] == "close"
    assert wait_until(lambda: n_responses(victim, 400) == before + 1)
    lines = [line for line in victim.log.read_text().splitlines() if answer.headers["x-request-id"] in line]
    assert [json.loads(line)["status"] for line in lines] == [400]


def n_responses(victim: Victim, status: int) -> float:
    """How many responses with a status the server has counted."""
    lines = victim.get("/metrics").body.decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if "_responses_total{" in line and f'="{status}"' in line)


def test_a_body_that_is_broken_after_the_answer_only_ends_the_connection(victim: Victim) -> None:
    with victim.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert read(connection).status == 200
        connection.sendall(b"ZZ\r\n")
        with suppress(ConnectionError):  # it may be reset
            assert connection.recv(100) == b""


def test_a_request_with_two_lengths_is_refused(victim: Victim) -> None:
    chunked = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    answer = victim.send(POST + chunked)
    refused(answer, 400, "Transfer-Encoding", "Content-Length")
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("target", ["GET /health", "GET /nowhere", f"PUT {COMPLETION}"])
def test_an_unread_body_ends_the_connection_and_no_other_does(victim: Victim, target: str) -> None:
    start = f"{target} HTTP/1.1\r\nHost: localhost\r\n{AUTHORIZED}\r\n"
    with victim.connect() as connection:
        for _ in range(2):
            connection.sendall(f"{start}\r\n".encode())
            assert "connection" not in read(connection).headers
        connection.sendall(f"{start}Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n".encode())
        assert read(connection).headers["connection"] == "close"
        assert connection.recv(100) == b""


def test_an_endless_body_ends_at_the_limit(victim: Victim) -> None:
    before = victim.memory()
    victim.reset_peak()
    with victim.connect() as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b" " * MIB + b"\r\n"
        sent = 0
        with suppress(OSError):  # reset, or a broken pipe
            while sent < 2000:
                connection.sendall(chunk)
                sent += 1
    assert sent < 100
    assert victim.memory("VmHWM") - before < 150 * MIB


def test_a_body_that_claims_to_be_too_long_is_refused_before_it_is_read(victim: Victim) -> None:
    refused(victim.send(POST + b"Content-Length: 33554433\r\n\r\n"), 413, "bytes")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "evil@localhost", "localhost:80@evil", "localhost, evil", "127.1", ""],
)
def test_another_host_is_refused(victim: Victim, host: str) -> None:
    refused(victim.send(head("GET", "/v1/models", AUTHORIZED, host=host)), 403, "Host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000"])
def test_names_of_this_machine_are_hosts(server: Victim, host: str) -> None:
    assert server.send(head("GET", "/v1/models", AUTHORIZED, host=host)).status == 200


@pytest.mark.parametrize("target", ["http://evil.example/v1/models", "http://localhost/v1/models", "*", "//v1/models"])
def test_a_target_with_a_host_of_its_own_is_no_path(victim: Victim, target: str) -> None:
    refused(victim.get(target), 404)


@pytest.mark.parametrize(
    "origins", [["http://evil.example"], ["null"], ["file://"], ["http://localhost", "http://evil.example"]]
)
def test_pages_of_other_origins_are_refused(victim: Victim, origins: list[str]) -> None:
    refused(victim.get("/v1/models", *(f"Origin: {origin}" for origin in origins)), 403, "origin")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Authorization: Bearer"],
        ["Authorization: Bearer "],
        [f"Authorization: {KEY}"],
        [f"Authorization: Basic {KEY}"],
        [f"Authorization: Bearer {KEY[:-1]}"],
        [f"Authorization: Bearer  {KEY}"],
        [f"Authorization: Bearer {KEY}\xff"],
        ["Authorization: Bearer " + "a" * 60_000],
        [AUTHORIZED, "Authorization: Bearer other"],
        ["Authorization: Bearer other", AUTHORIZED],
        [f"X-Api-Key: {KEY}"],
    ],
    ids=range(12),
)
@pytest.mark.parametrize(
    "path", ["/metrics", "/v1/models", "/health/../metrics", "/%6detrics", f"/v1/models?key={KEY}"]
)
def test_only_the_key_opens_what_is_protected(server: Victim, path: str, headers: list[str]) -> None:
    answer = server.send(head("GET", path, *headers))
    refused(answer, 401, "API key")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "%ff%fe", "a" * 60_000],
    ids=range(6),
)
def test_the_name_of_a_model_is_no_path(victim: Victim, name: str) -> None:
    answer = victim.get(f"/v1/models/{name}")
    refused(answer, 404, "does not exist")
    assert len(answer.message) < 300
    refused(victim.post(COMPLETION, {"model": name, "prompt": "a"}), 404, "does not exist")


def test_nothing_redirects(victim: Victim) -> None:
    answer = victim.get("/health/")
    refused(answer, 404)
    assert "location" not in answer.headers


@pytest.mark.parametrize("given", ["a b", "a\tb", "x" * 65, "\xe9", "%0d%0aX-Injected:1", '"}\\n{"'])
def test_a_request_id_that_could_inject_is_replaced(victim: Victim, given: str) -> None:
    answer = victim.get("/version", f"X-Request-Id: {given}")
    assert answer.headers["x-request-id"].startswith("req-")
    assert "x-injected" not in answer.headers
    assert given not in victim.log.read_text()


def test_the_schema_of_the_api_can_be_read_without_a_warning(victim: Victim) -> None:
    before = victim.log.read_text()
    assert victim.get("/openapi.json").status == 200
    assert "warning" not in victim.log.read_text()[len(before) :]


def test_what_clients_write_is_not_logged(victim: Victim) -> None:
    mark = "6f1a-mark"
    victim.get(f"/v1/models/{mark}%0a%7b%7d")
    victim.get(f"/{mark}", f"User-Agent: {mark}", f"Referer: {mark}")
    victim.post(CHAT, chat(mark))
    victim.post(CHAT, chat(**{mark: 1}))
    assert mark not in victim.log.read_text()


# ---------------------------------------------------------------------------------------------------- vanishing


def _vanishing() -> list[tuple[str, Any, dict[str, float]]]:
    """Returns what clients ask for, and how much of it and how long they wait before they vanish."""
    long: dict[str, Any] = completion("hi", max_tokens=500, n=2, logit_bias={"2": -100})
    shown = [{"type": "image_url", "image_url": {"url": data_url(picture())}}, {"type": "text", "text": "What?"}]
    many = completion(["a"] * 64, max_tokens=50)
    schema = {"properties": {f"p{i}": {"type": "string"} for i in range(100)}}
    requests = [
        (COMPLETION, long),
        (COMPLETION, long | {"stream": True}),
        (CHAT, chat(shown)),
        (CHAT, chat(shown, stream=True)),
        (COMPLETION, many),
        (CHAT, _formatted(schema, max_tokens=300)),
        (EXPLAIN, chat(shown, max_tokens=50)),
        (TOKENIZE, {"prompt": "a " * 2000}),
    ]
    moments = [{"share": 0.3}, {"share": 0.99}, {}, {"after_s": 0.003}, {"after_s": 0.03}, {"after_s": 0.2}]
    return [(path, body, moment) for path, body in requests for moment in moments]


def test_clients_that_vanish_at_any_moment_leave_nothing(victim: Victim) -> None:
    expected, children = victim.honest(), victim.children
    with ThreadPoolExecutor(16) as pool:
        gone = [pool.submit(victim.vanish, path, body, **when) for path, body, when in _vanishing() * 7]
        assert victim.get("/health").status == 200
        assert [one.result() for one in gone] == [None] * 336
    assert wait_until(lambda: not victim.running)
    assert victim.gauge("gpu_cache_usage_perc") == 0
    assert victim.honest() == expected
    assert victim.children == children


def test_a_client_that_reads_nothing_ends_with_its_connection(victim: Victim) -> None:
    body = completion("hi", max_tokens=900, n=8, logprobs=20, stream=True, logit_bias={"2": -100})
    connections: list[socket.socket] = []
    for _ in range(4):
        connections.append(victim.connect(receive_buffer=4096))
        connections[-1].sendall(post(COMPLETION, body))
    assert wait_until(lambda: victim.running == 32)
    assert victim.honest()
    for connection in connections:
        connection.close()
    assert wait_until(lambda: not victim.running)


# ----------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("contents", "mentions"),
    [
        (resized_png(picture(), 1, 60_000), "1 x 60000 pixels"),
        (resized_png(picture(), 60_000, 1), "60000 x 1 pixels"),
        (resized_png(picture(), 30_000, 30_000), "too many pixels"),
        (resized_png(picture(), 2**31 - 1, 2**31 - 1), "too many pixels"),
        (resized_png(picture(), 0, 0), "damaged"),
        (picture("JPEG")[:-90], "damaged"),
        (picture("EPS"), "format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "format"),
        (b"%PDF-1.4\n", "format"),
        (b"\x80\x04\x95cos\nsystem\n(S'touch marker'\ntR.", "format"),
    ],
    ids=range(10),
)
def test_a_picture_that_would_do_harm_is_refused_by_a_process_that_lives_on(
    victim: Victim, contents: bytes, mentions: str
) -> None:
    children = victim.children
    content = [{"type": "image_url", "image_url": {"url": data_url(contents)}}]
    refused(victim.post(CHAT, chat(content)), 400, mentions)
    assert victim.children == children


def test_libraries_that_decode_pictures_write_no_lines_into_the_log(victim: Victim) -> None:
    contents, rng = bytearray(picture("TIFF", (256, 256), "1", compression="group4")), random.Random(0)
    for _ in range(9):
        contents[rng.randrange(8, len(contents) // 2)] = rng.randrange(256)
        content = [{"type": "image_url", "image_url": {"url": data_url(bytes(contents))}}]
        assert victim.post(CHAT, chat(content)).status in (200, 400)
    assert "Fax4" not in victim.log.read_text()
