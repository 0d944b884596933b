"""Gradio's blocks, which report what fails as the rest of the server does."""

import logging
import traceback
from pathlib import Path
from typing import Any

import gradio as gr

log = logging.getLogger(__name__)


class PageBlocks(gr.Blocks):
    """Blocks that log one line for an event that fails, such as one with malformed data. Gradio prints a traceback."""

    async def process_api(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Runs an event. Raises gr.Error, which the page shows."""
        try:
            return await super().process_api(*arguments, **options)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]  # without the message, which can have visitors' words
            reason = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            log.warning("an event of the page failed", extra={"reason": reason})
            message = str(error) if isinstance(error, gr.Error) else "the request is malformed; load the page again"
            raise gr.Error(message, print_exception=False) from None
