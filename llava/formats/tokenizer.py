"""Tokenizer files of a checkpoint folder: SentencePiece (`tokenizer.model`), `tokenizer.json`, and their side files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.preprocess.tokenizer import AddedToken, JsonTokenizer, SentencePieceTokenizer, Tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder contains a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def special_names(folder: Path) -> dict[str, str]:
    """The special tokens of a folder: "bos_token" and the like -> text."""
    return _special_names(_read(folder / "tokenizer_config.json"), _read(folder / "special_tokens_map.json"))


def load_tokenizer(
    folder: Path, *, legacy_strip: bool = False, fast: bool = False, more: Mapping[str, int] | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    fast: prefer tokenizer.json, as the processors of transformers do.
    legacy_strip: tokens of added_tokens.json strip the white space next to them, as in transformers up to 4.31, which
        LLaVA v0 and v1.1 were trained with.
    more: special tokens to add to those of the files, with their ids.

    Raises CheckpointError if files are missing or broken.
    """
    model, whole = folder / "tokenizer.model", folder / "tokenizer.json"
    settings = _read(folder / "tokenizer_config.json")
    special = _read(folder / "special_tokens_map.json")
    try:
        names = _special_names(settings, special)
        added = _added_tokens(settings, _read(folder / "added_tokens.json"), set(names.values()), legacy_strip)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: special or added tokens are malformed ({error})") from None
    if whole.is_file() and (fast or not model.is_file()):
        return JsonTokenizer(whole, eos=names["eos_token"], pad=names.get("pad_token"), more=more or {})
    if not model.is_file():
        raise CheckpointError(f"{folder}: no tokenizer.model and no tokenizer.json; add the base model's tokenizer")
    added |= {text: AddedToken(text, id, True, legacy_strip, legacy_strip) for text, id in (more or {}).items()}
    try:
        return _sentencepiece(model.read_bytes(), added, names, settings)
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{model}: not a SentencePiece model ({str(error).splitlines()[0]})") from None


def _sentencepiece(
    model: bytes, added: dict[str, AddedToken], names: dict[str, str], settings: dict[str, Any]
) -> SentencePieceTokenizer:
    from sentencepiece import SentencePieceProcessor

    if not model:
        raise ValueError("the file is empty")
    pieces = SentencePieceProcessor(model_proto=model)
    if not pieces.get_piece_size():
        raise ValueError("it has no pieces")
    for text in names.values():
        id = pieces.piece_to_id(text)
        if text not in added and pieces.id_to_piece(id) == text:
            added[text] = AddedToken(text, id, special=True)
    bos, eos = added.get(names["bos_token"]), added.get(names["eos_token"])
    return SentencePieceTokenizer(
        model,
        added.values(),
        legacy=settings.get("legacy") is not False,
        bos_id=bos.id if bos and settings.get("add_bos_token", True) else None,
        eos_id=eos.id if eos else None,
        pad=names.get("pad_token"),
    )


def _special_names(settings: dict[str, Any], special: dict[str, Any]) -> dict[str, str]:
    """ "bos_token" and the like -> text. Empty strings, as in the v0 files, count as missing."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for source in (special, settings):
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = source.get(key)
            if text := value.get("content") if isinstance(value, dict) else value:
                names[key] = _text(text, key)
    return names


def _added_tokens(
    settings: dict[str, Any], plain: dict[str, int], special: set[str], strip: bool
) -> dict[str, AddedToken]:
    """Added tokens by text, from added_tokens.json (`plain`, ids only) and tokenizer_config.json (with flags)."""
    added = {text: AddedToken(text, _id(id, text), text in special, strip, strip) for text, id in plain.items() if text}
    decoder = settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict) or not all(isinstance(token, dict) for token in decoder.values()):
        raise ValueError("added_tokens_decoder is not an object of tokens")
    for id, token in decoder.items():
        text = _text(token["content"], f"token {id}")
        flags = (True, True) if strip and text in plain else (token.get("lstrip", False), token.get("rstrip", False))
        added[text] = AddedToken(text, _id(id, text), token.get("special", False) or text in special, *flags)
    by_id: dict[int, str] = {}
    for text, token in added.items():
        if (other := by_id.setdefault(token.id, text)) != text:
            raise ValueError(f"{other!r} and {text!r} have the same id {token.id}")
    return added


def _text(value: Any, what: str) -> str:
    """A token's text, checked to be encodable. Raises ValueError, which includes UnicodeEncodeError."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.60}, expected a text")
    value.encode()
    return value


def _id(value: Any, text: str) -> int:
    """A token's id, stored as a number or (as a key) as its digits. Raises ValueError."""
    _text(text, "a token")
    if isinstance(value, bool) or not isinstance(value, int | str) or not 0 <= int(value) < _MAX_ID:
        raise ValueError(f"{text!r:.60} has the id {value!r:.60}")
    return int(value)


_MAX_ID = 2**31


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return values
