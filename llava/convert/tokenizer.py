"""A tokenizer's files, written so that transformers makes the same ids of them as we do."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from llava.checkpoint.files import read_json
from llava.checkpoint.write import write_json
from llava.formats.tokenizer import special_names

_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


def copy_tokenizer(source: Path, target: Path, more: Mapping[str, int] | None = None) -> None:
    """The files of a tokenizer, and generation_config.json, which knows further ends of an answer.

    more: special tokens beyond those of the files, and their ids.
    """
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if more and (target / "tokenizer.model").is_file():
        extend(target / "added_tokens.json", more)
    if more and (target / "tokenizer.json").is_file():
        fast = read_json(target / "tokenizer.json")
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        fast["added_tokens"] += [{"id": id, "content": text, **flags, "special": True} for text, id in more.items()]
        write_json(target / "tokenizer.json", fast)
    complete_tokenizer(target)


def extend(file: Path, values: Mapping[str, object]) -> None:
    """Keys of a JSON file, which is made if it is not there."""
    write_json(file, (read_json(file) if file.is_file() else {}) | dict(values))


def complete_tokenizer(folder: Path) -> None:
    """What transformers (4.34 and later) asks of the files of a SentencePiece tokenizer, and we do not.

    Without tokenizer_config.json it puts no BOS in front; beside an `added_tokens_decoder`, an empty one too, it does
    not read added_tokens.json.
    """
    if not (folder / "tokenizer.model").is_file():
        return
    names, file, plain = special_names(folder), folder / "tokenizer_config.json", folder / "added_tokens.json"
    if not file.is_file():
        special = {key: text for key, text in names.items() if key != "pad_token"}
        flags = {"add_bos_token": True, "add_eos_token": False, "legacy": True, "clean_up_tokenization_spaces": False}
        write_json(file, {"tokenizer_class": "LlamaTokenizer", **flags, **special})
    settings = read_json(file)
    if (found := settings.pop("added_tokens_decoder", None)) is None:
        return
    decoder = dict(found)
    for text, id in (read_json(plain) if plain.is_file() else {}).items():
        is_special = text in names.values()
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": not is_special}
        decoder.setdefault(str(id), {"content": text, **flags, "special": is_special})
    if not decoder or decoder != found:
        write_json(file, settings | ({"added_tokens_decoder": decoder} if decoder else {}))
