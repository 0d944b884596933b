"""Placeholders in messages, raw prompts and training samples place images, or are literal text."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.config import IGNORE, IMAGE
from llava.errors import PromptError
from llava.formats.tokenizer import load_tokenizer
from llava.preprocess.conversation import Turn
from llava.preprocess.inputs import ModelInput, Preprocessor
from llava.preprocess.messages import read_messages
from llava.preprocess.tokenizer import JsonTokenizer, Tokenizer
from tests import tiny
from tests.preprocess.test_properties import LLAVA, image_config

PHOTO = Image.new("RGB", (30, 20), "red")
IMAGE_PART = {"type": "image", "image": PHOTO}
QUESTION = "What does the <image> tag mean?"
LITERAL = r"What does the \<image> tag mean?"


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user_text(content: Any) -> str | None:
    return read_messages([{"role": "user", "content": content}]).turns[0].text


PLACED = {
    "one mark": ([IMAGE_PART, text("Look: <image>!")], "Look: <image>!"),
    "two marks": ([IMAGE_PART, IMAGE_PART, text("<image> or <image>?")], "<image> or <image>?"),
    "marks in two parts": ([IMAGE_PART, IMAGE_PART, text("<image>"), text("<image>?")], "<image>\n<image>?"),
    "a mark beside a literal": ([IMAGE_PART, text(r"Is <image> a \<image>?")], r"Is <image> a \<image>?"),
}
IN_FRONT = {
    "no mark": ([IMAGE_PART, text("Look.")], "<image>\nLook."),
    "text first": ([text(QUESTION), IMAGE_PART], f"<image>\n{LITERAL}"),
    "image between texts": ([text("Hi."), IMAGE_PART, text(QUESTION)], f"<image>\nHi.\n{LITERAL}"),
    "one image after": ([IMAGE_PART, text("<image> <image>"), IMAGE_PART], "<image>\n<image>\n\\<image> \\<image>"),
    "too many marks": ([IMAGE_PART, text("<image> <image>")], "<image>\n\\<image> \\<image>"),
    "too few marks": ([IMAGE_PART, IMAGE_PART, text("<image>?")], "<image>\n<image>\n\\<image>?"),
    "escaped": ([IMAGE_PART, text(LITERAL)], f"<image>\n{LITERAL}"),
    "no image": (QUESTION, LITERAL),
    "no image, escaped": (LITERAL, LITERAL),
}


@pytest.mark.parametrize("name", PLACED)
def test_marks_place_images_if_all_images_stand_before_and_match_in_number(name: str) -> None:
    content, wanted = PLACED[name]
    assert user_text(content) == wanted


@pytest.mark.parametrize("name", IN_FRONT)
def test_marks_are_literal_otherwise_and_the_images_come_first(name: str) -> None:
    content, wanted = IN_FRONT[name]
    assert user_text(content) == wanted


def test_marks_of_system_and_assistant_are_literal_and_have_no_start_and_end() -> None:
    messages = [{"role": role, "content": QUESTION} for role in ("system", "user", "assistant")]
    read = read_messages(messages, enclosing=("<im_start>", "<im_end>"))
    assert read.system == LITERAL
    assert [turn.text for turn in read.turns] == [LITERAL, LITERAL]


def test_start_and_end_enclose_placeholders_only() -> None:
    messages = [{"role": "user", "content": [IMAGE_PART, text(r"<image> \<image>")]}]
    (turn, _) = read_messages(messages, enclosing=("<im_start>", "<im_end>")).turns
    assert turn.text == r"<im_start><image><im_end> \<image>"


# ------------------------------------------------------------------------------------------------ ids

FORMS = ["plain", "added token", "tokenizer.json", "tokenizer.json with token"]


def as_json(folder: Path, *special: str) -> Tokenizer:
    """A byte-level BPE tokenizer of the tokenizers library. Its special tokens come after the vocabulary."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([*tiny.TEXT.splitlines(), "an <image> tag"] * 3, trainer)
    model.add_special_tokens([*special, "<end>"])
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    return JsonTokenizer(folder / "tokenizer.json", eos="<end>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {
        "plain": load_tokenizer(tiny.write_tokenizer(folder / "plain")),
        "added token": load_tokenizer(tiny.write_tokenizer(folder / "added", added=("<image>", "<pad>"))),
        "tokenizer.json": as_json(folder / "json"),
        "tokenizer.json with token": as_json(folder / "token", "<image>"),
    }
    return made.__getitem__


def preprocessor(tokenizer: Tokenizer, mode: str = "original") -> Preprocessor:
    config = replace(LLAVA, image=image_config(28, aspect="square", mode=mode))
    return Preprocessor(config, tokenizer, template="vicuna_v1")


def own_id(tokenizer: Tokenizer) -> int | None:
    return tokenizer.id_of("<image>")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["original", "hf"])
def test_literal_marks_are_ordinary_text_for_every_tokenizer(
    form: str, mode: str, tokenizer: Callable[[str], Tokenizer]
) -> None:
    ours = tokenizer(form)
    prepared = preprocessor(ours, mode).prepare([{"role": "user", "content": [text(QUESTION), IMAGE_PART]}])
    assert prepared.prompt.endswith(f"USER: <image>\n{LITERAL} ASSISTANT:")
    assert prepared.token_ids.count(IMAGE) == 1
    assert own_id(ours) not in prepared.token_ids
    tail = prepared.token_ids[prepared.token_ids.index(IMAGE) + 1 :]
    assert ours.decode(tail).strip() == f"{QUESTION} ASSISTANT:"


