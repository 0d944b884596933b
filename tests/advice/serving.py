"""Advice about serving: of the command, and of the server to its clients."""

import contextlib
import functools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from starlette.testclient import TestClient

import llava
from llava.errors import ConfigError, LlavaError
from llava.serve.access import Access
from llava.serve.app import create
from llava.serve.limits import Limits
from llava.serve.server import bind
from llava.serve.settings import Settings
from tests.advice.table import Run, Steps, World, advice
from tests.serve.certificates import certificate
from tests.serving import drawn, picture, text, user

PICTURE, QUESTION = picture(drawn()), text("What is it?")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def serve(*arguments: object) -> Run:
    """Plans to serve llava-tiny."""
    return ("serve", "--dry-run", "--device", "cpu", *arguments)


@functools.cache
def client(limits: Limits | None = None, *, vision: bool = True, **access: Any) -> TestClient:
    """A client of a server in this process."""
    load = functools.partial(llava.load, device="cpu", vision=vision)
    settings = Settings(name="llava-tiny", access=Access(host="127.0.0.1", **access), limits=limits or Limits())
    made = TestClient(create(load, settings), base_url="http://127.0.0.1", raise_server_exceptions=False)
    contextlib.ExitStack().enter_context(made)
    while made.get("/ready").status_code != 200:
        time.sleep(0.05)
    return made


def post(
    path: str, *, of: Callable[[], TestClient] = client, headers: dict[str, str] | None = None, **body: Any
) -> Run:
    """Sends a body. Errors are raised with the message that the server answered."""

    def run() -> object:
        answer = of().post(path, json={"model": "llava-tiny", "max_tokens": 2, **body}, headers=headers)
        if answer.status_code != 200:
            raise LlavaError(answer.json()["error"]["message"])
        return answer.text

    return run


def chat(*parts: Any, **more: Any) -> Run:
    return post("/v1/chat/completions", messages=user(*parts), **more)


def complete(**more: Any) -> Run:
    return post("/v1/completions", **{"prompt": "A cat", **more})


# --- the command ------------------------------------------------------------------------------------------------------


@advice("llava serve needs {}: pip install 'llava-native[serve]'")
def a_missing_package(w: World) -> Steps:
    with mock.patch.dict(sys.modules, {"llava.serve": None}):
        yield serve()
    yield serve()


@advice("llava bench-serve needs httpx: pip install 'llava-native[serve]'", succeeds=False)
def a_missing_http_client(w: World) -> Steps:
    command = ("bench-serve", "http://127.0.0.1:1", "--model", "x", "--requests", 1)
    with mock.patch.dict(sys.modules, {"httpx": None}):
        yield command
    yield command


@advice("--json is for --dry-run: add it, or leave --json out")
def json_without_a_plan(w: World) -> Steps:
    yield ("serve", "--json", "--device", "cpu")
    yield serve("--json")


@advice("--api-key-file {}: cannot be read ({})")
def a_missing_key_file(w: World) -> Steps:
    yield serve("--api-key-file", w / "keys")
    (w / "keys").write_text("secret\n")
    yield serve("--api-key-file", w / "keys")


@advice("contains no key; write one per line")
def an_empty_key_file(w: World) -> Steps:
    (w / "keys").write_text("\n# none yet\n")
    yield serve("--api-key-file", w / "keys")
    (w / "keys").write_text("secret\n")
    yield serve("--api-key-file", w / "keys")


@advice("an API key has characters that a header cannot carry; use printable ASCII")
def a_key_with_umlauts(w: World) -> Steps:
    (w / "keys").write_text("schlüssel\n")
    yield serve("--api-key-file", w / "keys")
    (w / "keys").write_text("schluessel\n")
    yield serve("--api-key-file", w / "keys")


@advice("no key is set: set LLAVA_API_KEY or --api-key-file, or bind 127.0.0.1")
def an_open_address_without_a_key(w: World) -> Steps:
    yield serve("--host", "0.0.0.0")
    (w / "keys").write_text("secret\n")
    yield serve("--host", "0.0.0.0", "--api-key-file", w / "keys")


@advice("expected SCHEME://HOST, such as https://example.org")
def an_origin_without_a_scheme(w: World) -> Steps:
    yield serve("--allow-origin", "example.org")
    yield serve("--allow-origin", "https://example.org")


@advice("expected a host, such as pictures.example.org")
def an_address_as_a_media_host(w: World) -> Steps:
    yield serve("--allow-media-host", "https://pictures.example.org/")
    yield serve("--allow-media-host", "pictures.example.org")


@advice("https needs both a certificate and its key: set --certificate and --private-key")
def a_certificate_without_its_key(w: World) -> Steps:
    file, key = certificate(w.tmp, "localhost")
    yield serve("--certificate", file)
    yield serve("--certificate", file, "--private-key", key)


@advice("choose a certificate with its own key")
def a_key_of_another_certificate(w: World) -> Steps:
    file, key = certificate(w.tmp, "localhost")
    _, other = certificate(w.tmp, "example.org")
    yield serve("--certificate", file, "--private-key", other)
    yield serve("--certificate", file, "--private-key", key)


