"""Reads merged folders and compares them with the sums that the original's tool would write."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from llava.tensors.shards import open_weights

DOOR = [sys.executable, "-m", "llava.model.apply_delta"]


def stored(folder: Path) -> dict[str, Tensor]:
    weights = open_weights(folder)
    return {name: weights[name] for name in weights}


def originals(base: Path, delta: Path) -> dict[str, Tensor]:
    """The sums that the original's tool computes in float16, with both models in memory."""
    under, sums = stored(base), {}
    for name, value in stored(delta).items():
        made = value.half().clone()
        if name in under:
            own = under[name].half()
            made[tuple(slice(0, n) for n in own.shape)] += own
        if "inv_freq" not in name:
            sums[name] = made
    return sums


def assert_same(folder: Path, expected: dict[str, Tensor]) -> None:
    found = stored(folder)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float16, name
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
