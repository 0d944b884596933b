"""LLaVA in native PyTorch: load, convert, train and chat with every published checkpoint.

import llava
vlm = llava.load("liuhaotian/llava-v1.5-7b")
vlm.ask("photo.jpg", "What is unusual here?")
"""

from typing import TYPE_CHECKING, Any

from llava.config import EngineOptions
from llava.errors import CheckpointError, ConfigError, ImageError, LlavaError, PromptError

if TYPE_CHECKING:
    from llava.assistant import Assistant, load
    from llava.engine.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "Assistant",
    "CheckpointError",
    "ConfigError",
    "EngineOptions",
    "ImageError",
    "LlavaError",
    "PromptError",
    "SamplingParams",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """Imports what needs torch on first use, because importing torch takes about a second."""
    if name in ("load", "Assistant"):
        from llava import assistant

        return getattr(assistant, name)
    if name == "SamplingParams":
        from llava.engine.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'llava' has no attribute {name!r}")
