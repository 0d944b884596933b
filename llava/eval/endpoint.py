"""A chat endpoint with OpenAI's API: one message in, one text out, despite limits and faults of the server."""

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llava.errors import ConfigError, LlavaError, printable

if TYPE_CHECKING:
    import httpx

_PATH = "/chat/completions"
_MAX_BYTES = 4 << 20  # of a response
_MAX_BACKOFF_S, _MAX_WAIT_S = 60.0, 600.0
_SHOWN = 200  # characters of an error of the server
_FOR_ALL = (401, 402, 403, 404, 405)  # the next request would be refused, too
_FOR_ONE = (400, 413, 415, 422)  # the same request would be refused again
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the endpoint is, and how it is asked. Errors name the options of `llava eval judge`."""

    url: str  # such as http://127.0.0.1:8000/v1
    model: str
    key: str = field(default="", repr=False)
    temperature: float = 0.2
    max_tokens: int = 1024
    concurrency: int = 4  # requests at a time
    per_minute: float | None = None  # requests, with those that are repeated
    retries: int = 5
    timeout_s: float = 120.0  # of one request, from its start to the end of the response
    backoff_s: float = 1.0  # before the first retry; doubled for each further one

    def __post_init__(self) -> None:
        if (problem := _url_problem(self.url)) or not self.model.strip():
            raise ConfigError(problem or "--judge-model is empty; expected the name of a model, as the endpoint has it")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"--temperature is {self.temperature}; expected 0 to 2")
        if self.per_minute is not None and not 0 < self.per_minute < 1e6:
            raise ConfigError(f"--requests-per-minute is {self.per_minute}; expected a number above 0")
        if not 0 < self.timeout_s <= 86400:
            raise ConfigError(f"--timeout is {self.timeout_s}; expected seconds above 0")
        if not all(33 <= ord(c) <= 126 for c in self.key):
            raise ConfigError("the key of the judge has characters other than printable ASCII; correct the variable")

    @property
    def address(self) -> str:
        """Where chats are sent."""
        return self.url.rstrip("/").removesuffix(_PATH) + _PATH

    @property
    def exposes_key(self) -> bool:
        """Whether the key is sent over a network without encryption."""
        parts = urlsplit(self.url)
        return bool(self.key) and parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost")


def _url_problem(url: str) -> str | None:
    expected = "expected an address such as http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        return f"--judge-url: {error}; {expected}"
    if "@" in parts.netloc:
        return f"--judge-url has a user name or a key in it; {expected}, and a key only in the environment"
    good = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment
    return None if good and all(33 <= ord(c) <= 126 for c in url) else f"--judge-url is {url!r:.80}; {expected}"


class NoReplyError(LlavaError):
    """A message got no reply that can be used, after all retries."""


class RefusedError(LlavaError):
    """The endpoint refuses every request: it does not know the key, the model or the address."""


class _FaultError(Exception):
    """A fault that may be gone with the next request."""

    def __init__(self, problem: str, wait_s: float = 0.0):
        super().__init__(problem)
        self.wait_s = wait_s  # as the server asks for


class _Pace:
    """When requests may start: at most so many per minute, and none as long as the server asks to wait."""

    def __init__(self, per_minute: float | None):
        self._gap_s = 60 / per_minute if per_minute else 0.0
        self._next = 0.0  # in the time of the event loop

    async def turn(self) -> None:
        loop = asyncio.get_running_loop()
        while (wait_s := self._next - loop.time()) > 0:
            await asyncio.sleep(wait_s)
        self._next = loop.time() + self._gap_s

    def hold(self, seconds: float) -> None:
        self._next = max(self._next, asyncio.get_running_loop().time() + seconds)


class Chat:
    """Sends messages to an endpoint."""

    def __init__(self, endpoint: Endpoint, client: "httpx.AsyncClient"):
        self._endpoint, self._client = endpoint, client
        self._pace = _Pace(endpoint.per_minute)

    @classmethod
    @asynccontextmanager
    async def open(cls, endpoint: Endpoint) -> AsyncIterator["Chat"]:
        """Opens connections to an endpoint."""
        import httpx

        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        limits = httpx.Limits(max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency)
        async with httpx.AsyncClient(headers=headers, timeout=endpoint.timeout_s, limits=limits) as client:
            yield cls(endpoint, client)

    async def reply(self, system: str, user: str) -> str:
        """Returns the text of the reply, which is not empty. Raises NoReplyError or RefusedError."""
        body = self._body(system, user)
        for attempt in range(self._endpoint.retries + 1):
            await self._pace.turn()
            try:
                return await asyncio.wait_for(self._send(body), self._endpoint.timeout_s)
            except asyncio.TimeoutError:
                fault = _FaultError(f"no response within {self._endpoint.timeout_s:g} s")
            except _FaultError as error:
                fault = error
            if fault.wait_s > _MAX_WAIT_S:
                raise NoReplyError(f"{fault}; the endpoint asks to wait for {fault.wait_s:,.0f} s")
            if fault.wait_s:
                self._pace.hold(fault.wait_s)
            if attempt < self._endpoint.retries:
                backoff_s = min(_MAX_BACKOFF_S, self._endpoint.backoff_s * 2**attempt)
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1))
        raise NoReplyError(f"{fault} (attempt {self._endpoint.retries + 1})")

    def _body(self, system: str, user: str) -> bytes:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        one = self._endpoint
        return json.dumps(
            {
                "model": one.model,
                "messages": messages,
                "temperature": one.temperature,
                "max_tokens": one.max_tokens,
            }
        ).encode()

    async def _send(self, body: bytes) -> str:
        import httpx

        data = bytearray()
        headers = {"Content-Type": "application/json"}
        try:
            async with self._client.stream("POST", self._endpoint.address, content=body, headers=headers) as response:
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > _MAX_BYTES:
                        raise _FaultError(f"a response of more than {_MAX_BYTES >> 20} MiB")
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise _FaultError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from None
        except (httpx.InvalidURL, UnicodeError) as error:  # a host that no name server can be asked for
            raise RefusedError(f"not an address ({error})") from None
        if response.status_code != 200:
            self._refuse(response, bytes(data))
        return _content(bytes(data))

    def _refuse(self, response: "httpx.Response", data: bytes) -> None:
        """Raises the error that follows from a status other than 200."""
        text = data[: 4 * _SHOWN].decode(errors="replace")
        text = text.replace(self._endpoint.key, "…") if self._endpoint.key else text
        problem = f"status {response.status_code}" + (f": {printable(text)[:_SHOWN]}" if text.strip() else "")
        if response.status_code in _FOR_ALL or response.is_redirect:
            raise RefusedError(problem)
        if response.status_code in _FOR_ONE:
            raise NoReplyError(problem)
        raise _FaultError(problem, retry_after_s(response.headers.get("retry-after", "")))


def retry_after_s(value: str) -> float:
    """Returns the seconds to wait by a Retry-After header, which has seconds or a date; 0 if it has neither."""
    if _SECONDS.fullmatch(value.strip()):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _content(data: bytes) -> str:
    try:
        value: Any = json.loads(data)
        content = value["choices"][0]["message"]["content"]
    except (ValueError, RecursionError):
        raise _FaultError(f"a response that is not JSON: {data[:60]!r}") from None
    except (TypeError, KeyError, IndexError):
        raise _FaultError(f"a response without choices[0].message.content: {data[:60]!r}") from None
    if not isinstance(content, str) or not content.strip():
        raise _FaultError("an empty reply")
    return content
