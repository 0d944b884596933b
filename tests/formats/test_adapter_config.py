"""Settings of PEFT: every one is computed, known not to matter, refused by name, or warned about."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llava.errors import CheckpointError
from llava.formats.adapter_config import read_settings
from tests import tiny


def write(folder: Path, **changes: Any) -> Path:
    settings = {"peft_type": "LORA", "lora_alpha": 8, "r": 4, "target_modules": ["q_proj"]}
    tiny.write_json(folder / "adapter_config.json", settings | changes)
    return folder / "adapter_config.json"


@pytest.mark.parametrize("value", [True, 7, "yes", {"a": 1}])
def test_a_key_that_nobody_knows_is_one_line_of_warning(
    tmp_path: Path, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    read_settings(write(tmp_path, use_something_new=value))
    (record,) = caplog.records
    assert "use_something_new" in record.getMessage()


@pytest.mark.parametrize("value", [None, False, {}, [], 0, ""])
def test_an_unknown_key_with_a_neutral_value_is_no_warning(
    tmp_path: Path, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    read_settings(write(tmp_path, use_something_new=value, use_dora=value, layer_replication=value))
    assert not caplog.records


def test_every_setting_of_the_installed_peft_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A setting at a value that is not neutral is refused or read without a warning about an unknown key."""
    peft = pytest.importorskip("peft")
    for field in dataclasses.fields(peft.LoraConfig):
        if field.name in ("peft_type", "lora_alpha", "alpha_pattern", "init_lora_weights", "modules_to_save"):
            continue
        with contextlib.suppress(CheckpointError):
            read_settings(write(tmp_path, **{field.name: "something"}))
    assert not caplog.records


@pytest.mark.parametrize(("init", "good"), [(True, True), ("eva", True), ("pissa", False), ("mica", False), (7, False)])
def test_only_initialisations_that_keep_the_base_are_read(tmp_path: Path, init: Any, good: bool) -> None:
    file = write(tmp_path, init_lora_weights=init)
    if good:
        assert read_settings(file).alpha == 8
        return
    with pytest.raises(CheckpointError, match="init_lora_weights"):
        read_settings(file)


@pytest.mark.parametrize(
    "key", ["(", "(?i)up", "([a-z._0-9]+)+X", "(a*)*", "((a+))+", "(a{2,})+", "(" * 500 + ")" * 500]
)
def test_a_pattern_that_cannot_be_used_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match="alpha_pattern key"):
        read_settings(write(tmp_path, alpha_pattern={key: 4}))


@pytest.mark.parametrize(
    ("key", "module", "matches"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "model.layers.0.self_attn.xq_proj", False),
        (r"layers\.[01]\..*", "model.layers.1.mlp.up_proj", True),
        ("^model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", True),
        ("^layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", False),
    ],
)
def test_a_pattern_matches_the_end_of_a_modules_name(tmp_path: Path, key: str, module: str, matches: bool) -> None:
    settings = read_settings(write(tmp_path, alpha_pattern={key: 4}))
    assert settings.scale(module, 4) == (1 if matches else 2)
