"""Malformed requests: JSON, pictures and heads of HTTP requests. A number and a seed name each of them.

python -m tests.malformed --n 10000 --out report.json    sends them to a server, and checks what it answers
python -m tests.malformed --case 17                      sends only request 17, and shows it and the answer
"""

import argparse
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from tests.hostile import (
    CHAT,
    COMPLETION,
    EXPLAIN,
    KEY,
    MODEL,
    TIME_S,
    TOKENIZE,
    Answer,
    Victim,
    chat,
    completion,
    data_url,
    picture,
    post,
    read,
    resized_png,
    served,
)

PATIENCE_S = 1  # until the request is ended, in case the server waits for more
_ENDS_AT_ONCE = {"2": 100}  # a bias for the token that ends a reply
_JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 17, 2**31, 2**63, -(2**70), 0.5, -1e-300, 1e308, float("nan"), float("inf"), "",
    "0", "\0", "\ud800", "\udfff\ud800", "a\r\nb: c", "<image>", "</s>", "é" * 300, "x" * 5000, [], [[]], [None], [0],
    ["a"], [[0, 1], [2]], [-1], ["a", 0], [{}], {}, {"": 0}, {"a": {"b": []}}, {"\ud800": 1}, {"0": 1e3},
    {"type": "text"}, {"type": "json_object"}, "json_schema", "user", "https://127.0.0.1/x.png", "data:image/png,",
    MODEL, {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
]  # fmt: skip
_NAMES = [
    "model", "messages", "prompt", "n", "stop", "seed", "stream", "stream_options", "logprobs", "top_logprobs", "tools",
    "temperature", "top_p", "top_k", "min_p", "logit_bias", "presence_penalty", "repetition_penalty", "response_format",
    "echo", "best_of", "max_completion_tokens", "user", "functions", "layers", "heads", "rollout", "\ud800", "", "a\0",
    "add_special_tokens",
]  # fmt: skip
_KEYWORDS: list[tuple[str, list[Any]]] = [
    ("type", ["object", "array", "string", "integer", "number", "null", "x", ["string", "null"]]),
    ("pattern", ["(a+)+$", "(?=a)", "[", "a{999}", "(a|b|ab)*c{500}", "\\p{L}+", "(" * 300, "\0"]),
    ("$ref", ["#", "#/$defs/a", "http://127.0.0.1/x", "file:///etc/passwd", "#/%00", "#/properties/a"]),
    ("minItems", [10**9, -1, "1"]),
    ("maxLength", [10**9, 0, 1.5]),
    ("enum", [[], [1, "a", None], [[], {}], "a"]),
    ("const", [{}, "\ud800", 1e308]),
    ("multipleOf", [0, 1e-300, 7]),
    ("format", ["uuid", "x", 1]),
    ("required", [["a"], "a", [1]]),
    ("not", [{}]),
    ("maximum", [float("nan"), 1e308, -1]),
    ("%lark", ["start: /x/"]),
]


def _bodies() -> list[tuple[str, dict[str, Any]]]:
    ends = {"logit_bias": _ENDS_AT_ONCE}
    shown = [{"type": "image_url", "image_url": {"url": data_url(picture())}}, {"type": "text", "text": "What?"}]
    return [
        (CHAT, chat(**ends)),
        (CHAT, chat(shown, **ends)),
        (CHAT, chat(stream=True, stream_options={"include_usage": True}, **ends)),
        (CHAT, chat(n=2, stop=["a"], seed=1, logprobs=True, top_logprobs=2, **ends)),
        (CHAT, chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}, max_tokens=4)),
        (COMPLETION, completion(["a", "b"], echo=True, logprobs=2, **ends)),
        (COMPLETION, completion([[1, 5], [1]], stream=True, temperature=0.5, **ends)),
        (EXPLAIN, chat(shown, layers=[0], rollout=True, **ends)),
        (TOKENIZE, {"prompt": "a b"}),
        (TOKENIZE, {"messages": chat()["messages"]}),
    ]