@advice("--log-file {}: cannot be written ({}); choose another file", succeeds=False)
def a_log_in_a_missing_folder(w: World) -> Steps:
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    yield ("serve", "--port", port, "--log-file", w / "missing" / "log")
    yield ("serve", "--port", port, "--log-file", w / "log")
    taken.close()


@advice("cannot be used ({}); choose another")
def a_port_that_is_taken(w: World) -> Steps:
    taken = bind("127.0.0.1", 0)
    yield lambda: bind("127.0.0.1", taken.getsockname()[1])
    yield lambda: bind("127.0.0.1", 0).close()
    taken.close()


@advice("is no address of this machine; bind 127.0.0.1, or 0.0.0.0 for all")
def an_unknown_host(w: World) -> Steps:
    unknown = mock.patch.object(socket, "getaddrinfo", side_effect=socket.gaierror(-2, "unknown"))
    with unknown:
        yield lambda: bind("no-such-host.invalid", 0)
    yield lambda: bind("127.0.0.1", 0).close()


@advice("the model and an adapter are both named {}; set another --served-model-name")
def an_adapter_with_the_name_of_the_model(w: World) -> Steps:
    def run(name: str) -> None:
        load = functools.partial(llava.load, w.llama, adapters={"cats": w.lora}, device="cpu")
        app = create(load, Settings(name=name, access=Access(host="127.0.0.1")))
        with TestClient(app, base_url="http://127.0.0.1") as one:
            while one.get("/ready").status_code != 200:
                if error := app.state.llava.error:
                    raise ConfigError(str(error))
                time.sleep(0.05)

    yield lambda: run("cats")
    yield lambda: run("animals")


@advice("--rate is {}; expected a number above 0, in requests per second", succeeds=False)
def a_negative_rate(w: World) -> Steps:
    yield ("bench-serve", "http://127.0.0.1:1", "--model", "x", "--requests", 1, "--rate", -1)
    yield ("bench-serve", "http://127.0.0.1:1", "--model", "x", "--requests", 1, "--rate", 9)


@advice("--pictures is {}; expected 0 to 64", succeeds=False)
def too_many_pictures_for_a_load(w: World) -> Steps:
    yield ("bench-serve", "http://127.0.0.1:1", "--model", "x", "--requests", 1, "--pictures", 99)
    yield ("bench-serve", "http://127.0.0.1:1", "--model", "x", "--requests", 1, "--pictures", 1)


# --- the server to its clients ----------------------------------------------------------------------------------------


@advice("the Host header does not name this server; start it with --allow-host to allow the name")
def another_host(w: World) -> Steps:
    host = {"headers": {"host": "llava.example"}}
    yield chat("Hi", **host)
    yield chat("Hi", of=lambda: client(hosts=("llava.example",)), **host)


@advice("web pages of this origin may not use the server; start it with --allow-origin to allow it")
def a_page_of_another_origin(w: World) -> Steps:
    origin = {"headers": {"origin": "https://page.example"}}
    yield chat("Hi", **origin)
    yield chat("Hi", of=lambda: client(origins=("https://page.example",)), **origin)


@advice("the model is still being loaded; try again later")
def a_server_that_loads(w: World) -> Steps:
    one = client()
    state = one.app.state.llava  # type: ignore[attr-defined]
    with mock.patch.object(state, "service", None):
        yield chat("Hi")
    yield chat("Hi")


@advice("the server is busy; try again later")
def a_busy_server(w: World) -> Steps:
    service = client().app.state.llava.service  # type: ignore[attr-defined]
    with mock.patch.object(service, "_n_active", service.limits.requests):
        yield chat("Hi")
    yield chat("Hi")


@advice("the processes that read pictures cannot be started; try again later")
def picture_processes_that_do_not_start(w: World) -> Steps:
    from llava.serve import pictures

    service = client().app.state.llava.service  # type: ignore[attr-defined]
    (pool,) = service._pools.values()
    with mock.patch.object(pictures, "_START_S", 0.0):
        for pid in pool.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        yield chat(PICTURE, QUESTION)
    yield chat(PICTURE, QUESTION)


@advice("picture: has {} x {} pixels; expected at most {}; scale it down")
def a_picture_with_too_many_pixels(w: World) -> Steps:
    few = client(Limits(pixels=10_000))
    yield chat(picture(drawn(size=(160, 120))), QUESTION, of=lambda: few)
    yield chat(picture(drawn(size=(100, 90))), QUESTION, of=lambda: few)


@advice("and the model sees it as a square; expected sides of at most {} pixels; scale it down")
def a_picture_that_is_too_thin(w: World) -> Steps:
    few = client(Limits(padded_pixels=40_000))
    yield chat(picture(drawn(size=(400, 4))), QUESTION, of=lambda: few)
    yield chat(picture(drawn(size=(200, 4))), QUESTION, of=lambda: few)


@advice("characters, more than fit the model's context of {} tokens: shorten the prompt")
def a_text_that_cannot_fit(w: World) -> Steps:
    yield chat("word " * 100_000)
    yield chat("word")


