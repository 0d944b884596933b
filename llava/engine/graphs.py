"""Captures functions as CUDA graphs, which run hundreds of kernels with one launch."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from llava.kernels.support import TritonError

log = logging.getLogger(__name__)

_ONE_AT_A_TIME = threading.Lock()  # PyTorch captures one graph at a time in a process
_ROOM = 2 * 2**30  # bytes of free memory that the intermediate results of any step fit into


class Graphs:
    """Captures functions that read and write fixed memory. All graphs share the memory for intermediate results.

    They must therefore be replayed on the same stream, and what a replay returns is only valid until the next one.
    """

    def __init__(self, device: torch.device, *, active: bool):
        """active: whether to capture at all; always False without CUDA."""
        self.active = active and device.type == "cuda"
        self._pool: Any = None  # handle of the memory that graphs share

    def capture(self, function: Callable[[], Any], what: str) -> "Captured | None":
        """Runs a function once, and captures it. Returns None, after a warning that names `what`, if that fails."""
        try:
            return self._capture(function)
        except (RuntimeError, TritonError) as error:  # also what PyTorch raises if memory runs out
            log.warning(
                "%s cannot be captured as a CUDA graph, so no more graphs are captured, which is slower (%s); "
                "graphs=False (--no-graphs) does not try it",
                what,
                str(error).partition("\n")[0],
            )
            self.active = False
            _end_capture()
            return None

    def _capture(self, function: Callable[[], Any]) -> "Captured":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                function()  # compiles kernels, and lets libraries allocate what they keep
        finally:
            torch.cuda.current_stream().wait_stream(stream)
        if torch.cuda.mem_get_info()[0] < _ROOM:  # while it captures, PyTorch cannot return memory that it keeps
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # without `torch.cuda.graph`, which always empties the cache, and lets the next steps wait for new memory
        with _ONE_AT_A_TIME, torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = graph.pool()
        return Captured(graph, result)


def _end_capture() -> None:
    """Captures nothing: after a capture that failed, PyTorch's generators refuse to draw until one succeeds."""
    with (
        suppress(RuntimeError),
        _ONE_AT_A_TIME,
        torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"),
    ):
        torch.empty(0, device="cuda")


class Captured:
    """A graph, and what its function returned: tensors that each replay overwrites."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Any):
        self.graph, self.result = graph, result

    def __call__(self) -> Any:
        """Runs the graph and returns the result."""
        self.graph.replay()
        return self.result
