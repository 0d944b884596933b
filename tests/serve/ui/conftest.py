"""A server with the page, and Chromium, in which no request may leave this machine."""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import llava
from tests.serving import Server, serving

pytest.importorskip("gradio", reason="gradio is not installed (pip install 'llava-native[ui]')")

ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--no-first-run")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")  # requests of its own
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
KEYS = ("first-key:with a colon", "second-key")
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="package")
def log_of_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site") / "errors.txt"


@pytest.fixture(scope="package")
def site(log_of_site: Path) -> Iterator[Server]:
    """llava-tiny with the page."""
    with serving(log_of_site, llava.load(device="cpu"), "llava-tiny", "--device", "cpu", "--ui") as server:
        yield server


@pytest.fixture(scope="package")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two keys."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text("\n".join(KEYS))
    arguments = ("--device", "cpu", "--ui", "--api-key-file", folder / "keys")
    with serving(folder / "errors.txt", llava.load(device="cpu"), "llava-tiny", *arguments) as server:
        yield server


@pytest.fixture(scope="module")  # while it is open, no other test can run an event loop
def chromium() -> Iterator[Any]:
    """The browser of this machine, driven by Playwright."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("Chromium is not installed (Debian: chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=[*ARGUMENTS, *QUIET, *CAMERA])
        yield started
        started.close()


@dataclass(frozen=True)
class Browser:
    """Opens pages, and notes what must not happen on them."""

    chromium: Any
    wrong: list[str]

    @contextmanager
    def open(self, url: str, **options: Any) -> Iterator[Any]:
        """Opens a page in a profile of its own. options: of Playwright's `new_context`."""
        context = self.chromium.new_context(viewport={"width": 1000, "height": 900}, **options)
        try:
            context.set_default_timeout(30_000)
            context.grant_permissions(["clipboard-read", "clipboard-write", "camera"])
            page = context.new_page()
            page.on("request", lambda request: self._check(request.url))
            page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
            page.on("console", lambda line: self.wrong.append(line.text) if "Content Security" in line.text else None)
            page.goto(url)
            page.wait_for_selector("#question textarea")
            yield page
        finally:
            context.close()

    def _check(self, url: str) -> None:
        if not url.startswith(("data:", "blob:")) and httpx.URL(url).host != "127.0.0.1":
            self.wrong.append(f"request: {url}")


@pytest.fixture
def browser(chromium: Any) -> Iterator[Browser]:
    """Fails the test if a page asks another machine for anything, has an error, or breaks its own policy."""
    found = Browser(chromium, [])
    yield found
    assert found.wrong == []


@dataclass(frozen=True)
class Visitor:
    """Sends what the page sends, without a browser."""

    http: httpx.Client
    session: str = "visitor1"

    def upload(self, contents: bytes, name: str = "picture.png") -> httpx.Response:
        return self.http.post("/gradio_api/upload", files={"files": (name, contents)})

    def join(self, event: str, *data: Any, **more: Any) -> httpx.Response:
        """Starts an event of the component with this id, such as `question.submit`."""
        body = {"data": data, "fn_index": self._number(*event.split(".")), "session_hash": self.session, **more}
        return self.http.post("/gradio_api/queue/join", json=body)

    def events(self) -> Iterator[dict[str, Any]]:
        """What the server sends until all events of the session have ended."""
        address = f"/gradio_api/queue/data?session_hash={self.session}"
        with self.http.stream("GET", address) as stream:
            for line in stream.iter_lines():
                if line:
                    yield json.loads(line.removeprefix("data: "))

    def ask(self, text: str, *files: dict[str, Any], max_tokens: int = 64, temperature: float = 0) -> httpx.Response:
        options = ["llava-tiny", temperature, 1, max_tokens]
        return self.join("question.submit", {"text": text, "files": files}, None, *options)

    def _number(self, component: str, event: str) -> int:
        config = self.http.get("/config").json()
        (id,) = (one["id"] for one in config["components"] if one["props"].get("elem_id") == component)
        found = [one["id"] for one in config["dependencies"] if [id, event] in one["targets"] and one["queue"]]
        return int(found[0])


@pytest.fixture
def visitor(site: Server) -> Visitor:
    return Visitor(site.http, session=secrets.token_hex(8))


def file(path: str, **more: Any) -> dict[str, Any]:
    """A file as gradio's components send it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