@advice("image_url: the data URL is not base64; write ;base64 before the comma")
def a_data_url_without_base64(w: World) -> Steps:
    url = PICTURE["image_url"]["url"]
    yield chat({"type": "image_url", "image_url": {"url": url.replace(";base64", "")}}, QUESTION)
    yield chat(PICTURE, QUESTION)


@advice("this model has no vision tower; leave the pictures out")
def a_picture_for_a_language_model(w: World) -> Steps:
    blind = functools.partial(client, vision=False)
    yield chat(PICTURE, QUESTION, of=blind)
    yield chat(QUESTION, of=blind)


@advice("the parameter {} is not supported; leave it out")
def tools(w: World) -> Steps:
    yield post("/tokenize", prompt="Hi", max_tokens=None, truncate=3)
    yield complete()


@advice("messages: the key {} is not supported; leave it out")
def a_message_with_tool_calls(w: World) -> Steps:
    calls = {"role": "assistant", "content": "Hi", "tool_calls": [{"id": "1"}]}
    yield post("/v1/chat/completions", messages=[*user("Hi"), calls, *user("Hi")])
    yield post("/v1/chat/completions", messages=[*user("Hi"), {**calls, "tool_calls": []}, *user("Hi")])


@advice("stop: expected {}")
def too_many_stops(w: World) -> Steps:
    yield chat("Hi", stop=["x"] * 99)
    yield chat("Hi", stop=["x"] * 4)


@advice("stream_options is only for streams; set stream to true")
def stream_options_without_a_stream(w: World) -> Steps:
    yield chat("Hi", stream_options={"include_usage": True})
    yield chat("Hi", stream_options={"include_usage": True}, stream=True)


@advice("top_logprobs needs logprobs; set it to true")
def top_logprobs_alone(w: World) -> Steps:
    yield chat("Hi", top_logprobs=2)
    yield chat("Hi", top_logprobs=2, logprobs=True)


@advice("max_tokens and max_completion_tokens differ; give one of them")
def two_lengths(w: World) -> Steps:
    yield chat("Hi", max_tokens=2, max_completion_tokens=3)
    yield chat("Hi", max_tokens=2)


@advice("{} is not supported for explanations; leave it out")
def a_streamed_explanation(w: World) -> Steps:
    yield post("/v1/explain", messages=user("Hi"), stream=True)
    yield post("/v1/explain", messages=user("Hi"))


@advice("the maps become too large; set max_tokens to at most {}")
def maps_that_are_too_large(w: World) -> Steps:
    few = client(Limits(map_values=500))
    said = yield post("/v1/explain", messages=user(PICTURE, QUESTION), max_tokens=9, of=lambda: few)
    n = int(said.text.split("at most ")[1].split()[0])
    yield post("/v1/explain", messages=user(PICTURE, QUESTION), max_tokens=n, of=lambda: few)


@advice("echo with logprobs cannot be streamed; leave stream out")
def a_streamed_echo(w: World) -> Steps:
    yield complete(echo=True, logprobs=1, stream=True)
    yield complete(echo=True, logprobs=1)


def in_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@advice("response_format: the schema has more than {} bytes; use a smaller one")
def a_large_schema(w: World) -> Steps:
    yield chat("Hi", response_format=in_schema({**SCHEMA, "description": "x" * 70_000}))
    yield chat("Hi", response_format=in_schema(SCHEMA))


@advice("response_format: the schema is too complex; use a simpler one")
def a_complex_schema(w: World) -> Steps:
    from llava.serve import structured

    with mock.patch.object(structured, "any", return_value=False, create=True):
        yield chat("Hi", response_format=in_schema(SCHEMA))
    yield chat("Hi", response_format=in_schema(SCHEMA))


@advice("set the type to json_schema, or leave json_schema out")
def a_schema_beside_another_type(w: World) -> Steps:
    yield chat("Hi", response_format=in_schema(SCHEMA) | {"type": "json_object"})
    yield chat("Hi", response_format=in_schema(SCHEMA))


@advice("set max_tokens (or max_completion_tokens of a chat) to at most {}")
def an_answer_of_too_many_tokens(w: World) -> Steps:
    few = client(Limits(answer_values=20))
    said = yield post("/v1/completions", prompt="a red apple", max_tokens=50, logprobs=1, of=lambda: few)
    n = int(said.text.split("at most ")[-1].split()[0])
    yield post("/v1/completions", prompt="a red apple", max_tokens=n, logprobs=1, of=lambda: few)


@advice("{}: set logprobs to at most {}")
def an_answer_of_too_many_logprobs(w: World) -> Steps:
    few, echo = client(Limits(answer_values=40)), {"echo": True, "prompt": [[1, 300, 301, 302, 303, 304]]}
    said = yield post("/v1/completions", max_tokens=1, logprobs=10, of=lambda: few, **echo)
    n = int(said.text.split("at most ")[-1].split()[0])
    yield post("/v1/completions", max_tokens=1, logprobs=n, of=lambda: few, **echo)
