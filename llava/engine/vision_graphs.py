"""Runs vision tower and projector as CUDA graphs: one launch, where each of their 200 kernels otherwise needs its own.

V views   N features per view   D dim
"""

import torch
from torch import Tensor

from llava.engine.graphs import Captured, Graphs
from llava.model.llava import Llava

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # views of a graph; other numbers are padded, larger ones are split
Weights = tuple[int, ...]  # addresses


class VisionGraphs:
    """Graphs of the towers and projectors of some models, which are captured when they are first needed.

    Models with the same tower and projector share graphs.
    """

    def __init__(self, graphs: Graphs):
        self.graphs = graphs
        self._captured: dict[tuple[Weights, int], Captured] = {}
        self._weights: dict[int, Weights] = {}  # by the id of a model; models are kept by the engine
        self._pixels: dict[tuple[torch.Size, torch.dtype], Tensor] = {}  # inputs of graphs, by shape and dtype

    def features(self, model: Llava, pixels: Tensor) -> Tensor:
        """pixels [V, 3, size, size] on any device -> projected features [V, N, D], which no replay overwrites."""
        pieces = [self._piece(model, piece) for piece in pixels.split(BUCKETS[-1])]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _piece(self, model: Llava, pixels: Tensor) -> Tensor:
        n = len(pixels)
        bucket = min(bucket for bucket in BUCKETS if bucket >= n)
        inputs = self._inputs(model, pixels)[:bucket]
        inputs[:n].copy_(pixels, non_blocking=True)
        key = self._weights_of(model), bucket
        if self.graphs.active and key not in self._captured:
            captured = self.graphs.capture(lambda: model.view_features(inputs), "the vision tower")
            if captured:
                self._captured[key] = captured
        if key not in self._captured:
            return model.view_features(inputs[:n])
        features: Tensor = self._captured[key]()
        return features[:n].clone()

    def _inputs(self, model: Llava, pixels: Tensor) -> Tensor:
        """Returns the memory [64, 3, size, size] from which graphs read the pixels of a model."""
        key = pixels.shape[1:], model.dtype
        if key not in self._pixels:
            self._pixels[key] = torch.zeros(BUCKETS[-1], *key[0], dtype=model.dtype, device=model.device)
        return self._pixels[key]

    def _weights_of(self, model: Llava) -> Weights:
        if id(model) not in self._weights:
            modules = (model.vision, model.projector)
            self._weights[id(model)] = tuple(
                w.data_ptr() for module in modules if module for w in module.state_dict().values()
            )
        return self._weights[id(model)]
