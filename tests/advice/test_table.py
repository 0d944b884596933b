"""Advice works: following the advice of a message ends the message."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import huggingface_hub.constants
import pytest

from tests.advice import (  # noqa: F401 (their rows)
    bases,
    checkpoints,
    data,
    evaluation,
    files,
    judging,
    outputs,
    prompts,
    runs,
    scores,
    serving,
    tables,
    training,
)
from tests.advice.exceptions import EXCEPTIONS
from tests.advice.messages import messages_with_advice, pattern
from tests.advice.table import ROWS, Row, World, say

MESSAGES = messages_with_advice()
PARTS = [*EXCEPTIONS, *(row.message for row in ROWS)]


def matching(part: str) -> list[str]:
    """The messages that are equal to `part` or, if there is none, contain it."""
    return [part] if part in MESSAGES else [message for message in MESSAGES if part in message]


def test_every_message_with_advice_has_a_row_or_a_reason() -> None:
    named = {message for part in PARTS for message in matching(part)}
    assert [f"{file}: {text}" for text, file in MESSAGES.items() if text not in named] == []


def test_every_row_and_exception_is_about_one_message() -> None:
    assert {part: found for part in PARTS if len(found := matching(part)) != 1} == {}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.follow.__name__)
def test_following_the_advice_ends_the_error(
    row: Row, tmp_path: Path, shared_folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (message,) = matching(row.message)
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path, shared_folders)
    steps = row.follow(world)
    run = next(steps)
    said = say(run, world.stdin)
    assert pattern(message).search(said.text), said.text
    with suppress(StopIteration):
        run = steps.send(said)
    again = say(run, world.stdin)
    assert not pattern(message).search(again.text), again.text
    assert again.well or not row.succeeds, again.text
