"""Adds the page to the application. Gradio is imported when the page is first asked for."""

import asyncio
import os
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llava.serve.errors import ApiError
from llava.serve.settings import Settings
from llava.serve.ui.gate import Gate
from llava.serve.ui.paths import CANCEL, EVENTS, FILES, PATHS

if TYPE_CHECKING:
    from llava.serve.state import State

_FILES = {  # our own, by their names in addresses
    "page.js": ("llava.serve.ui", "text/javascript"),
    "viewer.js": ("llava.explain", "text/javascript"),
    "viewer.css": ("llava.explain", "text/css"),
    "style.css": ("llava.serve.ui", "text/css"),
}
_SESSIONS = 1000  # open pages whose conversations are kept
_HOUR = 3600  # seconds; pictures are deleted after a day
_LOADING = (
    "<!doctype html><html lang=en><title>llava</title><p>The model is being loaded. This page then opens by itself."
)
_WHILE_DRAINING = (CANCEL, EVENTS)


class Page:
    """The page. It is built for its first visitor: importing gradio takes seconds, which API clients need not wait."""

    def __init__(self, state: "State"):
        self._state = state
        self._app: ASGIApp | None = None
        self._building = asyncio.Lock()
        self._open = AsyncExitStack()  # what has to be closed at the end

    def add_to(self, app: FastAPI) -> None:
        """Adds the routes of the page."""
        app.router.routes.extend(
            _PageRoute(path, endpoint=self, methods=list(methods), include_in_schema=False)
            for path, methods in PATHS.items()
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/" and self._state.is_loading:
            await Response(_LOADING, 503, {"Refresh": "2"}, "text/html")(scope, receive, send)
            return
        if not (self._state.draining and scope["path"] in _WHILE_DRAINING):
            _ = self._state.ready
        async with self._building:
            self._app = self._app or await self._build()
        await self._app(scope, receive, send)

    async def _build(self) -> ASGIApp:
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="llava-page-"))
        settings = self._state.settings
        models = list(self._state.ready.adapters)
        app, events = await asyncio.to_thread(build, settings, models, Path(folder))
        await self._open.enter_async_context(app.router.lifespan_context(app))
        streams = self._state.page_streams
        return _OwnFiles(Gate(app, events=events, folder=Path(folder), limits=settings.limits, streams=streams))

    async def close(self) -> None:
        """Ends the page, and deletes what its visitors have sent."""
        await self._open.aclose()


class _PageRoute(Route):
    """A route whose path is counted and logged, as those of the API."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return match, {**child, "route": self}


class _OwnFiles:
    """Answers requests for the files of this package, and passes others on."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(f"{FILES}/"):
            await self._app(scope, receive, send)
            return
        name = scope["path"].removeprefix(f"{FILES}/")
        if name not in _FILES:
            raise ApiError(404, "this path does not exist")
        package, kind = _FILES[name]
        content = (resources.files(package) / name).read_bytes()
        await Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})(scope, receive, send)


def build(settings: Settings, models: Sequence[str], folder: Path) -> tuple[FastAPI, list[int]]:
    """Builds the page, and returns it with the numbers of its events.

    folder: for the pictures that visitors send; only this user can read it.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # gradio reads it with each request
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    from llava.serve.ui.blocks import PageBlocks
    from llava.serve.ui.theme import HEAD, theme

    title, delete_cache = f"{settings.name} · llava", (_HOUR, 24 * _HOUR)
    with PageBlocks(title=title, analytics_enabled=False, delete_cache=delete_cache) as blocks:
        gradio.HTML(f"<h1>{escape(settings.name)}</h1>", elem_id="heading", js_on_load=None)
        _add_tabs(settings, models, folder)
    blocks.queue(max_size=settings.limits.requests, api_open=False)
    blocks.has_launched = True  # or gradio would not check which files its components read
    blocks.state_session_capacity = _SESSIONS
    parent: Any = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gradio.mount_gradio_app(
        parent,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=settings.limits.picture_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        head=HEAD,
    )
    return parent, list(blocks.fns)


def _add_tabs(settings: Settings, models: Sequence[str], folder: Path) -> None:
    import gradio

    from llava.serve.ui.chat import ChatTab
    from llava.serve.ui.compare import CompareTab
    from llava.serve.ui.gallery import GalleryTab

    with gradio.Tabs():
        with gradio.Tab("Chat"):
            ChatTab(settings, models, folder)
        with gradio.Tab("Gallery"):
            GalleryTab(settings, models)
        with gradio.Tab("Compare"):
            CompareTab(settings, models)
