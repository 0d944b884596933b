"""How the page looks. Fonts are those of the system: gradio's themes would load theirs from Google."""

from typing import Any

import gradio

from llava.serve.ui.paths import FILES

HEAD = f"""
<link rel="stylesheet" href="{FILES}/style.css">
<link rel="stylesheet" href="{FILES}/viewer.css">
<script src="{FILES}/viewer.js"></script>
<script src="{FILES}/page.js" defer></script>
"""


def theme() -> Any:
    """Returns gradio's default theme with fonts of the system."""
    return gradio.themes.Default(
        primary_hue="orange",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
