"""A tokenizer's files: written so that transformers produces the same ids from them as we do."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from llava.preprocess.tokenizer import special_names
from llava.tensors.files import read_json, read_json_if_present
from llava.tensors.writer import write_json

_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


def copy_tokenizer(source: Path, target: Path, new_tokens: Mapping[str, int] | None = None) -> None:
    """Copies a tokenizer's files, and generation_config.json, which may list further end-of-answer ids.

    new_tokens: special tokens to add to those files, and their ids.
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
    """Sets keys of a JSON file, which is created if it does not exist."""
    write_json(file, read_json_if_present(file) | dict(values))


def complete_tokenizer(folder: Path) -> None:
    """Adds what transformers (4.34 and later) needs in the files of a SentencePiece tokenizer and we do not.

    Without tokenizer_config.json it adds no BOS; if that file has an `added_tokens_decoder`, even an empty one, it does
    not read added_tokens.json.
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