@pytest.mark.parametrize(("form", "plain"), [("added token", "plain"), ("tokenizer.json with token", "tokenizer.json")])
@pytest.mark.parametrize("prompt", [LITERAL, rf"<s>{LITERAL}</s> é", rf"\<image>\<image> {LITERAL}<end> x"])
def test_literal_marks_have_the_ids_of_a_tokenizer_without_the_token(
    form: str, plain: str, prompt: str, tokenizer: Callable[[str], Tokenizer]
) -> None:
    with_token, without = (preprocessor(tokenizer(name)).prepare(prompt).token_ids for name in (form, plain))
    ends = {tokenizer(name).id_of("<end>"): -1 for name in (form, plain)}  # the only token whose id differs
    assert [ends.get(id, id) for id in with_token] == [ends.get(id, id) for id in without]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["original", "hf"])
def test_a_literal_mark_does_not_change_the_ids_of_other_text(
    form: str, mode: str, tokenizer: Callable[[str], Tokenizer]
) -> None:
    ready = preprocessor(tokenizer(form), mode)
    without = ready.prepare("One <image>\nTwo</s> three", images=[PHOTO]).token_ids
    with_literal = ready.prepare("One <image>\nTwo</s> three\\<image>", images=[PHOTO]).token_ids
    assert with_literal[: len(without)] == without


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(words=st.lists(st.sampled_from(["<image>", r"\<image>", "\\", "a", " ", "\n", "é"]), max_size=8).map("".join),
       n_images=st.integers(0, 2), first=st.booleans())  # fmt: skip
def test_a_rendered_prompt_given_raw_has_the_same_ids(
    form: str, words: str, n_images: int, first: bool, tokenizer: Callable[[str], Tokenizer]
) -> None:
    ready = preprocessor(tokenizer(form))
    images = [IMAGE_PART] * n_images
    content = [*images, text(words)] if first else [text(words), *images]
    prepared = ready.prepare([{"role": "user", "content": content}])
    assert prepared.token_ids.count(IMAGE) == n_images
    assert ready.prepare(prepared.prompt, images=[PHOTO] * n_images).token_ids == prepared.token_ids


def test_the_stand_in_of_the_placeholder_never_becomes_an_image(tokenizer: Callable[[str], Tokenizer]) -> None:
    ready = preprocessor(tokenizer("added token"), "hf")
    with pytest.raises(PromptError, match=r"found 2 <image> placeholders in a prompt with 1 image"):
        ready.prepare("\\<image> <image> \ufdd0image\ufdd0", images=[PHOTO])


def test_marks_of_a_raw_prompt_need_images_and_the_error_names_the_escape(
    tokenizer: Callable[[str], Tokenizer],
) -> None:
    ready = preprocessor(tokenizer("plain"))
    with pytest.raises(PromptError, match=r"escape it as \\<image> where it is literal text"):
        ready.prepare(QUESTION)
    assert tokenizer("plain").decode(ready.prepare(LITERAL).token_ids) == QUESTION


# ------------------------------------------------------------------------------------------------ training


def trained_text(input: ModelInput, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([label for label in input.labels.tolist() if label != IGNORE])


@pytest.mark.parametrize("form", FORMS)
def test_literal_marks_in_training_data_are_text_with_exact_labels(
    form: str, tokenizer: Callable[[str], Tokenizer]
) -> None:
    ours = tokenizer(form)
    turns = [Turn("user", f"{LITERAL}\n<image>"), Turn("assistant", r"It is \<image>, é.")]
    input = preprocessor(ours).prepare_training(turns, [PHOTO], max_length=500)
    assert f"USER: <image>\n{LITERAL} ASSISTANT: " in input.prompt
    assert trained_text(input, ours).strip().removesuffix("</s>") == "It is <image>, é."
    assert int((input.ids == IMAGE).sum()) == LLAVA.vision.n_features  # type: ignore[union-attr]


def test_a_sample_with_a_literal_mark_and_no_image_is_text_only(tokenizer: Callable[[str], Tokenizer]) -> None:
    ready = preprocessor(tokenizer("plain"))
    turns = [Turn("user", LITERAL), Turn("assistant", "A place.")]
    assert ready.prepare_training(turns, [], max_length=500).pixels is None
    with pytest.raises(PromptError, match=r"1 <image> placeholder and 0 images.*\\<image>"):
        ready.prepare_training([Turn("user", QUESTION), turns[1]], [], max_length=500)


def test_a_mark_that_removing_another_would_create_stays_text(tokenizer: Callable[[str], Tokenizer]) -> None:
    turns = [Turn("user", "<ima<image>ge>"), Turn("assistant", "Yes.")]
    input = preprocessor(tokenizer("plain")).prepare_training(turns, [PHOTO], max_length=500)
    assert "USER: <image>\n\\<image> ASSISTANT" in input.prompt
    assert input.pixels is not None
    assert torch.equal(input.pixels, preprocessor(tokenizer("plain")).prepare("<image>", images=[PHOTO]).pixels)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "What is this?", "images": ["a.png"]},
        {"role": "user", "content": "What is this?", "image": "a.png"},
        {"role": "user", "content": [{"type": "text", "text": "What is this?", "image": "a.png"}]},
    ],
)
def test_a_key_that_is_not_read_is_refused_instead_of_dropping_its_picture(message: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=r"the key 'images?' is not read"):
        read_messages([message])


def test_empty_keys_of_a_reply_of_openai_are_allowed() -> None:
    reply = {"role": "assistant", "content": "A pier.", "refusal": None, "annotations": [], "tool_calls": None}
    found = read_messages([{"role": "user", "content": "What is this?"}, reply])
    assert [turn.text for turn in found.turns] == ["What is this?", "A pier."]
