"""transformers reads the tokenizer files that conversions and merges write, and assigns the same ids as we do."""

import json
from pathlib import Path

import pytest

from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.convert.merge import merge_lora
from tests import tiny

transformers = pytest.importorskip("transformers")

TEXT = "Once upon a time"
CHATML = ("<|startoftext|>", "<|im_end|>", "<|im_start|>")
START_END = ("<im_start>", "<im_end>")
BASES_OWN = {  # as in bases saved by transformers 4.34 or newer
    str(id): {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
              "special": True}
    for id, text in enumerate(("<unk>", "<s>", "</s>"))
}  # fmt: skip


def assert_ids_are_ours(folder: Path, tokens: tuple[str, ...]) -> None:
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(folder),
        open_checkpoint(folder, LoadOptions(vision=False)).tokenizer,
    )
    assert theirs(TEXT).input_ids == ours.encode(TEXT)
    assert {text: theirs.convert_tokens_to_ids(text) for text in tokens} == {text: ours.id_of(text) for text in tokens}
    assert theirs.eos_token_id == ours.eos_id
    assert len(theirs) == ours.size


def with_decoder(folder: Path) -> Path:
    tiny.edit_json(folder / "tokenizer_config.json", added_tokens_decoder=BASES_OWN)
    return folder


@pytest.mark.parametrize("to", ["native", "llava", "llama", "llava-hf"])
@pytest.mark.parametrize("decoder", [False, True], ids=["plain", "decoder"])
def test_added_tokens_keep_their_ids(to: str, decoder: bool, clip: Path, tmp_path: Path) -> None:
    tokens = ("[PAD]", "<im_patch>")
    source = tiny.write_llava(tmp_path / "source", clip=clip, added=tokens)
    convert(with_decoder(source) if decoder else source, tmp_path / to, to=to)
    if to == "native":  # transformers cannot read a native config.json
        (tmp_path / to / "config.json").write_text(json.dumps({"model_type": "llama"}))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / to)
        assert [theirs.convert_tokens_to_ids(text) for text in tokens] == [512, 513]
        return
    assert_ids_are_ours(tmp_path / to, (*tokens, "<image>", "<pad>") if to == "llava-hf" else tokens)
    if to == "llava-hf":
        settings = json.loads((tmp_path / to / "config.json").read_text())
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / to)
        assert theirs.convert_tokens_to_ids("<image>") == settings["image_token_index"] == 514


@pytest.mark.parametrize("back", ["llava", "llama"])
def test_an_end_of_text_that_was_added_survives_llava_hf_and_the_way_back(
    back: str, clip: Path, tmp_path: Path
) -> None:
    source = tiny.write_llava(tmp_path / "source", clip=clip, added=CHATML)
    tiny.write_tokenizer(source, added=CHATML, eos="<|im_end|>", add_bos=False)
    convert(source, tmp_path / "hf", to="llava-hf")
    assert_ids_are_ours(tmp_path / "hf", (*CHATML, "<image>", "<pad>"))
    convert(tmp_path / "hf", tmp_path / "back", to=back)
    assert_ids_are_ours(tmp_path / "back", CHATML)


@pytest.mark.parametrize("to", ["llava", "llama"])
def test_tokens_of_a_projector_are_written(to: str, clip: Path, tmp_path: Path) -> None:
    base = with_decoder(tiny.write_llama(tmp_path / "base"))
    tiny.write_projector(tmp_path / "projector", clip=clip, start_end=True, mm_projector_type="linear")
    (lone := tmp_path / "x.bin").write_bytes((tmp_path / "projector" / "mm_projector.bin").read_bytes())
    convert(lone, tmp_path / to, LoadOptions(base=base, vision_tower=clip), to=to)
    assert_ids_are_ours(tmp_path / to, START_END)


@pytest.mark.parametrize("to", ["llava", "llama", "llava-hf"])
def test_a_base_in_metas_format_gets_its_start_of_text(to: str, clip: Path, tmp_path: Path) -> None:
    base = tiny.write_meta(tmp_path / "meta" / "7B")
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    convert(lora, tmp_path / to, LoadOptions(base=base), to=to)
    assert_ids_are_ours(tmp_path / to, ("<image>",) if to == "llava-hf" else ())


def test_a_lora_merged_on_a_base_in_metas_format_has_it_too(clip: Path, tmp_path: Path) -> None:
    base = tiny.write_meta(tmp_path / "meta" / "7B")
    merge_lora(base, tmp_path / "merged", tiny.write_lora(tmp_path / "lora", clip=clip))
    assert_ids_are_ours(tmp_path / "merged", ())
