"""Opens checkpoints, expects refusals and compares tensors, for the tests of all formats."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llava
from llava.checkpoint.consistency import check_headers
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.formats.format import Checkpoint


def opened(path: Path | str, **options: Any) -> Checkpoint:
    checkpoint = open_checkpoint(path, LoadOptions(**options))
    check_headers(checkpoint)
    return checkpoint


def refused(path: Path | str, **options: Any) -> str:
    with pytest.raises(llava.LlavaError) as caught:
        opened(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.read_tensors()}


def assert_same(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert set(ours) == set(others)
    for name, tensor in ours.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name
