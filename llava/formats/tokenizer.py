"""Reads and writes the tokenizer files of a checkpoint.

These are `tokenizer.model` (SentencePiece) or `tokenizer.json`, and the accompanying JSON files. With the files written
here, transformers produces the same token ids as this package.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.preprocess.tokenizer import AddedToken, JsonTokenizer, SentencePieceTokenizer, Tokenizer
from llava.tensors.files import read_json, read_json_if_present, refuse_lfs_pointer
from llava.tensors.writer import write_json

_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


# ----------------------------------------------------------------------------------------------------------- reading


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a checkpoint folder contains a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def special_names(folder: Path) -> dict[str, str]:
    """Returns the special tokens of a checkpoint folder as a map from names such as "bos_token" to text."""
    return _special_names(
        read_json_if_present(folder / "tokenizer_config.json"), read_json_if_present(folder / "special_tokens_map.json")
    )


def stored_chat_template(folder: Path) -> str | None:
    """Returns the Jinja text of a folder's chat template, from any of the files in which transformers stores it."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if isinstance(text := read_json_if_present(folder / name).get("chat_template"), str):
            return text
    return None


def load_tokenizer(
    folder: Path, *, legacy_strip: bool = False, fast: bool = False, more: Mapping[str, int] | None = None
) -> Tokenizer:
    """Loads the tokenizer of a checkpoint folder.

    fast: prefer tokenizer.json to tokenizer.model, as transformers processors do.
    legacy_strip: whether tokens in added_tokens.json strip adjacent white space, as in transformers up to 4.31;
        LLaVA v0 and v1.1 were trained this way.
    more: additional special tokens and their ids.

    Raises CheckpointError if files are missing or malformed.
    """
    model, whole = folder / "tokenizer.model", folder / "tokenizer.json"
    for file in (model, whole):
        refuse_lfs_pointer(file)
    settings = read_json_if_present(folder / "tokenizer_config.json")
    special = read_json_if_present(folder / "special_tokens_map.json")
    try:
        names = _special_names(settings, special)
        added = _added_tokens(
            settings, read_json_if_present(folder / "added_tokens.json"), set(names.values()), legacy_strip
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: special or added tokens are malformed ({error})") from None
    added |= {text: AddedToken(text, id, True, legacy_strip, legacy_strip) for text, id in (more or {}).items()}
    if whole.is_file() and (fast or not model.is_file()):
        return JsonTokenizer(whole, eos=names["eos_token"], pad=names.get("pad_token"), more=added.values())
    if not model.is_file():
        raise CheckpointError(f"{folder}: has no tokenizer.model or tokenizer.json; add the base model's tokenizer")
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
        raise ValueError("the vocabulary is empty")
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
    """Maps names such as bos_token to their text. Empty strings, as in the v0 files, are treated as missing."""
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
    """Merges the tokens in added_tokens.json (`plain`) and tokenizer_config.json (`settings`), keyed by text."""
    added = {text: AddedToken(text, _id(id, text), text in special, strip, strip) for text, id in plain.items() if text}
    decoder = settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict) or not all(isinstance(token, dict) for token in decoder.values()):
        raise ValueError("added_tokens_decoder is not an object that maps ids to tokens")
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
    """Returns a token's text. Raises ValueError if it is not a string or cannot be encoded as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.60}; expected a string")
    value.encode()
    return value


def _id(value: Any, text: str) -> int:
    """Parses a token id, which is a number or, in JSON keys, a string of digits. Raises ValueError if it is invalid."""
    _text(text, "a token")
    if isinstance(value, bool) or not isinstance(value, int | str) or not 0 <= int(value) < _MAX_ID:
        raise ValueError(f"token {text!r:.60} has an invalid id: {value!r:.60}")
    return int(value)


_MAX_ID = 2**31


# ----------------------------------------------------------------------------------------------------------- writing


def copy_tokenizer(source: Path, target: Path, new_tokens: Mapping[str, int] | None = None) -> None:
    """Copies the tokenizer files and generation_config.json, which may list additional EOS ids.

    new_tokens: special tokens to add to the copied files, and their ids.
    """
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if new_tokens and (target / "tokenizer.model").is_file():
        update_json(target / "added_tokens.json", new_tokens)
    if new_tokens and (target / "tokenizer.json").is_file():
        fast = read_json(target / "tokenizer.json")
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        fast["added_tokens"] += [
            {"id": id, "content": text, **flags, "special": True} for text, id in new_tokens.items()
        ]
        write_json(target / "tokenizer.json", fast)
    complete_tokenizer(target)


def update_json(file: Path, values: Mapping[str, object]) -> None:
    """Sets keys in a JSON file, creating the file if it does not exist."""
    write_json(file, read_json_if_present(file) | dict(values))


def complete_tokenizer(folder: Path) -> None:
    """Completes the files of a SentencePiece tokenizer so that transformers (4.34 and later) reads them correctly.

    Without tokenizer_config.json, transformers adds no BOS token; if that file has an `added_tokens_decoder`, even an
    empty one, transformers does not read added_tokens.json.
    """
    if not (folder / "tokenizer.model").is_file():
        return
    names, file = special_names(folder), folder / "tokenizer_config.json"
    if not file.is_file():
        special = {key: text for key, text in names.items() if key != "pad_token"}
        flags = {"add_bos_token": True, "add_eos_token": False, "legacy": True, "clean_up_tokenization_spaces": False}
        write_json(file, {"tokenizer_class": "LlamaTokenizer", **flags, **special})
    settings = read_json(file)
    if (found := settings.pop("added_tokens_decoder", None)) is None:
        return
    decoder = dict(found)
    for text, id in read_json_if_present(folder / "added_tokens.json").items():
        is_special = text in names.values()
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": not is_special}
        decoder.setdefault(str(id), {"content": text, **flags, "special": is_special})
    if not decoder or decoder != found:
        write_json(file, settings | ({"added_tokens_decoder": decoder} if decoder else {}))
