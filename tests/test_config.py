"""Sizes that cannot be right are refused, with the limits that hold for them."""

import math
from typing import Any

import pytest

from llava.config import ProjectorConfig, VisionConfig
from llava.errors import ConfigError

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "mlp_dim": 128, "image_size": 56, "patch_size": 14}
ABOVE_0 = "above 0, at most"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"dim": 0}, f"dim is 0; expected a whole number {ABOVE_0} {2**28}"),
        ({"dim": "64"}, f"dim is '64'; expected a whole number {ABOVE_0} {2**28}"),
        ({"dim": True}, f"dim is True; expected a whole number {ABOVE_0} {2**28}"),
        ({"dim": 2**29}, f"dim is {2**29}; expected a whole number {ABOVE_0} {2**28}"),
        ({"eps": math.nan}, f"eps is nan; expected a number {ABOVE_0} 1e+30"),
        ({"eps": -1.0}, f"eps is -1.0; expected a number {ABOVE_0} 1e+30"),
        ({"select_layer": "x"}, f"select_layer is 'x'; expected a whole number from -{2**28} to {2**28}"),
    ],
)
def test_a_number_outside_its_limits_is_refused_with_them(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError) as error:
        VisionConfig(**{**SIZES, "select_layer": -2, **changes})
    assert str(error.value) == f"vision: {found}"


def test_a_number_that_may_be_0_is_not_said_to_be_above_0() -> None:
    assert ProjectorConfig(in_dim=64, out_dim=64, depth=0).depth == 0
    with pytest.raises(ConfigError, match="depth is None; expected a whole number from"):
        ProjectorConfig(in_dim=64, out_dim=64, depth=None)
