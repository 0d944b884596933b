"""Asks a checkpoint one question about one picture."""

from pathlib import Path
from typing import Any

from torch import Tensor

import llava

QUESTION = "What is unusual about it?"


def opened(path: Path, **options: Any) -> llava.Assistant:
    return llava.load(path, dtype="float32", device="cpu", **options)


def asked(picture: Path | None) -> list[dict[str, Any]]:
    text = {"type": "text", "text": QUESTION}
    return [{"role": "user", "content": [{"type": "image", "image": str(picture)}, text] if picture else [text]}]


def answer(vlm: llava.Assistant, picture: Path | None = None) -> list[int]:
    return vlm.generate(asked(picture), max_new_tokens=8).token_ids


def pixels(vlm: llava.Assistant, picture: Path) -> Tensor:
    given = vlm.prepare(asked(picture)).pixels
    assert given is not None
    return given
