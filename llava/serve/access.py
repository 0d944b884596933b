"""Who may ask what: keys, hosts and origins, and the size and speed of bodies.

`AccessMiddleware` is the outermost layer of the application.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.errors import ConfigError
from llava.serve.errors import ApiError
from llava.serve.limits import Limits
from llava.serve.metrics import Metrics

log = logging.getLogger("llava.access")

_OPEN_PATHS = ("/health", "/ready", "/version")  # without a key
_STARTS = (b",", b"[", b"{")  # in JSON, there are as many of them as values, at least
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]-]+", re.ASCII)
_HOST = re.compile(r"\[(?P<v6>[0-9a-fA-F:.]+)\](:\d+)?|(?P<name>[\w.-]+)(:\d+)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may use the server."""

    host: str  # address that it binds
    keys: tuple[str, ...] = ()  # API keys; none: everybody who can reach the address
    hosts: tuple[str, ...] = ()  # further names under which it may be addressed
    origins: tuple[str, ...] = ()  # origins of web pages that may use it

    def __post_init__(self) -> None:
        if not self.is_local and not self.keys:
            raise ConfigError(
                f"--host {self.host} can be reached by others, and no key is set: set LLAVA_API_KEY or --api-key-file, "
                "or bind 127.0.0.1"
            )
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"--allow-origin {origin}: expected SCHEME://HOST, such as https://example.org")
        for key in self.keys:
            if not key.isascii() or not key.isprintable() or key != key.strip():
                raise ConfigError("an API key has characters that a header cannot carry; use printable ASCII")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def key_of(self, authorization: str) -> str:
        """Returns the key in an Authorization header, or "" if none is needed. Raises ApiError. Takes constant time."""
        scheme, _, given = authorization.partition(" ")
        if not self.keys:
            return ""
        if not self._is_key(given) or scheme.lower() != "bearer":
            problem = "is not valid" if given else "is missing"
            raise ApiError(401, f"the API key {problem}; send it as Authorization: Bearer KEY", code="invalid_api_key")
        return given

    def key_of_visitor(self, authorization: str) -> str:
        """Like `key_of`, for the page: browsers ask for a password, which is the key; the user name does not matter."""
        scheme, _, given = authorization.partition(" ")
        if not self.keys:
            return ""
        password = _password(given)
        if not self._is_key(password) or scheme.lower() != "basic":
            raise PasswordError("is not valid" if given else "is missing")
        return password

    def _is_key(self, given: str) -> bool:
        digest = hashlib.sha256(given.encode()).digest()
        matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in self.keys]
        return any(matches)

    def check_host(self, header: str) -> None:
        """Raises ApiError unless the Host header names this server: a web page could resolve its own name to it."""
        if not self.is_local and not self.hosts:
            return  # the key protects it
        match = _HOST.fullmatch(header)
        name = (match["v6"] or match["name"]).lower() if match else ""
        if name not in (*_LOCAL_NAMES, self.host.lower(), *(host.lower() for host in self.hosts)):
            message = "the Host header does not name this server; start it with --allow-host to allow the name"
            raise ApiError(403, message, code="host_not_allowed")

    def check_origin(self, origin: str, host: str) -> None:
        """Raises ApiError for requests of web pages of other origins."""
        if origin and origin not in self.origins and origin.split("://", 1)[-1] != host:
            message = "web pages of this origin may not use the server; start it with --allow-origin to allow it"
            raise ApiError(403, message, code="origin_not_allowed")


class PasswordError(ApiError):
    """A key that the visitor of the page has to enter: the browser asks for it."""

    def __init__(self, problem: str):
        expected = "enter it as the password, with any user name"
        super().__init__(401, f"the API key {problem}; {expected}", code="invalid_api_key")

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": 'Basic realm="llava", charset="UTF-8"'}


def _password(credentials: str) -> str:
    """Returns the password of Basic credentials (RFC 7617), or "" if there is none."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


class AccessMiddleware:
    """Checks each request before its body is read, limits the body, and logs and counts the response.

    is_page: whether a path belongs to the page, whose visitors give the key as a password. is_upload: whether a body of
    this path is a form with files.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        limits: Limits,
        metrics: Metrics,
        is_page: Callable[[str], bool],
        is_upload: Callable[[str], bool],
    ):
        self.app, self.access, self.limits, self.metrics = app, access, limits, metrics
        self.is_page, self.is_upload = is_page, is_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, send, self.access)
        try:
            key = self._check(scope, Headers(scope=scope))
            scope.setdefault("state", {}).update(key=key.encode(), arrived=exchange.arrived, id=exchange.id)
            if scope["method"] == "OPTIONS" and exchange.is_preflight:
                await exchange.answer_preflight()
                return
            has_values = not self.is_upload(scope["path"])
            limits = self._limits_of(scope["path"])
            exchange.body = _LimitedBody(receive, limits, exchange.arrived, has_values=has_values)
            await self.app(scope, exchange.body.receive, exchange.send)
        except ApiError as error:
            await exchange.answer(error)
        except Exception:
            log.exception("a request failed", extra={"request_id": exchange.id})
            await exchange.answer(ApiError(500, "the server failed to answer this request"))
        finally:
            self.metrics.response(exchange.route, exchange.status)
            exchange.log()

    def _check(self, scope: Scope, headers: Headers) -> str:
        """Returns the API key. Raises ApiError. A header that comes twice matches nothing."""
        host, origin, authorization = (", ".join(headers.getlist(one)) for one in ("host", "origin", "authorization"))
        self.access.check_host(host)
        self.access.check_origin(origin, host)
        is_open = scope["path"] in _OPEN_PATHS or scope["method"] == "OPTIONS"
        key_of = self.access.key_of_visitor if self.is_page(scope["path"]) else self.access.key_of
        key = "" if is_open else key_of(authorization)
        if scope["method"] == "POST":
            expected = "multipart/form-data" if self.is_upload(scope["path"]) else "application/json"
            if headers.get("content-type", "").split(";")[0].strip().lower() != expected:
                raise ApiError(415, f"the body has another type; send it as Content-Type: {expected}")
            if "transfer-encoding" in headers and "content-length" in headers:  # a proxy could take the other one
                raise ApiError(400, "the request has both Transfer-Encoding and Content-Length; send one of them")
            length = headers.get("content-length", "0")
            limits = self._limits_of(scope["path"])
            if not length.isdecimal() or int(length[:20]) > limits.body_bytes:
                raise _too_large(limits)
        return key

    def _limits_of(self, path: str) -> Limits:
        """Returns the limits of a body: a folder of pictures may be larger than a request, and goes to a disk."""
        if not self.is_upload(path):
            return self.limits
        return replace(self.limits, body_bytes=self.limits.upload_body_bytes, body_s=self.limits.upload_s)


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"the body has more than {limits.body_bytes} bytes; send less")


