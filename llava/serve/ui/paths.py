"""The paths of the page: the few routes of gradio that it needs, and our own files. No other route of gradio exists.

Left out on purpose are, among others, `proxy=`, which fetches addresses, and `run`, `call` and `component_server`,
which run functions outside the queue.
"""

from starlette.routing import compile_path

FILES = "/page"  # our own files are below it
FILE_OF_VISITOR = "/gradio_api/file="  # a picture that a visitor has sent
HEARTBEAT = "/gradio_api/heartbeat/"  # as long as the page is open
JOIN, EVENTS, CANCEL = "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/cancel"
UPLOAD = "/gradio_api/upload"

PATHS: dict[str, tuple[str, ...]] = {
    "/": ("GET",),
    f"{FILES}/{{name}}": ("GET",),
    "/assets/{path:path}": ("GET",),
    "/static/{path:path}": ("GET",),
    "/theme.css": ("GET",),
    "/config": ("GET",),
    "/favicon.ico": ("GET",),
    "/gradio_api/startup-events": ("GET",),
    FILE_OF_VISITOR + "{path:path}": ("GET",),
    HEARTBEAT + "{session_hash}": ("GET",),
    EVENTS: ("GET",),
    "/gradio_api/upload_progress": ("GET",),
    UPLOAD: ("POST",),
    JOIN: ("POST",),
    CANCEL: ("POST",),
    "/gradio_api/reset": ("POST",),
}
_PATTERNS = [compile_path(path)[0] for path in PATHS]


def is_page(path: str) -> bool:
    """Whether a path belongs to the page."""
    return any(pattern.match(path) for pattern in _PATTERNS)


def is_upload(path: str) -> bool:
    """Whether a body of this path is a form with files."""
    return path == UPLOAD
