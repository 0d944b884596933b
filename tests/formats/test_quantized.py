"""Quantized checkpoints are named as such, whatever the config says, and refused with `--force` too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from tests.checkpoints import opened, refused

MATRIX = "model.layers.0.mlp.up_proj"
ONES = torch.ones(4)
SCHEMES: dict[str, tuple[Mapping[str, Tensor], dict[str, Any], str]] = {
    "bitsandbytes int8": ({".SCB": ONES}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8"),
    "bitsandbytes nf4": (
        {".absmax": ONES, ".quant_map": ONES, ".quant_state.bitsandbytes__nf4": ONES},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "bitsandbytes, 4",
    ),
    "gptq": ({".qweight": ONES.int(), ".qzeros": ONES.int(), ".scales": ONES, ".g_idx": ONES.int()}, {}, "GPTQ"),
    "awq": ({".qweight": ONES.int(), ".qzeros": ONES.int(), ".scales": ONES}, {"quant_method": "awq"}, "AWQ"),
    "fp8": ({".weight_scale_inv": ONES}, {"quant_method": "fp8"}, "fp8"),
    "compressed-tensors": ({".weight_packed": ONES.int(), ".weight_shape": ONES.long()}, {}, "compressed-tensors"),
    "hqq": ({".W_q": ONES.byte()}, {}, "HQQ"),
}


def with_tensors(folder: Path, more: Mapping[str, Tensor], *, without: str | None = None) -> Path:
    tensors = load_file(folder / "model.safetensors") | dict(more)
    save_file({name: value for name, value in tensors.items() if name != without}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_quantized_checkpoint_is_named_and_refused_with_force_too(
    scheme: str, recorded: bool, tmp_path: Path
) -> None:
    tensors, settings, name = SCHEMES[scheme]
    folder = tiny.write_llama(tmp_path / "llama", **({"quantization_config": settings} if recorded else {}))
    with_tensors(folder, {MATRIX + ending: value.clone() for ending, value in tensors.items()})
    for options in ({}, {"force": True}, {"ignore_tensors": ("*",)}):
        text = refused(folder, **options)
        assert name in text
        assert "quantized" in text
        assert "--force" not in text


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_integers_and_8_bit_floats_are_never_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "llama")
    value = load_file(folder / "model.safetensors")[f"{MATRIX}.weight"]
    with_tensors(folder, {f"{MATRIX}.weight": value.to(dtype)})
    for force in (False, True):
        assert f"{MATRIX}.weight: has dtype {str(dtype)[6:]}" in refused(folder, force=force)


def test_floats_are_read_although_the_config_says_that_they_were_quantized_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    opened(tiny.write_llama(tmp_path / "llama", quantization_config=settings))
    assert "quantization_config is ignored" in caplog.text


def test_unknown_tensors_beside_a_method_of_quantization_are_its_packed_weights(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "llama", quantization_config={"quant_method": "newquant"})
    text = refused(with_tensors(folder, {MATRIX + ".secret_codes": ONES}))
    assert "quant_method = 'newquant'" in text
    assert "--ignore-tensors" not in text
