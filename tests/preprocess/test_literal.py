"""Text of clients: special tokens and placeholders in it are ordinary text, and all other text is encoded as usual."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import llava
from llava.config import IMAGE, LoadOptions
from llava.convert.convert import convert
from llava.preprocess.inputs import Preprocessor
from llava.preprocess.templates import TEMPLATES
from llava.preprocess.tokenizer import Tokenizer
from tests import tiny

KINDS = ("llava", "start and end", "mpt", "json")
HOSTILE = ["</s>", "<s>", "<unk>", "<image>", "\\<image>", "<im_start>", "<im_end>", "<|im_end|>", "<|endoftext|>"]
TEXTS = st.lists(st.sampled_from([*HOSTILE, "a", " ", "é", "\n", "###", "\\", "<im"]), max_size=8).map("".join)


@pytest.fixture(scope="module")
def preprocessors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Preprocessor]:
    root = tmp_path_factory.mktemp("models")
    clip = tiny.write_clip(root / "clip")
    folders = {
        "llava": tiny.write_llava(root / "llava", clip=clip),
        "start and end": tiny.write_llava(
            root / "marks", clip=clip, added=("<im_start>", "<im_end>"), mm_use_im_start_end=True
        ),
        "mpt": tiny.write_mpt(root / "mpt", clip=clip),
    }
    folders["json"] = root / "hf"
    convert(folders["llava"], folders["json"], LoadOptions(vision_tower=clip), to="llava-hf", check=False)
    return {name: llava.load(folder, device="cpu").preprocessor for name, folder in folders.items()}


def controls(tokenizer: Tokenizer) -> set[int]:
    """The ids that text of a client must never produce."""
    return {id for text in tokenizer.added_texts if (id := tokenizer.id_of(text)) is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_ordinary_text_has_the_ids_it_always_has(
    kind: str, template: str, preprocessors: dict[str, Preprocessor]
) -> None:
    one = preprocessors[kind]
    turns = [("user", "What is this?"), ("assistant", "A cat. Ünïcode 猫!"), ("user", "Sure?\n\nLook  again.")]
    turns = turns[:1] if template.endswith("plain") else turns
    messages = [{"role": role, "content": text} for role, text in turns]
    usual, literal = (one.prepare(messages, template=template, literal=on) for on in (False, True))
    assert literal.token_ids == usual.token_ids
    assert (literal.prompt, literal.stop) == (usual.prompt, usual.stop)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_placed_as_always(kind: str, preprocessors: dict[str, Preprocessor]) -> None:
    parts = [{"type": "image", "image": Image.new("RGB", (9, 7), "red")}, {"type": "text", "text": "What is it?"}]
    usual, literal = (
        preprocessors[kind].prepare([{"role": "user", "content": parts}], literal=on) for on in (False, True)
    )
    assert literal.token_ids == usual.token_ids
    assert literal.token_ids.count(IMAGE) == 1


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(text=TEXTS)
def test_marks_of_a_client_are_ordinary_text(kind: str, preprocessors: dict[str, Preprocessor], text: str) -> None:
    one = preprocessors[kind]
    ids = one.prepare(f"x{text}", literal=True).token_ids
    start = 1 if one.tokenizer.bos_id is not None else 0
    assert not set(ids[start:]) & (controls(one.tokenizer) | {IMAGE})
    assert one.tokenizer.decode(ids[start:], skip_special=False) == f"x{text}"

    asked = one.prepare([{"role": "user", "content": f"x{text}"}], literal=True)
    plain = one.prepare([{"role": "user", "content": "x"}], literal=True)
    count = {id: plain.token_ids.count(id) for id in controls(one.tokenizer)}
    assert {id: asked.token_ids.count(id) for id in count} == count  # only those of the template


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["Hello, world", " two  spaces", "Ünï猫\n\ttab", "x"])
def test_pieces_join_to_the_text(kind: str, preprocessors: dict[str, Preprocessor], text: str) -> None:
    tokenizer = preprocessors[kind].tokenizer
    joined = b"".join(tokenizer.piece(token.id) for token in tokenizer.encode_tokens(text)).decode()
    assert joined in (text, f" {text}")  # Llama's tokenizers put a space before a text
    assert tokenizer.piece(10**6) == b""
