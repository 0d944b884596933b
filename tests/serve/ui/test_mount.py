"""The page as a part of the server: when it is there, who may see it, and how it ends."""

import base64
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import llava
from llava.serve.access import Access
from llava.serve.app import create
from llava.serve.settings import Settings
from tests.command import PROJECT, run, start, wait_for_output
from tests.serve.certificates import certificate
from tests.serve.ui.conftest import KEYS, Visitor, file
from tests.serving import TIMEOUT_S, Server, drawn, serving


def basic(key: str, user: str = "anybody") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def with_key(server: Server, key: str, session: str) -> Visitor:
    http = httpx.Client(base_url=server.url, headers=basic(key), timeout=TIMEOUT_S)
    return Visitor(http, session)


PAGE_PATHS = ["/", "/config", "/theme.css", "/page/page.js", "/gradio_api/startup-events", "/gradio_api/heartbeat/a"]


@pytest.mark.parametrize("path", [*PAGE_PATHS, "/assets/a.js", "/static/a.js", "/gradio_api/file=/a"])
def test_the_browser_asks_for_the_key(locked: Server, path: str) -> None:
    for headers in ({}, basic("wrong"), basic(""), bearer(KEYS[0]), {"Authorization": "Basic !"}, basic("", KEYS[0])):
        answer = locked.http.get(path, headers=headers)
        assert answer.status_code == 401, (path, headers)
        assert answer.headers["www-authenticate"] == 'Basic realm="llava", charset="UTF-8"'


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_the_page_with_any_user_name(locked: Server, key: str) -> None:
    for user in ("", "anybody", "ü"):
        answer = locked.http.get("/", headers=basic(key, user))
        assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, "text/html")


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nothing"])
def test_the_api_takes_no_password(locked: Server, path: str) -> None:
    answer = locked.http.get(path, headers=basic(KEYS[0]))
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert locked.http.get("/v1/models", headers=bearer(KEYS[0])).status_code == 200


def test_a_visitor_asks_with_the_own_key_and_sees_no_other_session(locked: Server) -> None:
    first, second = with_key(locked, KEYS[0], "shared"), with_key(locked, KEYS[1], "shared")
    asked = n_chats(locked)
    (path,) = first.upload(drawn()).json()
    assert first.ask("What is in the picture?", file(path)).status_code == 200
    for answer in (second.http.get("/gradio_api/queue/data?session_hash=shared"), second.ask("And now?")):
        assert (answer.status_code, "another key" in answer.text) == (403, True)
    assert second.http.get("/gradio_api/heartbeat/shared").status_code == 403
    completed = [one for one in first.events() if one["msg"] == "process_completed"]
    assert completed[0]["success"]
    assert n_chats(locked) == asked + 1


