"""Hidden states of many texts to one safetensors file, streamed: the language model as a feature extractor.

S places of a row   D width
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.assistant import Assistant
from llava.config import IMAGE_MARK
from llava.errors import ImageError, PromptError
from llava.tensors.atomic import new_file
from llava.tensors.files import DTYPE_NAMES
from llava.tensors.writer import Progress, no_progress

MAX_HEADER_BYTES = 100_000_000  # what readers of the format accept


class Row(NamedTuple):
    """One input line."""

    text: str
    image: str | None


def read_rows(file: Path) -> list[Row]:
    """A .jsonl file of {"text": …, "image": path?}, or a text a line. Picture paths are relative to the file.

    Raises PromptError naming the line.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file}: can not be read as text ({error})") from None
    if file.suffix not in (".jsonl", ".json"):
        rows = [Row(line, None) for line in lines]
    else:
        rows = [_row(line, f"{file}:{i}", file.parent) for i, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise PromptError(f"{file}: holds no rows")
    return rows


def _row(line: str, where: str, folder: Path) -> Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where}: not JSON ({error})") from None
    fits = isinstance(values, dict) and isinstance(values.get("text"), str) and not set(values) - {"text", "image"}
    if not fits or not isinstance(values.get("image"), str | None):
        raise PromptError(f'{where}: expected {{"text": …, "image": path?}}, found {line[:60]}')
    return Row(values["text"], str(folder / values["image"]) if values.get("image") else None)


def extract(
    assistant: Assistant,
    rows: Sequence[Row],
    layers: Sequence[int],
    out: Path,
    *,
    template: str | None = None,
    progress: Progress = no_progress,
) -> None:
    """Writes "{row}.{layer}" -> [S, D] for every row and layer, in the model's type.

    A text is a raw prompt, its picture in front where it has no mark; with `template` it is a user's message. The
    header has room for all entries and is filled in at the end. Raises PromptError, ImageError, ConfigError naming the
    row; then nothing is left behind.
    """
    room = 64 + len(rows) * len(layers) * _entry_bytes(len(rows))
    if room > MAX_HEADER_BYTES:
        raise PromptError(
            f"{len(rows)} rows x {len(layers)} layers are more entries than one safetensors file can have: "
            f"split the input into parts of at most {len(rows) * MAX_HEADER_BYTES // room} rows"
        )
    with new_file(out, room) as partial, partial.open("wb") as file:
        file.write(room.to_bytes(8, "little") + b" " * room)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for i, row in enumerate(rows):
            for layer, states in _states(assistant, row, i, layers, template):
                data = states.cpu().contiguous().view(torch.uint8).numpy()
                file.write(data.data)
                entry = {"dtype": DTYPE_NAMES[states.dtype], "shape": list(states.shape)}
                header[f"{i}.{layer}"] = {**entry, "data_offsets": [place, place + data.nbytes]}
                place += data.nbytes
            progress(i + 1, len(rows))
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= room
        file.seek(8)
        file.write(text.ljust(room))


def _entry_bytes(n_rows: int) -> int:
    """Room for one line of the header: 19 digits an offset, 10 a size."""
    return len('"":{"dtype":"BF16","shape":[,],"data_offsets":[,]},') + len(str(n_rows)) + 12 + 2 * 10 + 2 * 19


def _states(
    assistant: Assistant, row: Row, number: int, layers: Sequence[int], template: str | None
) -> Iterator[tuple[int, Tensor]]:
    images = [row.image] if row.image else []
    try:
        if template:
            parts = [{"type": "image", "image": image} for image in images]
            message = {"role": "user", "content": [*parts, {"type": "text", "text": row.text}]}
            states = assistant.hidden_states([message], layers, template=template)
        else:
            text = f"{IMAGE_MARK}\n{row.text}" if images and IMAGE_MARK not in row.text else row.text
            states = assistant.hidden_states(text, layers, images=images)
    except (PromptError, ImageError) as error:
        raise type(error)(f"row {number}: {error}") from None
    yield from states.items()
