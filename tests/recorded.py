"""CUDA graphs without a GPU: what is captured, what a replay reads and what it overwrites is the same."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava.engine.graphs import Graphs


class RecordedGraphs(Graphs):
    """Records functions instead of capturing them; a replay calls the function again.

    poison: whether a replay destroys what earlier ones returned, as graphs may, which share memory.
    """

    def __init__(self, *, poison: bool = True):
        super().__init__(torch.device("cpu"), active=False)
        self.active, self.poison = True, poison
        self.results: list[Tensor] = []  # of the last replay
        self.n_replays = 0

    def _capture(self, function: Callable[[], Any]) -> Any:
        function()  # as before a capture
        return lambda: self._replay(function)

    def _replay(self, function: Callable[[], Any]) -> Any:
        self.n_replays += 1
        for result in self.results if self.poison else ():
            result.fill_(torch.nan if result.is_floating_point() else -999)
        result = function()
        self.results = list(result) if isinstance(result, tuple) else [result]
        return result
