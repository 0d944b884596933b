"""The gate before gradio: what a visitor of the page may send to it, and the headers of its answers."""

import asyncio
import base64
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.serve.errors import ApiError
from llava.serve.limits import Limits
from llava.serve.ui.paths import CANCEL, EVENTS, FILE_OF_VISITOR, HEARTBEAT, JOIN, UPLOAD

_SESSIONS = 10_000  # sessions whose keys are remembered
_EVENT_BYTES = 2**20  # of the body of an event, which has text and the paths of files; gradio keeps what nobody fetches
_SESSION = re.compile(r"\w{1,64}", re.ASCII)
_INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)
# Forwarded hosts would end up in the addresses of the page. The answer to / is read here, so it is not compressed.
_DROPPED = (b"x-forwarded-host", b"accept-encoding")

_HEADERS = {
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_INERT = "default-src 'none'; sandbox"  # a file of a visitor, opened by itself, is no page of this origin

Streams = dict[asyncio.Task[Any], asyncio.Future[None]]


class Gate:
    """Passes the requests of visitors to gradio, if they are what the page itself sends. Raises ApiError otherwise.

    events: their numbers. folder: the only folder whose files exist for visitors. streams: gets the answers that end
    when a page is closed: the task of the request, and the task to cancel.
    """

    def __init__(self, app: ASGIApp, *, events: Collection[int], folder: Path, limits: Limits, streams: Streams):
        self.app, self.limits, self._streams = app, limits, streams
        self._events = list(events)  # a list, as what visitors send may have no hash
        self._folder = folder.resolve()
        self._sessions: OrderedDict[str, bytes] = OrderedDict()  # {session: key of its visitor}
        self._arriving = 0  # bytes of uploads that are under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        _check_same_origin(path, headers)
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] not in _DROPPED]}
        if path == "/":
            await _Document(send).answer(self.app, scope, receive)
        elif path.startswith(FILE_OF_VISITOR):
            self._check_file(path.removeprefix(FILE_OF_VISITOR))
            await self.app(scope, receive, _with_headers(send, {"Content-Security-Policy": _INERT}))
        elif path == UPLOAD:
            await self._upload(scope, receive, send, headers)
        elif path in (JOIN, CANCEL):
            body = await _read(receive)
            self._check_body(body, scope)
            await self.app(scope, _replay(body, receive), _with_headers(send))
        elif path == EVENTS:
            query = parse_qs(scope["query_string"].decode("ascii", "replace"))
            self._check_session(query.get("session_hash", [""])[0], scope)
            try:
                await self.app(scope, receive, _with_headers(send))
            except RuntimeError as error:
                if not isinstance(error.__cause__, HTTPException):
                    raise
                await send({"type": "http.response.body", "body": b""})  # nothing runs in the session; gradio said so
        elif path.startswith(HEARTBEAT):
            self._check_session(path.removeprefix(HEARTBEAT), scope)
            await self._beat(scope, receive, send)
        else:
            await self.app(scope, receive, _with_headers(send))

    async def _beat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends an answer that ends when the page is closed, or when the server ends and cancels it."""
        if len(self._streams) >= self.limits.page_streams:
            raise ApiError(429, "too many pages are open; close one, or try again later")
        own = asyncio.current_task()
        assert own
        beating = self._streams[own] = asyncio.ensure_future(self.app(scope, receive, _with_headers(send)))
        try:
            await asyncio.wait({beating})
            if not beating.cancelled():
                beating.result()
                return
            with suppress(RuntimeError):  # it had ended already
                await send({"type": "http.response.body", "body": b""})
        finally:
            beating.cancel()
            del self._streams[own]

    def _check_file(self, path: str) -> None:
        """Raises ApiError unless it is a file that a visitor has sent: gradio would also serve others."""
        if not self._is_visitors(path):
            raise ApiError(404, "this file does not exist")

    def _is_visitors(self, path: str) -> bool:
        try:
            found = Path(path).resolve()
            return Path(path).is_absolute() and found.is_relative_to(self._folder) and found.is_file()
        except (OSError, ValueError):  # such as a name that is too long, or has a null byte
            return False

    def _check_session(self, session: Any, scope: Scope) -> None:
        """Raises ApiError if a session is that of a visitor with another key."""
        if not isinstance(session, str) or not _SESSION.fullmatch(session):
            raise ApiError(400, "session_hash: expected letters and digits")
        key: bytes = scope["state"]["key"]
        if self._sessions.setdefault(session, key) != key:
            raise ApiError(403, "this session belongs to another key; load the page again")
        self._sessions.move_to_end(session)
        if len(self._sessions) > _SESSIONS:
            self._sessions.popitem(last=False)

    def _check_body(self, body: bytes, scope: Scope) -> None:
        """Raises ApiError for files that no visitor has sent, which gradio would read or fetch."""
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            raise ApiError(400, "the body is not valid JSON") from None
        if not isinstance(parsed, dict):
            raise ApiError(400, "the body: expected an object")
        self._check_session(parsed.get("session_hash"), scope)
        if parsed.get("fn_index") not in self._events:
            raise ApiError(400, "fn_index: this event does not exist; load the page again")
        for path in _paths(parsed):
            if not isinstance(path, str) or not self._is_visitors(path):
                raise ApiError(400, "the picture is no longer there; add it again")

    async def _upload(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        length = headers.get("content-length", "")
        if not length.isdecimal():
            raise ApiError(411, "the upload has no Content-Length")
        n_bytes = int(length[:20])
        n_files, used = await asyncio.to_thread(_contents, self._folder)
        is_full = used + self._arriving + n_bytes > self.limits.upload_bytes
        if is_full or n_files >= self.limits.upload_files:
            raise ApiError(413, "the server has no room for more pictures; try again later")
        self._arriving += n_bytes
        try:
            await self.app(scope, receive, _with_headers(send))
        finally:
            self._arriving -= n_bytes


def _check_same_origin(path: str, headers: Headers) -> None:
    """Raises ApiError for requests that pages of other sites make, whatever origins are allowed to use the API."""
    site = headers.get("sec-fetch-site", "none")
    is_visit = path == "/" and headers.get("sec-fetch-mode", "navigate") == "navigate"
    if site not in ("same-origin", "none") and not is_visit:
        raise ApiError(403, "web pages of other sites may not use this page", code="origin_not_allowed")


def _contents(folder: Path) -> tuple[int, int]:
    """Returns the number of files in a folder and their bytes. Some may be deleted meanwhile."""
    n_files, n_bytes = 0, 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if file.is_file():
                n_bytes += file.lstat().st_size
                n_files += 1
    return n_files, n_bytes


def _paths(value: Any) -> Iterator[Any]:
    """Yields all paths of files in a body."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "path" in one:
                yield one["path"]
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


