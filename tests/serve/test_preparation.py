"""Before and after the engine's part of a request: pictures, time and memory are limited there too."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.testclient import TestClient

import llava
from llava.serve import explain
from llava.serve.access import Access
from llava.serve.app import create
from llava.serve.fetch import MediaFetcher
from llava.serve.limits import Limits
from llava.serve.settings import Settings
from tests.hostile import MODEL, wait_until
from tests.serving import drawn, picture, text, user

CHAT, HOST = "/v1/chat/completions", "pictures.example"
REMOTE = {"type": "image_url", "image_url": {"url": f"https://{HOST}/a.png"}}


@pytest.fixture(scope="module")
def vlm() -> llava.Assistant:
    return llava.load(device="cpu")


@contextmanager
def served(vlm: llava.Assistant, limits: Limits) -> Iterator[TestClient]:
    settings = Settings(name=MODEL, access=Access(host="127.0.0.1"), limits=limits, media_hosts=(HOST,))
    with TestClient(create(lambda: vlm, settings), base_url="http://localhost") as client:
        assert wait_until(lambda: client.get("/ready").status_code == 200)
        yield client


@pytest.fixture
def slow_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A host that sends a picture only once the event is set."""
    go = threading.Event()

    def fetch(self: MediaFetcher, url: str) -> bytes:
        go.wait(30)
        return drawn()

    monkeypatch.setattr(MediaFetcher, "fetch", fetch)
    yield go
    go.set()


def body(*parts: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 2, "temperature": 0, "messages": user(*parts)}


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def test_a_slow_media_host_holds_up_no_other_request(vlm: llava.Assistant, slow_host: threading.Event) -> None:
    with served(vlm, Limits()) as client, ThreadPoolExecutor(40) as threads:
        waiting = [threads.submit(client.post, CHAT, json=body(REMOTE, text("What?"))) for _ in range(40)]
        time.sleep(1)
        assert client.post(CHAT, json=body(text("Hello"))).status_code == 200
        assert client.post(CHAT, json=body(picture(drawn()), text("What?"))).status_code == 200
        assert not any(one.done() for one in waiting)
        slow_host.set()
        assert {one.result().status_code for one in waiting} == {200}


@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/v1/explain"])
def test_the_time_of_a_request_includes_its_preparation(
    path: str, vlm: llava.Assistant, slow_host: threading.Event
) -> None:
    sent = body(REMOTE, text("What?")) if path != "/tokenize" else {"messages": user(REMOTE, text("What?"))}
    with served(vlm, Limits(request_s=1)) as client:
        started = time.perf_counter()
        answer = client.post(path, json=sent)
        assert 0.9 < time.perf_counter() - started < 5
        assert answer.status_code == 408
        assert client.post(CHAT, json=body(text("Hello"))).status_code == 200
        slow_host.set()  # the server does not wait for threads at its end


def test_a_bad_picture_ends_the_work_on_the_others(vlm: llava.Assistant) -> None:
    large = drawn(size=(5000, 5000))
    with served(vlm, Limits()) as client:
        alone = seconds(lambda: client.post(CHAT, json=body(picture(large), text("What?"))))
        answer = client.post(CHAT, json=body(picture(b"no picture"), *[picture(large)] * 15, text("What?")))
        assert answer.status_code == 400
        small = seconds(lambda: client.post(CHAT, json=body(picture(drawn()), text("What?"))))
        assert small < 4 * alone  # not after 15 large ones


def test_an_explanation_counts_until_its_maps_are_computed(
    vlm: llava.Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, compute = threading.Event(), explain.explanation

    def slow(*arguments: Any) -> Any:
        go.wait(30)
        return compute(*arguments)

    monkeypatch.setattr(explain, "explanation", slow)
    with served(vlm, Limits(explanations=1)) as client, ThreadPoolExecutor(1) as threads:
        sent = body(picture(drawn()), text("What?"))
        first = threads.submit(client.post, "/v1/explain", json=sent)
        time.sleep(2)
        assert client.post("/v1/explain", json=sent).status_code == 429
        go.set()
        assert first.result().status_code == 200
        assert client.post("/v1/explain", json=sent).status_code == 200


def test_what_pictures_of_clients_lose_is_neither_logged_nor_kept(
    vlm: llava.Assistant, caplog: pytest.LogCaptureFixture
) -> None:
    with served(vlm, Limits()) as client:
        for value in range(3):
            assert client.post(CHAT, json=body(picture(floats(1000.5 + value)), text("What?"))).status_code == 200
    assert "scaled from the range" not in caplog.text
    assert not any("scaled" in line for line in vlm.engine.inputs._reported)


def floats(value: float) -> bytes:
    """A TIFF file with 32-bit floats."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("F", (20, 20), value).save(file, "TIFF")
    return file.getvalue()
