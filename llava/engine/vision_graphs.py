"""Runs vision tower and projector as CUDA graphs: one launch, where each of their 200 kernels otherwise needs its own.

V views   N features per view   D dim
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.model.llava import Llava

log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # views of a graph; other numbers are padded, larger ones are split
Weights = tuple[int, ...]  # addresses


class _Captured(NamedTuple):
    """A graph, and its result [bucket, N, D], which each replay overwrites."""

    graph: torch.cuda.CUDAGraph
    features: Tensor


class VisionGraphs:
    """Graphs of the towers and projectors of some models, which are captured when they are first needed.

    All graphs share the memory for intermediate results. Models with the same tower and projector share graphs.
    """

    def __init__(self) -> None:
        self._captured: dict[tuple[Weights, int], _Captured] = {}
        self._weights: dict[int, Weights] = {}  # by the id of a model; models are kept by the engine
        self._pixels: dict[tuple[torch.Size, torch.dtype], Tensor] = {}  # inputs of graphs, by shape and dtype
        self._pool: Any = None  # handle of the memory that graphs share
        self._works = True

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
        if self._works and key not in self._captured:
            self._try_capture(model, inputs, key)
        if not self._works:
            return model.view_features(inputs[:n])
        captured = self._captured[key]
        captured.graph.replay()
        return captured.features[:n].clone()

    def _inputs(self, model: Llava, pixels: Tensor) -> Tensor:
        """Returns the memory [64, 3, size, size] from which graphs read the pixels of a model."""
        key = pixels.shape[1:], model.dtype
        if key not in self._pixels:
            self._pixels[key] = torch.zeros(BUCKETS[-1], *key[0], dtype=model.dtype, device=model.device)
        return self._pixels[key]

    def _weights_of(self, model: Llava) -> Weights:
        if id(model) not in self._weights:
            modules = (model.vision, model.projector)
            self._weights[id(model)] = tuple(w.data_ptr() for module in modules if module for w in module.parameters())
        return self._weights[id(model)]

    def _try_capture(self, model: Llava, inputs: Tensor, key: tuple[Weights, int]) -> None:
        try:
            self._captured[key] = self._capture(model, inputs)
        except RuntimeError as error:  # also what PyTorch raises if memory runs out
            log.warning(
                "the vision tower cannot be captured as a CUDA graph and runs without, which is slower (%s); "
                "graphs=False (--no-graphs) does not try it",
                str(error).partition("\n")[0],
            )
            self._works = False

    def _capture(self, model: Llava, inputs: Tensor) -> _Captured:
        with torch.cuda.device(inputs.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                model.view_features(inputs)  # compiles kernels, and lets libraries allocate what they keep
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                features = model.view_features(inputs)
        self._pool = graph.pool()
        return _Captured(graph, features)
