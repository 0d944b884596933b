"""A tokenizer as GGUF keys: pieces with scores and types, merges, and the ids of special tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.errors import CheckpointError
from llava.formats.format import Checkpoint
from llava.formats.tokenizer import load_tokenizer
from llava.preprocess.tokenizer import SentencePieceTokenizer
from llava.tensors.files import parsing, read_json, read_json_if_present

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0


class Vocab(NamedTuple):
    """A vocabulary for llama.cpp, with one entry for each vocabulary row of the model."""

    model: str  # `llama`: SentencePiece; `gpt2`: byte-level BPE
    pre: str  # llama.cpp's name for the pre-tokenizer
    tokens: list[str]
    types: list[int]
    scores: Sequence[float] = ()  # SentencePiece only
    merges: Sequence[str] = ()  # BPE only
    unk_id: int | None = None


def read_vocab(checkpoint: Checkpoint) -> Vocab:
    """Reads the tokenizer's files. Raises CheckpointError for a tokenizer that llama.cpp may interpret differently."""
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
            raise CheckpointError(f"{file}: piece {id} is not UTF-8; download the file again") from None
        tests = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_unused, UNUSED))
        types[id] = next((type for test, type in (*tests, (model.is_byte, BYTE)) if test(id)), NORMAL)
    for token in tokenizer.added:
        if token.id < rows and types[token.id] != UNKNOWN:
            new = token.id >= model.get_piece_size()
            tokens[token.id], scores[token.id] = token.text, _ADDED_SCORE if new else scores[token.id]
            types[token.id] = CONTROL if token.special else USER_DEFINED
    return Vocab("llama", "default", tokens, types, scores=scores, unk_id=model.unk_id())


def _byte_level(file: Path, rows: int) -> Vocab:
    """Reads the GPT-NeoX tokenizer that MPT uses. Raises CheckpointError if it is not byte-level BPE."""
    values = read_json(file)
    with parsing(file):
        model, before = values["model"], values["pre_tokenizer"] or {}
        if model["type"] != "BPE" or before.get("type") != "ByteLevel" or not before.get("use_regex", True):
            raise CheckpointError(
                f"{file}: llama.cpp may not support this tokenizer's pre-tokenizer; "
                "put the base model's tokenizer.model into the folder"
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
    """Returns a distinct placeholder for each row. Callers overwrite the rows that have a token."""
    return [f"[PAD{id}]" for id in range(rows)]


def write_vocab(writer: Any, checkpoint: Checkpoint) -> None:
    """Adds the tokenizer's keys to a GGUFWriter."""
    vocab, tokenizer = read_vocab(checkpoint), checkpoint.tokenizer
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
    ids = range(len(vocab.tokens))
    end_of_turn = next((id for id in checkpoint.config.eos_ids if id != tokenizer.eos_id and id in ids), None)
    for add, id in (
        (writer.add_bos_token_id, tokenizer.bos_id),
        (writer.add_eos_token_id, tokenizer.eos_id),
        (writer.add_eot_token_id, end_of_turn),
        (writer.add_unk_token_id, vocab.unk_id),
        (writer.add_pad_token_id, _pad_id(checkpoint.tokenizer_folder, vocab)),
    ):
        if id is not None:
            add(id)


def _pad_id(folder: Path, vocab: Vocab) -> int | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        named = read_json_if_present(folder / name).get("pad_token")
        text = named.get("content") if isinstance(named, dict) else named
        if text in vocab.tokens:
            return vocab.tokens.index(text)
    return None
