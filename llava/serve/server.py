"""Runs the application with uvicorn: binds the address, says when it is ready, and drains on SIGTERM."""

import asyncio
import gc
import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava.assistant import Assistant
from llava.engine.collection import set_aside
from llava.errors import ConfigError, LlavaError
from llava.serve.access import log as access_log
from llava.serve.app import create
from llava.serve.errors import ApiError
from llava.serve.limits import Limits
from llava.serve.metrics import Metrics
from llava.serve.settings import Settings
from llava.serve.state import State

log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 15  # seconds that an idle connection is kept
_CLOSE_S = 2.0  # seconds after draining in which responses can still be sent
_UNREAD_S = 30  # seconds after which a client that reads nothing of its response is disconnected
_INTERRUPTED = 130  # exit code after a second signal, as that of other commands after one
_BACKLOG = 1024  # connections that wait to be accepted
_RETRY_S = 1.0  # seconds after which connections are accepted again if that has failed
_SWITCH_S = 0.0005  # seconds after which a thread gives Python's lock to another one; Python's own choice is 0.005


def run(load: Callable[[], Assistant], settings: Settings) -> None:
    """Serves a model until SIGTERM or Ctrl-C. Raises LlavaError if the address or the model cannot be used."""
    host = settings.access.host
    listening = bind(host, settings.port)
    switch_s = sys.getswitchinterval()
    served = ExitStack()
    try:
        sys.setswitchinterval(_SWITCH_S)  # the engine's thread needs the lock for a moment between two operations
        address = f"[{host}]" if ":" in host else host
        url = f"{settings.scheme}://{address}:{listening.getsockname()[1]}"

        def on_ready() -> None:
            gc.collect()
            served.enter_context(set_aside())
            print(f"llava: serving {settings.name} at {url}", flush=True)

        def on_failure(error: LlavaError) -> None:
            server.should_exit = True

        app = create(load, settings, on_ready=on_ready, on_failure=on_failure)
        state: State = app.state.llava
        server = _Server(_config(app, settings), state)
        server.run(sockets=[listening])
    finally:
        served.close()
        sys.setswitchinterval(switch_s)
        listening.close()
    if state.error:
        raise state.error


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _UNREAD_S)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except socket.gaierror:
        raise ConfigError(f"--host {host}: is no address of this machine; bind 127.0.0.1, or 0.0.0.0 for all") from None
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot be used ({error.strerror}); choose another") from None
    return listening


def _config(app: Any, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.private_key,
    )


class _Protocol(H11Protocol):
    """Closes connections whose client takes too long to send the head of a request."""

    def __init__(self, limits: Limits, metrics: Metrics, *args: Any):
        super().__init__(*args)
        self._limits, self._metrics = limits, metrics
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def _wait_for_head(self) -> None:  # `close` would wait until a client of TLS agrees
        self._waiting = self.loop.call_later(self._limits.head_s, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        has_head = self.conn.their_state is not h11.IDLE
        if has_head and self._waiting:
            self._waiting.cancel()
            self._waiting = None
        elif not has_head and not self._waiting:  # the next request on a connection that is kept
            self._wait_for_head()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP in our own words, unless a response has begun."""
        if self.conn.our_state is not h11.IDLE:  # its head was valid; the application gives it an id, and logs it
            self.loop.call_soon(self._refuse_body)
            return
        id = f"req-{secrets.token_hex(12)}"
        self._answer_400(id)
        self._metrics.response("other", 400)
        client = self.client[0] if self.client else ""
        about = {"method": "other", "route": "other", "status": 400, "error": None, "seconds": 0.0, "client": client}
        access_log.info("request", extra={"request_id": id, **about})

    def _refuse_body(self) -> None:
        id = self.scope["state"].get("id")
        if id and self.conn.our_state is h11.SEND_RESPONSE:
            self._answer_400(id)
        self.transport.close()

    def _answer_400(self, id: str) -> None:
        body = json.dumps(ApiError(400, "the request is not valid HTTP, or its head is too large").body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        raw = list({**headers, "x-request-id": id, "x-content-type-options": "nosniff"}.items())
        response = h11.Response(status_code=400, headers=raw, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _should_upgrade(self) -> bool:
        return False  # to nothing, and without a warning for each request that asks for it

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting:
            self._waiting.cancel()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    """Limits the connections from the moment they are accepted, and finishes the requests that run before it exits."""

    def __init__(self, config: uvicorn.Config, state: State):
        super().__init__(config)
        self._state, self._limits = state, state.settings.limits
        self._drain: asyncio.Task[None] | None = None
        self._n_signals = 0
        self._connecting: set[asyncio.Task[None]] = set()  # those that accept, and those of TLS handshakes

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the application, and accepts connections."""
        await super().startup(sockets=[])  # with sockets, it would not know of connections before their TLS handshake
        for listening in sockets or []:
            listening.setblocking(False)
            self._run(self._accept(listening))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _accept(self, listening: socket.socket) -> None:
        """Accepts connections, and closes those beyond the limit."""
        loop, connections = asyncio.get_running_loop(), self.server_state.connections
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:  # such as too many open files
                log.warning("connections cannot be accepted", extra={"reason": error.strerror})
                await asyncio.sleep(_RETRY_S)
                continue
            if len(connections) < self._limits.connections:
                protocol = _Protocol(
                    self._limits, self._state.metrics, self.config, self.server_state, self.lifespan.state
                )
                connections.add(protocol)
                self._run(self._connect(connection, protocol))
            else:
                connection.close()
            await asyncio.sleep(0)  # `sock_accept` does not, as long as connections wait

    async def _connect(self, connection: socket.socket, protocol: _Protocol) -> None:
        """Passes a connection to its protocol, after the TLS handshake if there is a certificate."""
        tls = self.config.ssl
        timeout = {"ssl_handshake_timeout": self._limits.head_s} if tls else {}
        loop = asyncio.get_running_loop()
        try:
            with suppress(OSError):  # the handshake has failed, or took too long
                await loop.connect_accepted_socket(lambda: protocol, connection, ssl=tls, **timeout)
        finally:
            if protocol.transport is None:  # it has not begun, so it will not end either
                self.server_state.connections.discard(protocol)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends all connections, and the application with its processes and threads."""
        connecting = list(self._connecting)
        for task in connecting:
            task.cancel()
        await asyncio.gather(*connecting, return_exceptions=True)
        await super().shutdown(sockets)
        await self.lifespan.shutdown()  # uvicorn leaves it out if it does not wait for all connections
        if running := list(self.server_state.tasks):  # they send an error now
            await asyncio.wait(running, timeout=_CLOSE_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.get_running_loop().shutdown_default_executor()  # here, a second signal still ends everything

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains after the first signal, or exits if the model is being loaded. Ends the process after the second."""
        self._n_signals += 1
        service = self._state.service
        if self._n_signals > 1:
            if service:
                service.stop_pictures()
            os._exit(_INTERRUPTED)
        if service is None:
            self.should_exit = self.force_exit = True
        else:
            self._state.draining = True
            asyncio.get_running_loop().call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._drain = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        if running := self.server_state.tasks - self._state.page_streams.keys():  # new ones are refused
            await asyncio.wait(running, timeout=self._state.settings.drain_s)
        for stream in self._state.page_streams.values():
            stream.cancel()  # an open page would hold up the end
        self.should_exit = True
        await asyncio.sleep(_CLOSE_S)
        self.force_exit = True
