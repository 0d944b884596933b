"""Advice in errors and warnings names what the command takes, never an argument in Python."""

import re
import shlex
from pathlib import Path

import pytest

from llava.cli.advice import Command
from tests import tiny
from tests.command import CONVERT_HF, assert_one_line_error, run, run_well

ARGUMENT = r"\b(base|vision_tower|template|adapters|force|vision|merge)="


@pytest.fixture
def lora(clip: Path, base: Path, tmp_path: Path) -> Path:
    return tiny.write_lora(tmp_path / "a lora", clip=clip, base="someone/the-base")


COMMANDS = {
    "ask": ("ask", "Hi there", "--model", "LORA", "--max-new-tokens", 2),
    "convert": ("convert", "LORA", "OUT", "--to", "llama"),
    "features": ("features", "LORA", "--input", "TEXTS", "--layers", "-1", "--out", "OUT.safetensors"),
    "merge-lora": ("merge-lora", "--target", "OUT", "--lora", "LORA"),
    "extract-projector": ("extract-projector", "LORA", "OUT"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_about_a_missing_base_ends_with_the_completed_command_which_then_works(
    name: str, lora: Path, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "TEXTS").write_text("Once upon a time\n")
    paths = {"LORA": lora, **{name: tmp_path / name for name in ("OUT", "OUT.safetensors", "TEXTS")}}
    line = [str(paths.get(str(word), word)) for word in COMMANDS[name]]
    done = run(*line)
    assert_one_line_error(done, "someone/the-base")
    assert not re.search(ARGUMENT, done.stderr)
    advised = shlex.split(done.stderr.strip().rpartition("run: ")[2])
    assert advised == ["llava", *line, "--base", "someone/the-base"]
    run_well(*advised[1:-1], base)


@pytest.mark.parametrize("command", ["ask", "train"])
def test_a_recorded_folder_that_is_gone_is_not_advised_again(
    command: str, clip: Path, base: Path, tmp_path: Path
) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip, base=str(tmp_path / "gone"))
    (tmp_path / "data.json").write_text('[{"conversations": [{"from": "human", "value": "a"}]}]')
    changes = {"model": lora, "data": tmp_path / "data.json", "images": tmp_path, "output_dir": tmp_path / "run"}
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    line = {
        "ask": ["ask", "Hi there", "--model", lora, "--max-new-tokens", 2],
        "train": ["train", "custom/finetune-lora", "--plan", *sets],
    }[command]
    done = run(*line)
    assert_one_line_error(done, f"= {tmp_path / 'gone'}, a folder that does not exist")
    advised = shlex.split(done.stderr.strip().rpartition("run: ")[2])
    added = {"ask": ["--base", "BASE"], "train": ["--set", "base=BASE"]}[command]
    assert advised == ["llava", *map(str, line), *added]
    again = run(*(word.replace("BASE", str(base)) for word in advised[1:]))
    assert "does not exist" not in again.stderr


def test_a_command_whose_base_is_something_else_advises_to_combine_first(
    lora: Path, base: Path, tmp_path: Path
) -> None:
    done = run("make-delta", "--base", base, "--target", lora, "--delta", tmp_path / "delta")
    assert_one_line_error(done, f"llava convert '{lora}' OUT --to llava --base someone/the-base")
    assert not (tmp_path / "delta").exists()


def test_a_recipe_takes_the_base_as_a_setting(lora: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[]")
    changes = {"model": lora, "data": tmp_path / "data.json", "images": tmp_path, "output_dir": tmp_path / "run"}
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    done = run("train", "custom/finetune-lora", *options, "--plan")
    assert_one_line_error(done, "--plan --set base=someone/the-base")
    assert not re.search(r"\bbase= ", done.stderr)


def test_the_script_without_a_base_option_does_not_advise_it(lora: Path) -> None:
    done = run("--checkpoint_dir", lora, command=CONVERT_HF)
    assert_one_line_error(done, f"llava convert '{lora}' OUT --to native --base someone/the-base")
    assert "(--base)" not in done.stderr
    assert not re.search(ARGUMENT, done.stderr)


def test_a_needless_base_is_refused_with_the_option(base: Path, tmp_path: Path) -> None:
    done = run("convert", base, tmp_path / "out", "--base", base)
    assert_one_line_error(done, "omit --base")


def test_a_missing_template_names_the_option_which_then_works(base: Path) -> None:
    done = run("ask", "Hi", "--model", base, "--max-new-tokens", 2)
    assert_one_line_error(done, "set --template to one of")
    assert not re.search(ARGUMENT, done.stderr)
    run_well("ask", "Hi", "--model", base, "--max-new-tokens", 2, "--template", "v1")


def test_an_option_that_the_command_lacks_is_named_with_the_commands_that_have_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    whole = tiny.write_llava(tmp_path / "whole", mm_vision_tower=tiny.ABSENT)
    done = run("convert", whole, tmp_path / "out")
    assert_one_line_error(done, "set --vision-tower to", "--no-vision")
    assert not re.search(ARGUMENT, done.stderr)
    asked = run("ask", "Hi", "--model", whole)
    assert_one_line_error(asked, "--no-vision (an option of llava convert)")


def test_a_warning_names_the_option_too(clip: Path, base: Path, tmp_path: Path) -> None:
    projector = tiny.write_projector(tmp_path / "p", clip=clip)
    (projector / "config.json").unlink()
    done = run("ask", "Hi", "--model", projector / "mm_projector.bin", "--base", base, "--max-new-tokens", 1)
    assert not re.search(ARGUMENT, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--force"}, "pass --force"),
        ({"--set", "--device"}, "pass --force (an option of llava ask)"),  # the recipe has no key `force`
        (set(), "pass --force (an option of llava ask)"),
    ],
)
def test_an_argument_becomes_an_option_or_a_recipe_key_that_exists(options: set[str], said: str) -> None:
    command = Command(options=frozenset(options), others={"ask": frozenset({"--force"})})
    assert command.rewrite("NaN; pass force=True (--force)") == f"NaN; {said}"


def test_the_value_of_an_option_is_kept() -> None:
    command = Command(options=frozenset({"--ignore-tensors"}))
    text = "pass ignore_tensors= (--ignore-tensors lm_head.weight) to use the table"
    assert command.rewrite(text) == "pass --ignore-tensors lm_head.weight to use the table"


def test_a_recipe_takes_a_template_as_a_setting() -> None:
    command = Command(options=frozenset({"--set"}))
    assert command.rewrite("set template= (--template) to one of v0, v1") == "pass --set template=… to one of v0, v1"


@pytest.mark.parametrize(
    ("option", "expected"), [("--set", "pass --set transparency=white"), ("--transparency", "set --transparency white")]
)
def test_a_value_is_advised_as_the_command_takes_it(option: str, expected: str) -> None:
    rewritten = Command(options=frozenset({option})).rewrite("set transparency=white (--transparency white)")
    assert rewritten == expected
