"""A client of this server's own API, so that the page's requests pass the same checks and limits as all others."""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from llava.errors import LlavaError
from llava.serve.settings import Settings

_CONNECT_S = 5.0  # to this machine
_MARGIN_S = 1.0  # after which a request that the server should have ended is given up


class ApiFailure(LlavaError):
    """What went wrong, in one line for the visitor."""


@dataclass(frozen=True, kw_only=True)
class Visitor:
    """Where the API is, and with which key it is asked."""

    host: str  # address on which the page was asked for
    port: int
    key: str  # of the visitor; "": the server needs none


class ApiClient:
    """Asks the API over HTTP, on the address at which the visitor has reached the page."""

    def __init__(self, settings: Settings):
        self._scheme, self._timeout_s = settings.scheme, settings.limits.request_s + _MARGIN_S
        self._verify = _only(settings.certificate)

    async def explain(self, visitor: Visitor, body: dict[str, Any]) -> dict[str, Any]:
        """Returns an explanation. Raises ApiFailure."""
        return await self._whole(visitor, "POST", "/v1/explain", body)

    async def chat(self, visitor: Visitor, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the chunks of a reply. Raises ApiFailure."""
        async with self._asked(visitor, "POST", "/v1/chat/completions", body) as response:
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data and data != "[DONE]":
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ApiFailure(chunk["error"]["message"])
                    yield chunk

    async def answer(self, visitor: Visitor, body: dict[str, Any]) -> dict[str, Any]:
        """Returns a whole reply. Raises ApiFailure."""
        return await self._whole(visitor, "POST", "/v1/chat/completions", body)

    async def _whole(
        self, visitor: Visitor, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        async with self._asked(visitor, method, path, body) as response:
            return await asyncio.to_thread(json.loads, await response.aread())

    @asynccontextmanager
    async def _asked(
        self, visitor: Visitor, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Sends a request, and gives the response, whose body has not been read. Raises ApiFailure."""
        host = f"[{visitor.host}]" if ":" in visitor.host else visitor.host
        url = f"{self._scheme}://{host}:{visitor.port}{path}"
        headers = {"Host": "localhost", "Content-Type": "application/json"}  # a name that the server always accepts
        if visitor.key:
            headers["Authorization"] = f"Bearer {visitor.key}"
        content = await asyncio.to_thread(json.dumps, body) if body is not None else None
        timeout = httpx.Timeout(self._timeout_s, connect=_CONNECT_S)
        try:
            async with (
                httpx.AsyncClient(verify=self._verify, timeout=timeout, trust_env=False) as client,
                client.stream(method, url, headers=headers, content=content) as response,
            ):
                if response.status_code != 200:
                    raise ApiFailure(_reason(await response.aread(), response.status_code))
                yield response
        except httpx.TimeoutException:
            raise ApiFailure("no answer came in time; try again later") from None
        except httpx.HTTPError as error:
            raise ApiFailure(f"the server cannot be reached ({type(error).__name__}); try again later") from None


def visitor_of(request: Any) -> Visitor:
    """Returns who has sent a `gradio.Request`."""
    scope = request.request.scope
    host, port = scope["server"]
    return Visitor(host=host, port=port, key=scope["state"]["key"].decode())


def _reason(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {status}; try again later"


def _only(certificate: str | None) -> ssl.SSLContext:
    """Trusts this certificate and no other. It names the public host, and not the address that is asked here.

    None, for a server without https, trusts no certificate: httpx would read those of all authorities for each request.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # also if an authority has signed it
    if certificate:
        context.load_verify_locations(certificate)
    return context
