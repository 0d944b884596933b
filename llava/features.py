"""Uses the language model as a feature extractor: writes the hidden states of many texts to one safetensors file.

S sequence length   D dim
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.assistant import Assistant, question_about
from llava.config import IMAGE_PLACEHOLDER
from llava.errors import ConfigError, ImageError, PromptError, counted
from llava.preprocess import placeholders
from llava.preprocess.image import Picture
from llava.preprocess.inputs import Messages
from llava.tensors.atomic import check_new, new_file
from llava.tensors.files import DTYPE_NAMES
from llava.tensors.writer import Progress, no_progress

MAX_HEADER_BYTES = 100_000_000  # maximum header size of the safetensors format


class Row(NamedTuple):
    """One input text, optionally with an image."""

    text: str
    image: str | None


def read_rows(file: Path) -> list[Row]:
    """Reads a .jsonl file with one {"text": …, "image": path?} per line, or a text file with one text per line.

    Image paths are relative to the file's folder. Raises PromptError, with the line number if a line is invalid.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise PromptError(f"{file}: cannot be read ({error.strerror}); expected a text or .jsonl file") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{file}: not UTF-8 text ({error.reason}); expected a text or .jsonl file") from None
    if file.suffix not in (".jsonl", ".json"):
        rows = [Row(line, None) for line in lines]
    else:
        rows = [_row(line, f"{file}:{i}", file.parent) for i, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise PromptError(f"{file}: contains no rows; expected at least one")
    return rows


def _row(line: str, where: str, folder: Path) -> Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where}: not valid JSON ({error}); expected one JSON object per line") from None
    fits = isinstance(values, dict) and isinstance(values.get("text"), str) and not set(values) - {"text", "image"}
    if not fits or not isinstance(values.get("image"), str | None):
        raise PromptError(f'{where}: found {line[:60]}; expected {{"text": …, "image": path?}}')
    return Row(values["text"], str(folder / values["image"]) if values.get("image") else None)


def check_target(out: Path) -> None:
    """Raises ConfigError unless `out` is a new .safetensors file in a folder that can be written to."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: expected a name that ends in .safetensors, the only format that is written")
    check_new(out)


def extract(
    assistant: Assistant,
    rows: Sequence[Row],
    layers: Sequence[int],
    out: Path,
    *,
    template: str | None = None,
    progress: Progress = no_progress,
) -> None:
    """Writes a tensor "{row}.{layer}" [S, D] for every row and layer, in the model's dtype.

    Each text is a raw prompt, or a user message if `template` is given. If a text contains no image placeholder, the
    image is placed before the text. The file starts with space reserved for the header, which is written last.

    All rows are prepared once before the model runs. Raises PromptError or ImageError with the row number, ConfigError
    if a layer does not exist or `out` exists, or CheckpointError if the file cannot be written. No file is left behind
    after an error.
    """
    row_bytes = len(layers) * _entry_bytes(len(rows))
    room = 64 + len(rows) * row_bytes
    if room > MAX_HEADER_BYTES:
        most = (MAX_HEADER_BYTES - 64) // row_bytes
        advice = f"split the input into parts of at most {counted(most, 'row')}" if most else "write fewer layers"
        raise PromptError(
            f"{counted(len(rows), 'row')} x {counted(len(layers), 'layer')} are too many tensors for one safetensors "
            f"file; {advice}"
        )
    check_target(out)
    n_bytes = _check_rows(assistant, rows, template) * len(set(layers)) * assistant.config.decoder.dim
    with new_file(out, room + n_bytes * assistant.dtype.itemsize) as partial, partial.open("wb") as file:
        file.write(room.to_bytes(8, "little") + b" " * room)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for i, row in enumerate(rows):
            for layer, states in _states(assistant, row, i, layers, template).items():
                data = states.cpu().contiguous().view(torch.uint8).numpy()
                file.write(data.data)
                entry = {"dtype": DTYPE_NAMES[states.dtype], "shape": list(states.shape)}
                header[f"{i}.{layer}"] = {**entry, "data_offsets": [offset, offset + data.nbytes]}
                offset += data.nbytes
            progress(i + 1, len(rows))
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= room
        file.seek(8)
        file.write(text.ljust(room))


def _check_rows(assistant: Assistant, rows: Sequence[Row], template: str | None) -> int:
    """Prepares all rows, so that a bad one is reported before the model runs. Returns the number of tokens."""
    n_tokens = 0
    for i, row in enumerate(rows):
        messages, images = _request(row, template)
        with _naming(i):
            n_tokens += len(assistant.preprocessor.prepare(messages, images=images, template=template).ids)
    return n_tokens


def _entry_bytes(n_rows: int) -> int:
    """Returns the number of bytes to reserve per header entry: offsets need up to 19 digits, dimensions up to 10."""
    return len('"":{"dtype":"BF16","shape":[,],"data_offsets":[,]},') + len(str(n_rows)) + 12 + 2 * 10 + 2 * 19


def _states(
    assistant: Assistant, row: Row, number: int, layers: Sequence[int], template: str | None
) -> dict[int, Tensor]:
    messages, images = _request(row, template)
    with _naming(number):
        return assistant.hidden_states(messages, layers, images=images, template=template)


def _request(row: Row, template: str | None) -> tuple[Messages, list[Picture] | None]:
    """Returns a conversation, or a raw prompt and its images if there is no template."""
    if template:
        return question_about(row.image, row.text), None
    if row.image is None:
        return row.text, []
    return row.text if placeholders.count(row.text) else f"{IMAGE_PLACEHOLDER}\n{row.text}", [row.image]


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Adds the number of the row to an error."""
    try:
        yield
    except (PromptError, ImageError) as error:
        raise type(error)(f"row {number}: {error}") from None
