"""Fetching pictures: only over https, from listed hosts, at global addresses that are resolved once."""

import http.server
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava.serve import fetch
from llava.serve.errors import ApiError
from llava.serve.fetch import MediaFetcher, is_global
from llava.serve.limits import Limits
from tests.serve.certificates import certificate

HOST = "pictures.example"
LIMITS = Limits(picture_bytes=1000, fetch_s=2.0)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Host"], self.headers.get("Authorization")))  # type: ignore[attr-defined]
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", f"https://{HOST}/picture")
            self.end_headers()
            return
        if self.path == "/slow-head":
            for _ in range(40):
                self.wfile.write(b"H")
                time.sleep(0.2)
            return
        self.send_response(200 if self.path != "/missing" else 404)
        self.end_headers()
        try:
            for _ in range(40 if self.path == "/slow" else 1):
                self.wfile.write(b"x" * {"/large": 2000, "/slow": 1}.get(self.path, 10))
                self.wfile.flush()
                time.sleep(0.2 if self.path == "/slow" else 0)
        except OSError:  # the client has gone
            pass

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A host with a picture, on this machine."""
    folder = tmp_path_factory.mktemp("certificate")
    file, key = certificate(folder, HOST)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.seen = []  # type: ignore[attr-defined]
    server.file = file  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def fetcher(site: Any, monkeypatch: pytest.MonkeyPatch, **more: Any) -> MediaFetcher:
    """Fetches from the site as if its address were a global one."""
    monkeypatch.setattr(fetch, "is_global", lambda address: address == "127.0.0.1")
    context = ssl.create_default_context(cafile=str(site.file))
    options = {"port": site.server_address[1], "context": context, "resolve": lambda host, port: ["127.0.0.1"]}
    return MediaFetcher([HOST], LIMITS, **{**options, **more})


def test_a_picture_of_a_listed_host_is_fetched(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetcher(site, monkeypatch).fetch(f"https://{HOST}/picture?size=2&x=a/b") == b"x" * 10
    path, host, key = site.seen[-1]
    assert (path, host.split(":")[0], key) == ("/picture?size=2&x=a/b", HOST, None)


@pytest.mark.parametrize("path", ["/moved", "/missing"])
def test_redirects_and_errors_are_not_followed(path: str, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    n = len(site.seen)
    with pytest.raises(ApiError, match="did not answer with a picture"):
        fetcher(site, monkeypatch).fetch(f"https://{HOST}{path}")
    assert len(site.seen) == n + 1


def test_size_and_time_are_limited(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ApiError, match="more than 1000 bytes") as error:
        fetcher(site, monkeypatch).fetch(f"https://{HOST}/large")
    assert error.value.status == 413
    for path in ("/slow", "/slow-head"):
        started = time.monotonic()
        with pytest.raises(ApiError, match="cannot be fetched"):
            fetcher(site, monkeypatch).fetch(f"https://{HOST}{path}")
        assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.example/a.png",
        "https://other.example/a.png",
        "https://pictures.example.evil.example/a.png",
        "https://evil.example@pictures.example/a.png",
        "https://pictures.example@evil.example/a.png",
        "https://pictures.example:443@evil.example/",
        "https://pictures.example\\@evil.example/",
        "https:\\\\pictures.example\\a.png",
        "https://pictures.example:8443/a.png",
        "https://pictures.example#@evil.example/",
        "https://pictures.example/a.png#fragment",
        "https://pictures.example",
        "https://PICTURES.example/a.png",
        "https://pictures.example/a b.png",
        "https://pictures.example/a\r\nX: y",
        "https://pictures.example/\x00",
        "https://pictures\u3002example/a.png",
        "https:///a.png",
        "//pictures.example/a.png",
        "file:///etc/passwd",
        "gopher://pictures.example/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://2130706433/",
        "",
    ],
)
def test_any_other_address_is_refused_before_a_name_is_resolved(url: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise AssertionError(f"resolved {host}")

    with pytest.raises(ApiError, match="fetches only https addresses"):
        MediaFetcher([HOST], LIMITS, resolve=resolve).fetch(url)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "2001:db8::1",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::",
        "2002:a00:1::1", "::127.0.0.1", "::10.0.0.1", "64:ff9b:1::7f00:1", "::ffff:0:127.0.0.1", "fec0::1", "5f00::1",
        "3fff::1", "192.88.99.1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    ],
)  # fmt: skip
def test_addresses_that_are_not_global_are_refused(address: str) -> None:
    assert not is_global(address)
    for addresses in ([address], ["93.184.216.34", address]):
        with pytest.raises(ApiError, match="cannot be fetched"):
            MediaFetcher([HOST], LIMITS, resolve=lambda host, port, found=addresses: found).fetch(f"https://{HOST}/a")


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_global_addresses_are_recognised(address: str) -> None:
    assert is_global(address)


def test_a_name_is_resolved_once_and_the_connection_goes_to_that_address(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    one = fetcher(site, monkeypatch, resolve=lambda host, port: next(answers))
    assert one.fetch(f"https://{HOST}/picture") == b"x" * 10
    assert next(answers) == ["10.0.0.1"]  # was not asked for


def test_a_certificate_of_another_host_is_refused(site: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other, _ = certificate(tmp_path, "other.example")
    n = len(site.seen)
    with pytest.raises(ApiError, match="cannot be fetched"):
        fetcher(site, monkeypatch, context=ssl.create_default_context(cafile=str(other))).fetch(f"https://{HOST}/a")
    assert len(site.seen) == n