async def _read(receive: Receive) -> bytes:
    parts, more, n_bytes = [], True, 0
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ApiError(499, "the client has disconnected")
        parts.append(message.get("body", b""))
        n_bytes += len(parts[-1])
        if n_bytes > _EVENT_BYTES:
            raise ApiError(413, f"the body has more than {_EVENT_BYTES} bytes; send a shorter text, or fewer pictures")
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives a body which has been read, and then waits for the client to disconnect."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def _with_headers(send: Send, more: dict[str, str] | None = None) -> Send:
    """Returns a `send` that adds the headers of the page, and removes gradio's, which allow other origins."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if not pair[0].lower().startswith(b"access-control-")]
            headers = MutableHeaders(raw=kept)
            for name, value in (_HEADERS | (more or {})).items():
                headers[name] = value
            message = {**message, "headers": headers.raw}
        await send(message)

    return sending


class _Document:
    """The answer to /: its policy names the inline scripts that gradio has written into it."""

    def __init__(self, send: Send):
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def answer(self, app: ASGIApp, scope: Scope, receive: Receive) -> None:
        """Sends the whole answer."""
        await app(scope, receive, self._collect)

    async def _collect(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if not message.get("more_body", False):
            assert self._start
            more = {"Content-Security-Policy": policy(self._body), "Cache-Control": "no-store"}
            await _with_headers(self._send, more)(self._start)
            await self._send({"type": "http.response.body", "body": self._body})


def policy(document: bytes) -> str:
    """Returns the Content-Security-Policy of the page. No request can leave its own origin."""
    digests = (hashlib.sha256(script).digest() for script in _INLINE_SCRIPT.findall(document))
    hashes = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in digests)
    rules = {
        "default-src": "'none'",
        # gradio writes its configuration into inline scripts, and compiles the template of its HTML component
        "script-src": f"'self' 'unsafe-eval' {hashes}",
        "style-src": "'self' 'unsafe-inline'",  # gradio sets sizes and colours in style attributes
        "img-src": "'self' data: blob:",  # data: icons in gradio's styles; blob: pictures that are being sent
        "media-src": "'self' blob:",  # the camera
        "font-src": "'self'",
        "connect-src": "'self'",
        "manifest-src": "'self'",
        "base-uri": "'self'",  # gradio writes <base href="./">
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())
