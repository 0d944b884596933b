"""Structured logs: one JSON object a line, without prompts or pictures unless these are asked for."""

import json
import logging
import sys
from pathlib import Path
from typing import Any, TextIO

from llava.errors import ConfigError

_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record, with whatever was passed as `extra`. Line breaks and control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns one line."""
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _KNOWN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Handler(logging.StreamHandler[TextIO]):
    """Drops a record that cannot be written, such as on a full disk: serving goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Does nothing."""


def set_up(file: Path | None = None) -> None:
    """Sends all logs to stderr, or to a file that is appended to. Raises ConfigError."""
    try:
        stream = sys.stderr if file is None else file.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--log-file {file}: cannot be written ({error.strerror}); choose another file") from None
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter())
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("llava").setLevel(logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each write to a client that has gone