def n_chats(server: Server) -> float:
    """How many chats the API has answered."""
    text = server.http.get("/metrics", headers=bearer(KEYS[0])).text
    name = 'llava_http_responses_total{path="/v1/chat/completions",status="200"} '
    return sum(float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without the page."""
    log = tmp_path_factory.mktemp("plain") / "errors.txt"
    with serving(log, llava.load(device="cpu"), "llava-tiny", "--device", "cpu", "--no-ui") as server:
        yield server


def test_a_visitor_who_comes_too_early_waits() -> None:
    settings = Settings(name="m", access=Access(host="127.0.0.1"), port=0, page=True)
    app = create(lambda: llava.load(device="cpu"), settings)  # without its lifespan, it never loads the model
    early = TestClient(app, base_url="http://127.0.0.1").get("/")
    assert (early.status_code, early.headers["refresh"]) == (503, "2")
    assert "is being loaded" in early.text


def test_the_page_changes_nothing_about_the_api(site: Server, plain: Server) -> None:
    described = [one.http.get("/openapi.json").json() for one in (site, plain)]
    assert list(described[0]["paths"]) == list(described[1]["paths"])
    for method, path in (("GET", "/v1/chat/completions"), ("POST", "/health"), ("GET", "/no/such/path")):
        with_page, without = (one.http.request(method, path) for one in (site, plain))
        assert (with_page.status_code, with_page.json()) == (without.status_code, without.json())


def test_without_the_page_there_is_none(plain: Server) -> None:
    for path in ("/", "/config", "/gradio_api/queue/data"):
        assert plain.http.get(path).status_code == 404
    assert plain.http.post("/gradio_api/upload", files={"files": ("a.png", b"a")}).status_code == 415


def with_gradio(version: str | None, folder: Path) -> dict[str, str]:
    """The environment of a Python that has this version of gradio, or none."""
    (folder / "sitecustomize.py").write_text(
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "def version(name):\n"
        f"    found = {version!r} if name == 'gradio' else real(name)\n"
        "    if found is None:\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return found\n"
        "metadata.version = version\n"
    )
    return os.environ | {"PYTHONPATH": f"{folder}:{PROJECT}", "LLAVA_API_KEY": ""}


def test_without_gradio_one_line_says_how_to_get_the_page(tmp_path: Path) -> None:
    process = start("serve", "--port", "0", "--device", "cpu", env=with_gradio(None, tmp_path))
    with process:
        url = wait_for_output(process, "\n").split()[-1]
        assert httpx.get(f"{url}/").status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        assert process.stderr
        lines = [line for line in process.stderr.read().decode().splitlines() if "gradio" in line]
    assert lines == ["llava: no chat page, as gradio is not installed: pip install 'llava-native[ui]'"]


@pytest.mark.parametrize("version", [None, "6.30.2", "7.0.0"])
def test_asking_for_the_page_without_a_gradio_that_works_is_an_error(version: str | None, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llava.cli"]
    environment = with_gradio(version, tmp_path)
    done = run("serve", "--ui", "--model", "no-such-folder/model", command=command, env=environment)
    assert done.returncode == 2
    assert (version or "not installed") in done.stderr
    assert "pip install 'llava-native[ui]'" in done.stderr
    assert "no-such-folder" not in done.stderr


def test_an_open_page_does_not_hold_up_the_end_which_finishes_answers_and_deletes_pictures(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    log = (tmp_path / "log").open("wb")
    process = start("serve", "--port", "0", "--device", "cpu", "--ui", stderr=log, env=environment)
    with process, log:
        url = wait_for_output(process, "\n").split()[-1]
        visitor = Visitor(httpx.Client(base_url=url, timeout=TIMEOUT_S))
        (path,) = visitor.upload(drawn()).json()
        (folder,) = (one for one in Path(path).parents if one.parent == tmp_path / "temporary")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        open_page = httpx.Client(base_url=url, timeout=TIMEOUT_S)
        with open_page.stream("GET", "/gradio_api/heartbeat/visitor1") as heartbeat:
            beats = heartbeat.iter_lines()  # the connection is closed with it
            next(beats)
            assert visitor.ask("Tell me a story.", max_tokens=300, temperature=2).status_code == 200
            events: list[dict[str, Any]] = []
            reading = threading.Thread(target=lambda: events.extend(visitor.events()))
            reading.start()
            while not any(one["msg"] == "process_generating" for one in events):
                time.sleep(0.02)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0
            took = time.monotonic() - started
            reading.join(TIMEOUT_S)
    assert [one["success"] for one in events if one["msg"] == "process_completed"] == [True]
    assert took < 20  # and not the 60 s that running requests have
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not folder.exists()


def test_the_page_finds_the_api_on_any_address_and_behind_a_certificate_of_another_name(tmp_path: Path) -> None:
    pem, key = certificate(tmp_path, "llava.example.org")
    arguments = ("--host", "::1", "--certificate", pem, "--private-key", key)
    process = start("serve", "--port", "0", "--device", "cpu", "--ui", *arguments)
    with process:
        url = wait_for_output(process, "\n").split()[-1]
        assert url.startswith("https://[::1]:")
        assert_answers(httpx.Client(base_url=url, timeout=TIMEOUT_S, verify=False))
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0


def test_the_example_pictures_are_those_of_the_examples() -> None:
    shipped, examples = PROJECT / "llava" / "serve" / "ui" / "pictures", PROJECT / "examples" / "pictures"
    assert {one.name: one.read_bytes() for one in shipped.iterdir()} == {
        one.name: one.read_bytes() for one in examples.iterdir()
    }


def test_an_adapter_can_be_chosen(adapted: Server) -> None:
    config = adapted.http.get("/config").json()
    (choices,) = (one["props"]["choices"] for one in config["components"] if one["props"].get("elem_id") == "model")
    assert [name for name, _ in choices] == [adapted.name, "cats", "marked"]
    visitor = Visitor(adapted.http, "adapter")
    (path,) = visitor.upload(drawn()).json()
    for model, answers in (("cats", True), (adapted.name, False)):  # without adapters, it has no vision
        question = {"text": "What is this?", "files": [file(path)]}
        assert visitor.join("question.submit", question, None, model, 0, 1, 4).status_code == 200
        assert ("no vision tower" not in str(list(visitor.events()))) == answers


def assert_answers(http: httpx.Client) -> None:
    visitor = Visitor(http)
    assert visitor.ask("What is this?").status_code == 200
    events = list(visitor.events())
    (completed,) = (one for one in events if one["msg"] == "process_completed")
    assert completed["success"]
    assert "tokens/s" in str(events)


def test_the_server_itself_asks_no_other_machine() -> None:
    """Building the page, gradio's analytics and checks for versions included, opens no connection."""
    program = """
import sys, tempfile
from pathlib import Path
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print(event, arguments, flush=True)
sys.addaudithook(watch)
from llava.serve.access import Access
from llava.serve.settings import Settings
from llava.serve.ui.mount import build
build(Settings(name="tiny", access=Access(host="127.0.0.1")), ["tiny"], Path(tempfile.mkdtemp()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=os.environ, cwd=PROJECT)
    assert done.stdout == b""