def _spots(value: Any) -> list[tuple[Any, Any]]:
    """Returns (container, key) of everything within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [spot for key, one in items for spot in [(value, key), *_spots(one)]]


def _schema(rng: random.Random, depth: int = 3) -> Any:
    """Returns a JSON schema that is often invalid."""
    schema: dict[str, Any] = {}
    for name, values in rng.sample(_KEYWORDS, rng.randint(0, 3)):
        schema[name] = rng.choice(values)
    if depth and rng.random() < 0.7:
        inner = _schema(rng, depth - 1)
        more = [{"properties": {"a": inner}}, {"items": inner}, {"anyOf": [inner, {}]}, {"$defs": {"a": inner}}]
        schema |= rng.choice([*more, {"allOf": [inner, inner]}, {"additionalProperties": inner}])
    return schema


def _bad_json(rng: random.Random) -> bytes:
    path, body = rng.choice(_bodies())
    body = deepcopy(body)
    if "response_format" in body:
        body["response_format"]["json_schema"]["schema"] = _schema(rng)
    for _ in range(rng.randint(0, 3)):
        if rng.random() < 0.4:
            body[rng.choice(_NAMES)] = deepcopy(rng.choice(_JUNK))
            continue
        container, key = rng.choice(_spots(body) or [(body, "model")])
        if isinstance(container, dict) and rng.random() < 0.2:
            container.pop(key, None)
        else:
            container[key] = deepcopy(rng.choice(_JUNK))
    text = json.dumps(body, ensure_ascii=rng.random() < 0.8)
    damage = rng.random()
    if damage < 0.1:
        text = text[: rng.randrange(len(text))]
    elif damage < 0.2:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["{", "]", '"', ",", "\\ud800", "\0", "1e999", "[" * 3000, "//", "-"]) + text[at:]
    elif damage < 0.25:
        return post(path, text.encode(rng.choice(["utf-16", "utf-32", "utf-7"]), "replace"))
    elif damage < 0.3:
        return post(path, _damaged(rng, text.encode("utf-8", "surrogatepass")))
    return post(path, text)


def _damaged(rng: random.Random, contents: bytes) -> bytes:
    """Changes, removes, repeats or inserts some bytes."""
    changed = bytearray(contents)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(changed) + 1)
        end = at + rng.choice([1, 1, 4, 64])
        kind = rng.randrange(4)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at:end] = rng.randbytes(len(changed[at:end]))
        elif kind == 2:
            del changed[at:end]
        else:
            changed[at:at] = rng.choice([changed[at:end], bytes(8), b"\xff" * 4])
    return bytes(changed)


_KINDS = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "I;16"), ("JPEG", "CMYK"), ("JPEG", "L"), ("GIF", "P"),
          ("WEBP", "RGBA"), ("BMP", "RGB"), ("TIFF", "F"), ("TIFF", "1"), ("ICO", "RGB"), ("PPM", "RGB"),
          ("EPS", "RGB"), ("PCX", "L"), ("TGA", "RGBA"), ("SGI", "RGB"), ("DDS", "RGB")]  # fmt: skip


def _bad_picture(rng: random.Random) -> bytes:
    kind, mode = rng.choice(_KINDS)
    contents = picture(kind, (rng.randint(1, 60), rng.randint(1, 60)), mode)
    if kind == "PNG" and rng.random() < 0.3:  # another size in the header, with the right checksum
        sides = rng.choice([(1, 60000), (30000, 30000), (0, 5), (2**31 - 1, 1), (7000, 7000), (60, 61)])
        contents = resized_png(contents, *sides)
    elif rng.random() < 0.2:
        contents = contents[: rng.randrange(1, len(contents))]
    elif rng.random() < 0.9:
        contents = _damaged(rng, contents) or b"x"
    url = data_url(contents)
    if rng.random() < 0.2:
        url = rng.choice(
            [url.replace("image/png", "text/html"), url[:-1], url.replace(";base64", ""), url + "=", url[5:]]
        )
    parts = [{"type": "image_url", "image_url": {"url": url}}] * rng.choice([1, 1, 2, 17])
    return post(rng.choice([CHAT, EXPLAIN]), chat(parts, logit_bias=_ENDS_AT_ONCE))


_VALUES = ["", " ", "evil.example", "127.0.0.1.evil.example", "localhost", "localhost:1", "[::1]", "null", "http://evil",
           "a, b", "chunked", "identity", "gzip", "-1", "5", "99999999999999999999", "0x5", "Bearer", f"Bearer {KEY}",
           "Bearer " + "a" * 9000, "Basic eA==", "close", "upgrade", "100-continue", "text/plain", "application/json;",
           "\xff\xfe", "a\tb", "a\x01b", "a\0b", "a\rb", "x" * 70000, "../../etc/passwd", "%0d%0aX-Y: z"]  # fmt: skip
_HEADERS = ["Host", "Origin", "Authorization", "Content-Length", "Transfer-Encoding", "Content-Type", "X-Request-Id",
            "Connection", "Expect", "Upgrade", "Content-Encoding", "Cookie", "X-Forwarded-For", "Range", "a b", "",
            "Access-Control-Request-Method"]  # fmt: skip
_TARGETS = [CHAT, COMPLETION, "/", "/health", "/health/", "//health", "/metrics", "/v1/models", "/openapi.json",
            "/docs", "/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f", "/v1/models/%00%0d%0a", "/v1/models/\ud7ff",
            "", " ", "*", "http://evil/health", "/health?" + "a" * 9000, "/a b", "/version#x", "/%ff"]  # fmt: skip
_METHODS = ["POST", "POST", "GET", "OPTIONS", "HEAD", "PUT", "TRACE", "CONNECT", "get", "P\0", "", "A" * 999]


def _bad_head(rng: random.Random) -> bytes:
    body = json.dumps(completion(logit_bias=_ENDS_AT_ONCE)).encode()
    lines = [f"Host: localhost:{rng.randrange(99999)}", f"Authorization: Bearer {KEY}", "Connection: close",
             "Content-Type: application/json", f"Content-Length: {len(body)}"]  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        change, line = rng.random(), f"{rng.choice(_HEADERS)}: {rng.choice(_VALUES)}"
        if change < 0.5:
            lines.insert(rng.randrange(len(lines) + 1), line)
        elif change < 0.8 and lines:
            lines[rng.randrange(len(lines))] = line
        elif lines:
            del lines[rng.randrange(len(lines))]
    version = rng.choice(["HTTP/1.1"] * 6 + ["HTTP/1.0", "HTTP/2.0", "HTTP/9", "ICY", ""])
    first = f"{rng.choice(_METHODS)} {rng.choice(_TARGETS) if rng.random() < 0.5 else COMPLETION} {version}"
    end = rng.choice(["\r\n"] * 9 + ["\n"])
    start = end.join([first, *lines, "", ""]).encode("utf-8")
    if rng.random() < 0.2:
        start = _damaged(rng, start)
    if rng.random() < 0.2:
        body = rng.choice(
            [b"5\r\nabc", b"ZZ\r\n", b"-1\r\n\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), b"0\r\n\r\n"]
        )
    return start + body


def malformed(seed: int, number: int) -> tuple[str, bytes]:
    """Returns the kind of a request, and the request."""
    rng = random.Random(f"{seed}/{number}")
    kinds = {"json": _bad_json, "picture": _bad_picture, "head": _bad_head}
    kind = list(kinds)[number % 3]
    return kind, kinds[kind](rng)


# ------------------------------------------------------------------------------------------------ many of them


def attempt(victim: Victim, request: bytes) -> tuple[Answer, str]:
    """Sends a request. Returns the answer, and what is wrong with it or ""."""
    with victim.connect() as connection:
        connection.settimeout(PATIENCE_S)
        try:
            with suppress(ConnectionError):  # it may answer and close before everything has arrived
                connection.sendall(request)
            answer = read(connection)
        except TimeoutError:  # it waits for more of the body, or does not answer
            answer = _after_the_end(connection)
    if answer is None:
        return Answer(0, {}, b""), "hangs"
    if answer.status >= 500 or b'"server_error"' in answer.body:
        return answer, f"failed: {answer.body[-300:]!r}"
    if answer.status < 400 or not answer.body:  # that of HEAD has no body
        return answer, ""
    try:
        _ = answer.message
    except (AssertionError, ValueError, KeyError, TypeError):
        return answer, f"not our error: {answer.body[:300]!r}"
    return answer, ""


def _after_the_end(connection: socket.socket) -> Answer | None:
    """Ends the request, and returns what the server says then, or None if it does not even close the connection."""
    connection.settimeout(TIME_S)
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
    try:
        return read(connection)
    except TimeoutError:
        return None


def send_all(victim: Victim, seed: int, n: int) -> dict[str, Any]:
    """Sends `n` requests one after the other, and an honest one after every hundredth. Returns a report."""
    statuses: dict[str, Counter[int]] = {}
    failures: list[str] = []
    slowest, expected, before, started = (0.0, 0), victim.honest(), victim.memory(), time.perf_counter()
    for number in range(n):
        kind, request = malformed(seed, number)
        sent = time.perf_counter()
        answer, problem = attempt(victim, request)
        slowest = max(slowest, (round(time.perf_counter() - sent, 2), number))
        statuses.setdefault(kind, Counter())[answer.status] += 1
        if problem:
            failures.append(f"request {number}, {kind}: {problem}")
        if number % 100 == 99 and victim.honest() != expected:
            failures.append(f"after request {number}: another answer to the honest request")
    return {
        "requests": n,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "statuses": {kind: dict(sorted(found.items())) for kind, found in sorted(statuses.items())},
        "slowest": {"seconds": slowest[0], "request": slowest[1]},
        "memory_grew_by": victim.memory() - before,
        "failures": failures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="send only this request")
    parser.add_argument("--out", type=Path, help="JSON file for the report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "log") as victim:
        if options.case is not None:
            _, request = malformed(options.seed, options.case)
            print(request, *attempt(victim, request), victim.log.read_text(), sep="\n\n")
            return 0
        report = send_all(victim, options.seed, options.n)
        victim.assert_unharmed()
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return int(bool(report["failures"]))


if __name__ == "__main__":
    sys.exit(main())
