"""The engine's tests run with the next step launched before the tokens of a step are read, and without.

They also run with the fused decoder, as on a GPU.
"""

from collections.abc import Iterator
from functools import partialmethod

import pytest

from llava.engine.engine import Engine


@pytest.fixture(
    scope="module", params=[(False, False), (True, False), (True, True)], ids=["in turn", "overlap", "fused"]
)
def overlap(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the engines that a module makes overlap their steps, which on a CPU they do not by themselves."""
    overlap, fused = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", partialmethod(Engine.__init__, overlap=overlap, fused=fused))
        yield overlap
