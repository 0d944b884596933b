"""Messages with advice are found in the source code, and recognised in what is printed."""

from pathlib import Path

import pytest

from tests.advice.messages import messages_with_advice, pattern


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('raise ConfigError("no data; specify a file")', "no data; specify a file"),
        ('raise ConfigError(f"{file}: is empty; download it again")', "{}: is empty; download it again"),
        ('hint = f"{a}; " + f"run: llava zoo {b}"', "run: llava zoo {}"),
        ('log.warning("%s: skipped; repair it", name)', "{}: skipped; repair it"),
        ('text = "values are clipped (--scale avoids it)"', "values are clipped (--scale avoids it)"),
        ("raise Error(f\"x; {f'split it into {n} parts' if n else ''}\")", "split it into {} parts"),
        ('raise Error("set base= (--base) to a folder")', "set base= (--base) to a folder"),
    ],
)
def test_advice_is_found(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "module.py").write_text(code)
    assert messages_with_advice(tmp_path) == {message: "module.py"}


@pytest.mark.parametrize(
    "code",
    [
        '"""Load it; use it."""',
        'def f():\n    """Runs; remove it."""',
        'x = typer.Option("--base", help="the base; pass it")',
        'raise ConfigError("the file is a folder; expected a file")',
        'key = "use"',
    ],
)
def test_other_strings_are_not_advice(tmp_path: Path, code: str) -> None:
    (tmp_path / "module.py").write_text(code)
    assert messages_with_advice(tmp_path) == {}


def test_a_message_is_recognised_with_the_option_of_the_command() -> None:
    expected = pattern("{}: is wrong; set base= (--base) to {}")
    assert expected.search("llava: /a b: is wrong; set --base to a folder")
    assert expected.search("/a b: is wrong; set base= (--base) to a folder")
    assert not expected.search("llava: /a b: is missing; set --base to a folder")
