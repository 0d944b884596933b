"""What visitors of the page cannot make gradio do."""

import asyncio
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from llava.serve.errors import ApiError
from llava.serve.limits import Limits
from llava.serve.ui.gate import Gate, policy
from tests.serve.ui.conftest import Visitor, file
from tests.serving import Server, drawn


@contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """A web server of the same machine, which must not be asked for anything: its address, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/secret.png", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_no_address_in_a_request_makes_the_server_fetch_it(visitor: Visitor) -> None:
    (path,) = visitor.upload(drawn()).json()
    with listener() as (url, asked):
        assert visitor.http.get(f"/gradio_api/proxy={url}").status_code == 404
        assert visitor.http.get(f"/gradio_api/file={url}").status_code == 404
        assert visitor.ask("What is this?", file(url)).status_code == 400
        assert visitor.ask("What is this?", file(path, url=url)).status_code == 200
        assert [one["success"] for one in visitor.events() if one["msg"] == "process_completed"] == [True]
        assert visitor.ask("What is this?", file(path, url=url, is_stream=True)).status_code == 200
        list(visitor.events())
    assert asked == []


@pytest.mark.parametrize("path", ["/etc/passwd", "README.md", str(Path(__file__)), "/proc/self/environ", "", "\0"])
def test_no_file_of_the_server_is_a_picture(visitor: Visitor, path: str) -> None:
    answer = visitor.ask("What is this?", file(path))
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "the picture is no longer there; add it again",
    )


def test_no_file_of_the_server_is_served(visitor: Visitor, tmp_path: Path) -> None:
    (uploaded,) = visitor.upload(drawn()).json()
    assert visitor.http.get(f"/gradio_api/file={uploaded}").content == drawn()
    folder = Path(uploaded).parent
    secret = tmp_path / "secret.txt"  # in the folder for temporary files, which gradio serves files of
    secret.write_text("secret")
    link = folder / "link.png"
    link.symlink_to(secret)
    outside = ["/etc/passwd", str(secret), f"{folder}/../../{secret.name}", str(link), str(Path.cwd() / "README.md")]
    outside += [str(folder), "README.md", "../README.md", "/proc/self/environ", quote(f"{folder}/../../../etc/passwd")]
    for path in outside:
        answer = visitor.http.get(f"/gradio_api/file={quote(path)}")
        assert answer.status_code == 404, path
    link.unlink()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/run/ask"),
        ("POST", "/gradio_api/api/ask"),
        ("POST", "/gradio_api/call/ask"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/stream/1"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/custom_component/1/client/a/b.js"),
        ("GET", "/gradio_api/token"),
        ("GET", "/monitoring"),
        ("GET", "/manifest.json"),
        ("POST", "/login"),
        ("GET", "/docs"),
    ],
)
def test_routes_of_gradio_that_the_page_does_not_need_do_not_exist(site: Server, method: str, path: str) -> None:
    assert site.http.request(method, path, json={} if method == "POST" else None).status_code == 404


def test_a_page_is_no_file_of_a_visitor(visitor: Visitor) -> None:
    """What somebody has uploaded can neither run scripts nor ask for anything if it is opened by itself."""
    (path,) = visitor.upload(b"<script>alert(1)</script>", "page.html").json()
    answer = visitor.http.get(f"/gradio_api/file={path}")
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_nothing_on_the_page_may_ask_another_machine(site: Server) -> None:
    answer = site.http.get("/")
    rules = dict(one.strip().split(" ", 1) for one in answer.headers["content-security-policy"].split(";"))
    assert rules.pop("base-uri") == "'self'"
    assert rules.pop("default-src") == rules.pop("form-action") == rules.pop("frame-ancestors") == "'none'"
    assert "unsafe-inline" not in rules["script-src"]
    for rule in rules.values():
        assert re.fullmatch(r"'self'( ('unsafe-inline'|'unsafe-eval'|'sha256-[\w+/=]+'|data:|blob:))*", rule), rule
    assert answer.headers["referrer-policy"] == "same-origin"


def test_only_the_scripts_that_are_in_the_document_run() -> None:
    one, two = (policy(f"<script>{text}</script><script src='x'></script>".encode()) for text in ("1", "2"))
    assert one.count("sha256-") == two.count("sha256-") == 1
    assert one != two


def test_gradio_allows_no_other_origin(site: Server) -> None:
    for origin in (site.url, "http://localhost:1"):
        answer = site.http.get("/config", headers={"Origin": origin})
        assert [name for name in answer.headers if name.startswith("access-control")] == []


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_pages_of_other_sites_change_nothing(site: Server, headers: dict[str, str]) -> None:
    forms = {"files": ("a.png", drawn())}
    assert site.http.post("/gradio_api/upload", files=forms, headers=headers).status_code == 403
    for path in ("queue/join", "cancel", "reset"):
        assert site.http.post(f"/gradio_api/{path}", json={}, headers=headers).status_code == 403
    assert site.http.get("/gradio_api/queue/data?session_hash=a", headers=headers).status_code == 403


def test_a_link_on_another_site_opens_the_page(site: Server) -> None:
    assert site.http.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200


def test_another_host_is_refused_on_the_page_too(site: Server) -> None:
    for path in ("/", "/config", "/gradio_api/heartbeat/a"):
        assert site.http.get(path, headers={"Host": "evil.example"}).status_code == 403
    answer = site.http.get("/", headers={"X-Forwarded-Host": "evil.example"})
    assert "evil.example" not in answer.text


def test_uploads_are_limited_in_size(visitor: Visitor) -> None:
    limit = Limits().picture_bytes
    assert visitor.upload(os.urandom(limit)).status_code == 200
    assert visitor.upload(bytes(limit + 1)).status_code == 413
    assert visitor.upload(bytes(Limits().body_bytes)).status_code == 413
    endless = visitor.http.post(
        "/gradio_api/upload", content=iter([b"a"]), headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert endless.status_code == 411


def test_a_folder_may_be_larger_than_a_request(visitor: Visitor) -> None:
    files = [("files", (f"{i}.png", os.urandom(12 * 2**20))) for i in range(3)]
    assert sum(len(contents) for _, (_, contents) in files) > Limits().body_bytes
    answer = visitor.http.post("/gradio_api/upload", files=files)
    assert (answer.status_code, len(answer.json())) == (200, 3)


def test_open_pages_leave_connections_for_the_api(tmp_path: Path) -> None:
    async def unread(*arguments: Any) -> Any:
        raise AssertionError("nothing is read or sent")

    async def heartbeat() -> None:
        task = asyncio.ensure_future(asyncio.sleep(0))
        streams: Any = {task: asyncio.get_running_loop().create_future()}
        gate = Gate(unread, events=[], folder=tmp_path, limits=Limits(page_streams=1), streams=streams)
        scope = {"type": "http", "path": "/gradio_api/heartbeat/a", "headers": [], "state": {"key": b""}}
        with pytest.raises(ApiError, match="too many pages are open") as caught:
            await gate(scope, unread, unread)
        assert caught.value.status == 429

    asyncio.run(heartbeat())
    assert Limits().page_streams < Limits().connections


def test_events_are_limited_in_size(visitor: Visitor) -> None:
    assert visitor.join("question.submit", {"text": "a" * 2**20, "files": []}).status_code == 413
    assert visitor.join("question.stop", None).status_code == 200


BODIES = [b"{", b"[]", b"{}", b'{"session_hash": "../a"}', b'{"session_hash": 1}', b'{"session_hash": "a"}']


@pytest.mark.parametrize("body", [*BODIES, b'{"session_hash": "a", "fn_index": 99}', b"[" * 100_000])
def test_malformed_bodies_are_refused_in_our_own_words(site: Server, body: bytes) -> None:
    answer = site.http.post("/gradio_api/queue/join", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_an_answer_ends_when_its_page_is_closed(site: Server) -> None:
    before = Visitor(site.http, "before")
    before.ask("What is this?")
    list(before.events())
    visitor, finished = Visitor(site.http, "closed"), site.metric("llava_request_success_total")
    with site.http.stream("GET", "/gradio_api/heartbeat/closed") as heartbeat:
        beats = heartbeat.iter_lines()
        next(beats)
        assert visitor.ask("Tell me a story.", max_tokens=900, temperature=2).status_code == 200
        for event in visitor.events():
            if event["msg"] == "process_generating":
                break
    site.waits_until("llava_num_requests_running", 0)
    assert site.metric("llava_request_success_total") == finished


@pytest.mark.parametrize(
    ("event", "data"),
    [
        ("question.submit", []),
        ("question.submit", [{"text": 3, "files": "a"}, None, "llava-tiny", 0, 1, 16]),
        ("question.submit", [{"text": "secret words", "files": []}, None, "no-such-model", 0, 1, 16]),
        ("question.submit", [{"text": "secret words", "files": []}, None, "llava-tiny", 9, 1, "secret"]),
        ("answers.edit", [None, "llava-tiny", 0, 1, 16]),
        ("explain.click", [None, None]),
    ],
)
def test_an_event_with_malformed_data_fails_in_one_line(
    site: Server, log_of_site: Path, event: str, data: list[Any]
) -> None:
    visitor = Visitor(site.http, "malformed")
    before = log_of_site.read_text()
    answer = visitor.join(event, *data, event_data={"index": 7, "value": 1, "previous_value": 2})
    assert answer.status_code == 200
    (completed,) = (one for one in visitor.events() if one["msg"] == "process_completed")
    lines = log_of_site.read_text().removeprefix(before).splitlines()
    assert all(line.startswith('{"time"') for line in lines)
    assert "secret" not in str(lines)
    assert completed["success"] or completed["output"]["error"]


def test_a_session_in_which_nothing_runs_has_no_events(site: Server) -> None:
    (event,) = Visitor(site.http, "silent").events()
    assert event["msg"] == "unexpected_error"


def test_what_is_no_form_is_no_upload(site: Server) -> None:
    for kind in ("multipart/form-data; boundary=q", "multipart/form-data"):
        answer = site.http.post("/gradio_api/upload", content=b"x", headers={"Content-Type": kind})
        assert answer.status_code in (200, 400)
        assert answer.status_code == 400 or answer.json() == []


def test_behind_a_proxy_with_https_the_page_asks_over_https(site: Server) -> None:
    root = site.http.get("/config", headers={"X-Forwarded-Proto": "https"}).json()["root"]
    assert root == site.url.replace("http:", "https:")


def test_fonts_are_those_of_the_system(site: Server) -> None:
    style = site.http.get("/theme.css").text
    assert set(re.findall(r"--font: (.*);", style)) == {"system-ui, sans-serif"}
    assert not re.search(r"@import|@font-face|url\((?!['\"]?data:)", style)


def test_no_event_takes_components_from_a_visitor(site: Server) -> None:
    """The messages of a chatbot can hold components, which gradio makes with any arguments: none is ever an input."""
    config = site.http.get("/config").json()
    chatbots = {one["id"] for one in config["components"] if one["type"] == "chatbot"}
    assert chatbots
    assert [one["id"] for one in config["dependencies"] if chatbots & set(one["inputs"])] == []


def test_uploads_stop_when_there_is_no_room(tmp_path: Path) -> None:
    """Those that are under way count too: while one of 20 bytes arrives, another of 30 is tried."""
    (tmp_path / "picture.png").write_bytes(bytes(60))
    statuses: dict[int, int] = {}

    async def gradio(scope: Any, receive: Any, send: Any) -> None:
        if not statuses:
            await upload(30)

    async def upload(n_bytes: int) -> None:
        headers = [(b"content-length", str(n_bytes).encode())]
        try:
            await gate({"type": "http", "path": "/gradio_api/upload", "headers": headers}, unread, unread)
            statuses[n_bytes] = 200
        except ApiError as error:
            statuses[n_bytes] = error.status

    async def unread(*arguments: Any) -> Any:
        raise AssertionError("nothing is read or sent")

    gate = Gate(gradio, events=[], folder=tmp_path, limits=Limits(upload_bytes=100), streams={})
    asyncio.run(upload(20))
    asyncio.run(upload(41))
    asyncio.run(upload(40))
    assert statuses == {30: 413, 20: 200, 41: 413, 40: 200}
    gate.limits = Limits(upload_files=1)
    asyncio.run(upload(1))
    assert statuses[1] == 413
