"""Pieces that several tabs show."""

import random
from html import escape
from typing import Any

import gradio as gr


def alert(problem: object) -> str:
    """What went wrong, as a line that screen readers read out."""
    return f'<p role="alert">{escape(str(problem))}</p>'


def record(text: str, name: str, kind: str) -> str:
    """A file for page.js, which saves it. name: its beginning, before the time. kind: json or csv."""
    new = f'data-n="{random.randrange(2**31)}"'  # a new value each time, or the browser would see no change
    shown = escape(text).replace("\r", "&#13;")  # which HTML would take for a line break like any other
    return f'<div class="record-data" data-name="{name}" data-kind="{kind}" {new} hidden>{shown}</div>'


def question_box(label: str, placeholder: str, name: str, **options: Any) -> gr.MultimodalTextbox:
    """Where a question is written and pictures are added. name: its id in the browser. options: of gradio's box."""
    return gr.MultimodalTextbox(
        label=label,
        placeholder=placeholder,
        sources=["upload"],
        file_types=["image"],
        file_count="multiple",
        max_plain_text_length=100_000,
        elem_id=name,
        **options,
    )
