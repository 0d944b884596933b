"""The vocabulary rows that llava-hf adds to a LLaVA model: <image>, <pad> and padding to a multiple of 64.

The rows are untrained and never looked up. Converting to llava, llama or gpt-fast removes them from the vocabulary
tables; llava also saves them in a separate file, so that converting back to llava-hf reproduces the original tables.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.formats.format import Checkpoint
from llava.formats.tokenizer import complete_tokenizer, copy_tokenizer
from llava.tensors.files import Weights, read_json
from llava.tensors.lazy import FromFile, LazyTensor, MeanRows, Slice, WithRows
from llava.tensors.writer import no_progress, output, write_json, write_safetensors

VOCAB_TABLES = ("decoder.embed.weight", "decoder.head.weight")  # tables with one row per token
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
VOCAB_KEY = "llava_vocab_size"  # our own config.json key: number of vocabulary rows, excluding the added rows
_FILE = "llava_hf_rows.safetensors"
_FORMATS = ("llava-hf", "native", "lora", "projector")  # may contain the added rows, the last two from their base


def without_added_rows(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint without the added rows."""
    if checkpoint.format not in _FORMATS:
        return checkpoint
    recorded = checkpoint.source_config.get(VOCAB_KEY)
    rows = recorded if isinstance(recorded, int) else checkpoint.tokenizer.id_of(IMAGE_TOKEN)
    if rows is None or not 0 < rows <= checkpoint.config.decoder.vocab_size:
        return checkpoint
    cut = {name: Slice(checkpoint.tensors[name], 0, rows) for name in VOCAB_TABLES if name in checkpoint.tensors}
    config = replace(checkpoint.config, decoder=replace(checkpoint.config.decoder, vocab_size=rows))
    return replace(checkpoint, tensors={**checkpoint.tensors, **cut}, config=config)


def write_added_rows(source: Checkpoint, folder: Path) -> None:
    """Writes the rows removed by `without_added_rows` to a separate file in `folder`."""
    rows = without_added_rows(source).config.decoder.vocab_size
    tables = {name: source.tensors[name] for name in VOCAB_TABLES if name in source.tensors}
    added = [
        output(name, Slice(table, rows, table.shape[0])) for name, table in tables.items() if table.shape[0] > rows
    ]
    if added:
        write_safetensors(folder / _FILE, added, lambda n: no_progress(n, n))


def with_added_rows(name: str, table: LazyTensor, n_rows: int, folder: Path) -> LazyTensor:
    """Extends a table to `n_rows` with the rows saved in `folder`, or copies of the mean row if no saved rows fit."""
    first = table.shape[0]
    if (n_new := n_rows - first) <= 0:
        return table
    kept = folder / _FILE
    weights = Weights([kept] if kept.is_file() else [])
    if name in weights.headers and weights.headers[name].shape == (n_new, *table.shape[1:]):
        return WithRows(table, FromFile(weights, name), first)
    return WithRows(table, MeanRows(table, n_new), first)


def copy_plain_tokenizer(source: Checkpoint, folder: Path) -> None:
    """Copies the tokenizer files, omitting <image> and <pad> if these were added to a SentencePiece model."""
    copy_tokenizer(source.tokenizer_folder, folder, source.new_tokens)
    has_rows = source.format in _FORMATS and source.tokenizer.id_of(IMAGE_TOKEN) is not None
    if not has_rows or not (folder / "tokenizer.model").is_file():
        return
    added = {IMAGE_TOKEN, PAD_TOKEN}
    (folder / "tokenizer.json").unlink(missing_ok=True)
    if (file := folder / "added_tokens.json").is_file():
        write_json(file, {text: id for text, id in read_json(file).items() if text not in added})
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (file := folder / name).is_file():
            continue
        settings = {key: value for key, value in read_json(file).items() if not _names_token(value, added)}
        if decoder := settings.get("added_tokens_decoder"):
            settings["added_tokens_decoder"] = {id: t for id, t in decoder.items() if t["content"] not in added}
        write_json(file, settings)
    complete_tokenizer(folder)


def _names_token(value: Any, texts: set[str]) -> bool:
    """Whether a tokenizer setting specifies one of the tokens in `texts`, as a string or as an object with flags."""
    text = value.get("content") if isinstance(value, dict) else value
    return isinstance(text, str) and text in texts
