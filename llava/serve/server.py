"""Runs the application with uvicorn: binds the address, says when it is ready, and drains on SIGTERM."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

from llava.assistant import Assistant
from llava.errors import ConfigError, LlavaError
from llava.serve.access import Access
from llava.serve.app import State, create
from llava.serve.limits import Limits

log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 15  # seconds that an idle connection is kept
_BACKLOG = 1024  # connections that wait to be accepted


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where and how to serve."""

    port: int = 8000  # 0: any free port
    drain_s: float = 60.0  # seconds that running requests have to finish after SIGTERM
    certificate: str | None = None  # PEM files, for https
    private_key: str | None = None

    @property
    def scheme(self) -> str:
        """http or https."""
        return "https" if self.certificate else "http"


def run(
    load: Callable[[], Assistant], name: str, access: Access, options: ServerOptions, limits: Limits | None = None
) -> None:
    """Serves a model until SIGTERM or Ctrl-C. Raises LlavaError if the address or the model cannot be used."""
    listening = bind(access.host, options.port)
    try:
        host = f"[{access.host}]" if ":" in access.host else access.host
        address = f"{options.scheme}://{host}:{listening.getsockname()[1]}"

        def on_ready() -> None:
            print(f"llava: serving {name} at {address}", flush=True)

        def on_failure(error: LlavaError) -> None:
            server.should_exit = True

        app = create(load, name, access=access, limits=limits, on_ready=on_ready, on_failure=on_failure)
        state: State = app.state.llava
        server = _Server(_config(app, options), state, options.drain_s)
        server.run(sockets=[listening])
    finally:
        listening.close()
    if state.error:
        raise state.error


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} --port {port}: cannot be used ({reason}); choose another port") from None
    return listening


def _config(app: Any, options: ServerOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.private_key,
    )


class _Server(uvicorn.Server):
    """Finishes the requests that run before it exits."""

    def __init__(self, config: uvicorn.Config, state: State, drain_s: float):
        super().__init__(config)
        self._state, self._drain_s = state, drain_s
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains after the first signal, and exits at once after the second or while the model is being loaded."""
        if self._state.draining or self._state.service is None:
            self.should_exit = self.force_exit = True
            return
        self._state.draining = True
        asyncio.get_running_loop().call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._drain = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        end = time.monotonic() + self._drain_s
        while self._state.service and self._state.service.n_active and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.should_exit = True
