"""A tokenizer as GGUF's keys: pieces with scores and types, merges, and the ids that mean something."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.checkpoint.files import read_json, reading
from llava.checkpoint.open import Checkpoint
from llava.errors import CheckpointError
from llava.formats.tokenizer import load_tokenizer
from llava.preprocess.tokenizer import SentencePieceTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens, as llama.cpp numbers them
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0


class Vocab(NamedTuple):
    """A row for each id that the model knows."""

    model: str  # `llama`: SentencePiece; `gpt2`: byte-level BPE
    pre: str  # how text is cut before the model sees it
    tokens: list[str]
    types: list[int]
    scores: Sequence[float] = ()  # SentencePiece
    merges: Sequence[str] = ()  # BPE
    unk_id: int | None = None


def read(checkpoint: Checkpoint) -> Vocab:
    """From the tokenizer's files. Raises CheckpointError for a tokenizer that llama.cpp may read in another way."""
    folder, rows = checkpoint.tokenizer_folder, checkpoint.config.decoder.vocab_size
    if (folder / "tokenizer.model").is_file():
        return _sentencepiece(folder / "tokenizer.model", rows)
    return _byte_level(folder / "tokenizer.json", rows)


def _sentencepiece(file: Path, rows: int) -> Vocab:
    from sentencepiece import SentencePieceProcessor

    tokenizer = load_tokenizer(file.parent)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    model = SentencePieceProcessor(model_proto=file.read_bytes())
    tokens, types, scores = _unused(rows), [UNUSED] * rows, [_UNUSED_SCORE] * rows
    for id in range(min(rows, model.get_piece_size())):
        try:
            tokens[id], scores[id] = model.id_to_piece(id), model.get_score(id)
        except UnicodeDecodeError:
            raise CheckpointError(f"{file}: piece {id} is no UTF-8; fetch it again") from None
        kinds = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_unused, UNUSED))
        types[id] = next((kind for test, kind in (*kinds, (model.is_byte, BYTE)) if test(id)), NORMAL)
    for token in tokenizer.added:
        if token.id < rows and types[token.id] != UNKNOWN:
            new = token.id >= model.get_piece_size()
            tokens[token.id], scores[token.id] = token.text, _ADDED_SCORE if new else scores[token.id]
            types[token.id] = CONTROL if token.special else USER_DEFINED
    return Vocab("llama", "default", tokens, types, scores=scores, unk_id=model.unk_id())


def _byte_level(file: Path, rows: int) -> Vocab:
    """GPT-NeoX's tokenizer, as MPT has it."""
    values = read_json(file)
    with reading(file):
        model, before = values["model"], values["pre_tokenizer"] or {}
        if model["type"] != "BPE" or before.get("type") != "ByteLevel" or not before.get("use_regex", True):
            raise CheckpointError(
                f"{file}: is no SentencePiece model and cuts text in a way that llama.cpp may not know; "
                "add the base model's tokenizer.model"
            )
        tokens, types = _unused(rows), [UNUSED] * rows
        for text, id in model["vocab"].items():
            if id < rows:
                tokens[id], types[id] = text, NORMAL
        for token in values["added_tokens"]:
            if token["id"] < rows:
                tokens[token["id"]], types[token["id"]] = (
                    token["content"],
                    CONTROL if token["special"] else USER_DEFINED,
                )
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return Vocab("gpt2", "mpt", tokens, types, merges=merges)


def _unused(rows: int) -> list[str]:
    """Of rows that no token has; names are needed, each another."""
    return [f"[PAD{id}]" for id in range(rows)]


def write(writer: Any, checkpoint: Checkpoint) -> None:
    """The tokenizer's keys."""
    vocab, tokenizer = read(checkpoint), checkpoint.tokenizer
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list([text.encode() for text in vocab.tokens])
    writer.add_token_types(vocab.types)
    if vocab.scores:
        writer.add_token_scores(vocab.scores)
    if vocab.merges:
        writer.add_token_merges(vocab.merges)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)
    held = range(len(vocab.tokens))
    more = next((id for id in checkpoint.config.eos_ids if id != tokenizer.eos_id and id in held), None)  # ends too
    for add, id in (
        (writer.add_bos_token_id, tokenizer.bos_id),
        (writer.add_eos_token_id, tokenizer.eos_id),
        (writer.add_eot_token_id, more),
        (writer.add_unk_token_id, vocab.unk_id),
        (writer.add_pad_token_id, _pad_id(checkpoint.tokenizer_folder, vocab)),
    ):
        if id is not None:
            add(id)


def _pad_id(folder: Path, vocab: Vocab) -> int | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        named = read_json(folder / name).get("pad_token") if (folder / name).is_file() else None
        text = named.get("content") if isinstance(named, dict) else named
        if text in vocab.tokens:
            return vocab.tokens.index(text)
    return None
