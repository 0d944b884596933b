"""The command: how a server starts, under which names, and who may use it."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.command import assert_one_line_error, run, start, wait_for_output
from tests.serving import TIMEOUT_S, Server, serving, user

KEYS = ("from the environment", "first-in-file", "second-in-file")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys of both sources, a name of its own and another address of this machine."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys.txt"
    keys.write_text(f"# people\n{KEYS[1]}\n\n  {KEYS[2]}  \n")
    arguments = ("--served-model-name", "eyes/v1", "--api-key-file", keys, "--device", "cpu")
    vlm: Any = None  # nothing is computed here
    with serving(
        folder / "errors.txt", vlm, "eyes/v1", *arguments, env={**os.environ, "LLAVA_API_KEY": KEYS[0]}
    ) as one:
        yield one


def authorized(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(guarded: Server, key: str):
    found = guarded.http.get("/v1/models", headers=authorized(key))
    assert [one["id"] for one in found.json()["data"]] == ["eyes/v1"]
    client = guarded.client.with_options(api_key=key)
    answer = client.chat.completions.create(model="eyes/v1", messages=user("Hello"), max_tokens=1)
    assert answer.model == client.models.retrieve("eyes/v1").id == "eyes/v1"


PROTECTED = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/eyes/v1"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
]
WRONG_KEYS = {
    "missing": {},
    "wrong": authorized("guess"),
    "prefix": authorized(KEYS[1][:-1]),
    "longer": authorized(KEYS[1] + "x"),
    "comment": authorized("# people"),
    "empty": {"Authorization": "Bearer"},
    "basic": {"Authorization": f"Basic {KEYS[1]}"},
    "bare": {"Authorization": KEYS[1]},
    "other header": {"X-Api-Key": KEYS[1]},
}


@pytest.mark.parametrize("headers", WRONG_KEYS.values(), ids=WRONG_KEYS)
@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_nothing_opens_without_a_key(guarded: Server, method: str, path: str, headers: dict[str, str]):
    response = guarded.http.request(method, path, headers=headers, json={} if method == "POST" else None)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("authentication_error", None, "invalid_api_key")
    assert "Authorization: Bearer" in error["message"]
    assert not any(key in response.text for key in KEYS)


@pytest.mark.parametrize("path", ["/health", "/ready", "/version"])
def test_probes_need_no_key(guarded: Server, path: str):
    assert guarded.http.get(path).status_code == 200


def test_openai_says_that_a_key_is_wrong(guarded: Server):
    with pytest.raises(openai.AuthenticationError, match="the API key is not valid"):
        guarded.chat(user("Hello"))


def test_the_default_name_of_the_model_is_not_served(guarded: Server):
    body = {"model": "llava-tiny", "messages": user("Hello")}
    assert guarded.http.post("/v1/chat/completions", json=body, headers=authorized(KEYS[1])).status_code == 404


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_server_that_loads_is_alive_and_not_ready(tmp_path: Path):
    """It answers from the first moment, on the port that was asked for."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "errors.txt").open("wb") as errors:
        process = start("serve", "--port", port, "--device", "cpu", stderr=errors)
    seen: list[tuple[int, int, int]] = []
    with process, httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        try:
            end = time.monotonic() + TIMEOUT_S
            while time.monotonic() < end and process.poll() is None and (not seen or seen[-1][1] != 200):
                try:
                    health, ready = http.get("/health"), http.get("/ready")
                    asked = http.post("/v1/completions", json={"model": "llava-tiny", "prompt": "a", "max_tokens": 1})
                except httpx.ConnectError:  # Python has not imported everything yet
                    time.sleep(0.01)
                    continue
                seen.append((health.status_code, ready.status_code, asked.status_code))
                if ready.status_code == 503:
                    assert ready.json()["error"]["code"] == "loading"
                    assert ready.headers["retry-after"] == "1"
            assert seen[0] == (200, 503, 503)
            assert {one[:2] for one in seen} == {(200, 503), (200, 200)}
            assert seen[-1][2] == 200
            assert wait_for_output(process) == f"llava: serving llava-tiny at {url}\n"
        finally:
            process.kill()


def test_a_folder_is_served_under_its_name(base: Path, adapted: Server):
    """The fixture has checked the line on stdout."""
    assert adapted.name == base.name


REFUSED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "address without a key": (["--host", "0.0.0.0"], ("--host 0.0.0.0", "LLAVA_API_KEY", "--api-key-file")),
    "all addresses": (["--host", "::"], ("--host ::", "no key is set")),
    "unknown host": (["--host", "nothing.invalid"], ("--host nothing.invalid",)),
    "no such model": (["--model", "nowhere/to/be/found"], ("nowhere/to/be/found",)),
    "no such key file": (["--api-key-file", "missing.txt"], ("--api-key-file missing.txt", "cannot be read")),
    "empty key file": (["--api-key-file", os.devnull], ("--api-key-file", "contains no key")),
    "engine option": (["--max-batch", "0"], ("--max-batch",)),
}


@pytest.mark.parametrize(("arguments", "mentions"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_refused(arguments: list[str], mentions: tuple[str, ...]):
    done = run("serve", "--port", "0", "--device", "cpu", *arguments)
    assert_one_line_error(done, *mentions)
    assert done.stdout == ""


def test_a_port_in_use_is_refused(server: Server):
    port = httpx.URL(server.url).port
    done = run("serve", "--port", port)
    assert_one_line_error(done, f"--port {port}", "choose another")


def test_a_key_is_no_argument():
    """All users of a machine can list the arguments of a process."""
    assert "--api-key-file" in run("serve", "--help").stdout
    done = run("serve", "--api-key", "secret")
    assert done.returncode == 2
    assert "No such option" in done.stderr
