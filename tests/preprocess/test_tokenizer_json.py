"""Settings that transformers leaves in tokenizer.json or beside it."""

from pathlib import Path

import pytest
import tokenizers

import llava
from llava.formats.tokenizer import load_tokenizer
from tests import tiny

TEXT = "Once upon a time there was a painter who would only ever paint the sea."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_neox_tokenizer(tmp_path)
    return tmp_path


def test_truncation_and_padding_of_the_last_call_are_ignored(folder: Path) -> None:
    whole = load_tokenizer(folder).encode(TEXT)
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.enable_truncation(5)
    model.enable_padding(length=200)
    model.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode(TEXT) == whole
    assert 5 < len(whole) < 200


def test_added_tokens_that_only_tokenizer_config_contains_are_added(folder: Path) -> None:
    before = load_tokenizer(folder)
    entry = {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    tiny.edit_json(folder / "tokenizer_config.json", added_tokens_decoder={str(before.size): entry})
    after = load_tokenizer(folder)
    assert after.encode("a<|new|>b") == [*before.encode("a"), before.size, *before.encode("b")]
    assert after.size == before.size + 1


def test_an_added_token_that_cannot_get_its_id_is_refused(folder: Path) -> None:
    tiny.write_json(folder / "added_tokens.json", {"<|new|>": 5000})
    with pytest.raises(llava.CheckpointError, match=r"<\|new\|> cannot be added with id 5000"):
        load_tokenizer(folder)
