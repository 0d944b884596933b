"""llava-tiny gives the same answers from every published format."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor

import llava
from examples.tiny import formats
from examples.tiny.formats import FORMS
from llava.assistant import LLAVA_TINY, Assistant, question_about
from tests.conftest import PROJECT

PICTURES = sorted((PROJECT / "examples" / "pictures").glob("*.png"))
QUESTIONS = ("What is there in the picture?", "What does the text say?", "Is there a crab in the picture?")
TEXT_QUESTIONS = ("Name three animals.", "What is a penguin?", "Is a carrot a fruit?")
ROUNDED = 2e-2  # tolerance for logits of about 25 if the weights were rounded to float16 once more

Asked = tuple[Path | None, str]
SEEING: list[Asked] = [(picture, question) for picture in PICTURES for question in QUESTIONS]
READING: list[Asked] = [(None, question) for question in TEXT_QUESTIONS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in every format. Tests that change files work on a copy."""
    out = tmp_path_factory.mktemp("zoo") / "forms"
    formats.write(LLAVA_TINY, out)
    return out


@pytest.fixture(scope="module")
def shipped() -> Assistant:
    return llava.load(LLAVA_TINY, device="cpu")


def loaded(folder: Path, name: str, **options: Any) -> Assistant:
    return FORMS[name].load(folder / name, device="cpu", **options)


def answers(assistant: Assistant, asked: list[Asked]) -> list[str]:
    messages = [question_about(picture, question) for picture, question in asked]
    return [reply.text for reply in assistant.generate_batch(messages, temperature=0.0, max_new_tokens=40)]


def logits(assistant: Assistant, asked: list[Asked]) -> Tensor:
    """The logits of all prompts, [S, V]."""
    return torch.cat([assistant.logits(question_about(picture, question)) for picture, question in asked])


@pytest.fixture(scope="module")
def expected(shipped: Assistant) -> dict[Asked, str]:
    asked = SEEING + READING
    return dict(zip(asked, answers(shipped, asked), strict=True))


def asked_of(name: str) -> list[Asked]:
    return SEEING + READING if FORMS[name].sees else READING


def test_the_answers_depend_on_the_pictures_and_are_correct(expected: dict[Asked, str]) -> None:
    """Otherwise, agreement between the formats would mean little."""
    said = {(picture.stem, question): expected[picture, question] for picture, question in SEEING if picture}
    assert len(PICTURES) == 3
    assert "crab" in said["beach", QUESTIONS[0]]
    assert "SUMMER" in said["beach", QUESTIONS[1]]
    assert "MENU" in said["kitchen", QUESTIONS[1]]
    assert "ZOO" in said["zoo", QUESTIONS[1]]
    assert [said[name, QUESTIONS[2]].split(",")[0] for name in ("beach", "kitchen", "zoo")] == ["Yes", "No", "No"]


@pytest.mark.parametrize("name", FORMS)
def test_every_format_is_the_same_model(
    folders: Path, shipped: Assistant, expected: dict[Asked, str], name: str
) -> None:
    assistant, asked = loaded(folders, name), asked_of(name)
    assert answers(assistant, asked) == [expected[item] for item in asked]
    assert (assistant.model.vision is not None) == FORMS[name].sees
    ours, theirs = logits(shipped, asked[::3]), logits(assistant, asked[::3])
    assert (theirs.shape[1] > ours.shape[1]) == FORMS[name].lengthened
    difference = (theirs[:, : ours.shape[1]] - ours).abs().max().item()
    assert difference <= (1e-5 if FORMS[name].exact else ROUNDED)
    if FORMS[name].exact:
        weights = shipped.model.state_dict()
        found = {key: tensor[: len(weights[key])] for key, tensor in assistant.model.state_dict().items()}
        assert [key for key, tensor in found.items() if not tensor.equal(weights[key])] == []


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.sees])
def test_every_multimodal_format_records_the_template_and_the_tower(folders: Path, name: str) -> None:
    """Only a base has to be given. llava-safetensors names a tower whose weights it does not use."""
    base = {"base": folders / folder} if (folder := FORMS[name].base) else {}
    assistant = llava.load(folders / name, device="cpu", **base)
    assert assistant.config.template == "vicuna_v1"
    shipped = llava.load(LLAVA_TINY, device="cpu").config
    if FORMS[name].lengthened:
        assert assistant.config.decoder == replace(shipped.decoder, vocab_size=assistant.config.decoder.vocab_size)
        assert assistant.config.image == shipped.image
    else:
        assert assistant.config == shipped


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("lora", {"base": "llama"}),
        ("delta", {"base": "llama"}),
        ("projector", {"base": "llama-before-lora"}),
        ("projector", {"base": "llama-before-delta"}),
        ("llava-bin", {"vision_tower": "clip-before"}),
    ],
)
def test_the_bases_and_towers_are_needed(
    folders: Path, expected: dict[Asked, str], name: str, wrong: dict[str, str]
) -> None:
    """A base that gives the same answers on its own would prove nothing."""
    other = loaded(folders, name, **{option: folders / folder for option, folder in wrong.items()})
    said = answers(other, SEEING)
    assert sum(one == expected[item] for one, item in zip(said, SEEING, strict=True)) <= len(SEEING) * 2 / 3


@contextmanager
def away(folder: Path) -> Iterator[None]:
    """Moves a folder away."""
    hidden = folder.with_name("away")
    folder.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(folder)


@pytest.mark.parametrize("name", FORMS)
def test_folder_names_do_not_matter(folders: Path, expected: dict[Asked, str], tmp_path: Path, name: str) -> None:
    """Even if config.json still names the old path of the tower."""
    options = FORMS[name].options(folders)
    given = {"path": folders / name} | {key: value for key, value in options.items() if isinstance(value, Path)}
    for key, folder in given.items():
        # a misleading name: the original code guesses the type of model from it
        given[key] = shutil.copytree(folder, tmp_path / f"mpt-{key}-lora-v0", copy_function=os.link)
    with away(folders):
        assistant = llava.load(**(options | given), device="cpu")
    asked = asked_of(name)[::2]
    assert answers(assistant, asked) == [expected[item] for item in asked]


def test_the_folders_have_the_intended_files(folders: Path) -> None:
    assert len(list((folders / "llava-bin").glob("pytorch_model-*-of-*.bin"))) >= 3
    assert len(list((folders / "llava-safetensors").glob("model-*-of-*.safetensors"))) >= 3
    assert (folders / "lora" / "non_lora_trainables.bin").is_file()
    assert not list((folders / "projector").glob("*model*"))
    for name in ("llava-bin", "lora", "delta", "projector", "llama"):
        kept = sum(file.stat().st_size for file in (folders / name).iterdir())
        assert kept < 9e6, f"{name} holds a tower"


def test_a_missing_model_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        formats.main(tmp_path / "out", tmp_path / "nothing")
    said = capsys.readouterr().err
    assert said.startswith("forms: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