class _LimitedBody:
    """Receives a body of limited size within a limited time."""

    def __init__(self, receive: Receive, limits: Limits, arrived: float, *, has_values: bool):
        """has_values: whether it is JSON."""
        self._receive, self._limits, self._arrived, self._has_values = receive, limits, arrived, has_values
        self._n_bytes, self._n_values = 0, 0
        self.is_complete = False

    async def receive(self) -> Message:
        """Returns the next message. Raises ApiError."""
        if self.is_complete:
            return await self._receive()
        left = max(0.0, self._arrived + self._limits.body_s - time.perf_counter())
        try:
            message = await asyncio.wait_for(self._receive(), left)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body took more than {self._limits.body_s:g} s to arrive") from None
        body = message.get("body", b"")
        self._n_bytes += len(body)
        self._n_values += sum(map(body.count, _STARTS)) if self._has_values else 0
        if self._n_bytes > self._limits.body_bytes:
            raise _too_large(self._limits)
        if self._n_values > self._limits.body_values:
            problem = f"the body has more than {self._limits.body_values} values or commas; send less"
            raise ApiError(413, problem)
        self.is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message


class _Exchange:
    """A request and its response: adds headers, and remembers what to log."""

    def __init__(self, scope: Scope, send: Send, access: Access):
        self._scope, self._send, self._access = scope, send, access
        self._headers = Headers(scope=scope)
        self.arrived = time.perf_counter()
        given = self._headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        self.body: _LimitedBody | None = None  # None: it is not read
        self.status = 0  # of the response; 0: none was sent
        self.error: str | None = None  # code of an error that was answered here

    @property
    def route(self) -> str:
        """The path of the route, or "other": the client's own path could have any number of values."""
        path = getattr(self._scope.get("route"), "path", None)
        if path is None and "app" in self._scope:  # answered before it was routed
            known = {getattr(route, "path", None) for route in self._scope["app"].routes}
            path = self._scope["path"] if self._scope["path"] in known else None
        return path or "other"

    @property
    def is_preflight(self) -> bool:
        """Whether a browser asks if a page may send a request."""
        return "access-control-request-method" in self._headers and self._headers.get("origin") in self._access.origins

    async def send(self, message: Message) -> None:
        """Sends a message of the application, with our headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=list(message.get("headers", [])))
            for name, value in self._more_headers():
                headers[name] = value
            message = {**message, "headers": headers.raw}
        await self._send(message)

    @property
    def _has_unread_body(self) -> bool:
        has_one = "transfer-encoding" in self._headers or self._headers.get("content-length", "0") != "0"
        return has_one and not (self.body and self.body.is_complete)

    def _more_headers(self) -> Sequence[tuple[str, str]]:
        headers = [("x-request-id", self.id), ("x-content-type-options", "nosniff")]
        if self._has_unread_body:
            headers.append(("connection", "close"))  # it may never end
        origin = self._headers.get("origin", "")
        if origin in self._access.origins:
            headers += [("access-control-allow-origin", origin), ("vary", "Origin")]
        return headers

    async def answer_preflight(self) -> None:
        """Allows the request that a page is about to send."""
        headers = [
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-max-age", b"600"),
        ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self._send({"type": "http.response.body", "body": b""})

    async def answer(self, error: ApiError) -> None:
        """Answers with an error, unless the response has begun."""
        if self.status:
            log.warning("a response was cut off", extra={"request_id": self.id})
            return  # without its end, so that the client does not take it for whole
        self.error = error.code
        body = json.dumps(error.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        raw = [(name.encode(), value.encode()) for name, value in (headers | error.headers).items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})

    def log(self) -> None:
        """Logs the request, without anything that it contained."""
        log.info(
            "request",
            extra={
                "request_id": self.id,
                "method": self._scope["method"] if self._scope["method"].isalpha() else "other",
                "route": self.route,
                "status": self.status,
                "error": self.error,
                "seconds": round(time.perf_counter() - self.arrived, 4),
                "client": (self._scope.get("client") or ("",))[0],
            },
        )
