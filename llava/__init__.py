"""LLaVA in native PyTorch: load, convert, train and chat with every published checkpoint.

import llava
vlm = llava.load("liuhaotian/llava-v1.5-7b")
vlm.ask("photo.jpg", "What is unusual here?")
"""

from typing import TYPE_CHECKING, Any

from llava.errors import CheckpointError, ConfigError, ImageError, LlavaError, PromptError

if TYPE_CHECKING:
    from llava.assistant import Assistant, load

__version__ = "0.1.0"
__all__ = [
    "Assistant",
    "CheckpointError",
    "ConfigError",
    "ImageError",
    "LlavaError",
    "PromptError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """Imports `load` and `Assistant` on first use, because importing torch takes about a second."""
    if name in ("load", "Assistant"):
        from llava import assistant

        return getattr(assistant, name)
    raise AttributeError(f"module 'llava' has no attribute {name!r}")
