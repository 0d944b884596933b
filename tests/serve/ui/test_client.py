"""The page's client of the API: what visitors are told when something fails."""

import asyncio
import socket
from typing import Any

import pytest

from llava.serve.access import Access
from llava.serve.limits import Limits
from llava.serve.settings import Settings
from llava.serve.ui.client import ApiClient, ApiFailure, Visitor
from tests.serve.ui.conftest import Visitor as PageVisitor
from tests.serving import Server, user

BODY = {"model": "llava-tiny", "messages": user("What is this?")}


def failure(port: int, body: dict[str, Any] = BODY, **limits: Any) -> str:
    client = ApiClient(Settings(name="tiny", access=Access(host="127.0.0.1"), limits=Limits(**limits)))

    async def ask() -> None:
        visitor = Visitor(host="127.0.0.1", port=port, key="")
        async for _ in client.chat(visitor, {**body, "stream": True}):
            pass

    with pytest.raises(ApiFailure) as caught:
        asyncio.run(ask())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def port_of(server: Server) -> int:
    return int(server.url.rsplit(":", 1)[1])


def test_an_error_of_the_api_is_told_as_it_is(site: Server) -> None:
    assert failure(port_of(site), BODY | {"temperature": 3}).startswith("temperature")
    assert "does not exist" in failure(port_of(site), BODY | {"model": "other"})
    assert "tokens" in failure(port_of(site), BODY | {"messages": user("word " * 2000)})


def test_no_certificates_of_authorities_are_read_for_a_server_without_https() -> None:
    client = ApiClient(Settings(name="tiny", access=Access(host="127.0.0.1")))
    assert client._verify.cert_store_stats()["x509_ca"] == 0  # reading them took 29 ms of the event loop a request


def test_a_server_that_cannot_be_reached_is_named_so() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "cannot be reached" in failure(unused.getsockname()[1])


def test_an_answer_that_does_not_come_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "no answer came in time" in failure(silent.getsockname()[1], request_s=0.1)


def test_an_answer_that_is_not_of_this_api_is_an_error(site: Server) -> None:
    client = ApiClient(Settings(name="tiny", access=Access(host="127.0.0.1")))
    visitor = Visitor(host="127.0.0.1", port=port_of(site), key="")
    with pytest.raises(ApiFailure, match="model is missing"):
        asyncio.run(client.explain(visitor, {}))


def test_a_busy_server_is_said_on_the_page_and_the_question_comes_back(site: Server) -> None:
    """As many choices as the server takes are running."""
    visitor = PageVisitor(site.http, "busy")
    body = {"model": "llava-tiny", "prompt": ["a"] * 16, "n": 16, "stream": True, "max_tokens": 500}
    with site.http.stream("POST", "/v1/completions", json={**body, "logit_bias": {"2": -100}}) as response:
        lines = response.iter_lines()  # the connection is closed with it
        next(lines)
        assert visitor.ask("Are you busy?").status_code == 200
        shown = str(list(visitor.events()))
    assert "the server is busy; try again later" in shown
    assert shown.count("Are you busy?") > 1  # as it was asked, and where it can be written
    site.waits_until("llava_num_requests_running", 0)
