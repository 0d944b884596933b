"""Timed runs of contestants that take turns.

All contestants take turns in one process, so that a machine that slows down slows all of them.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import typer

Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda")]
DType = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16")]
Runs = Annotated[int, typer.Option("--runs", help="timed runs of each contestant", min=1)]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; default: torch's own choice")]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The device and dtype that a benchmark runs on."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def from_options(cls, device: str, dtype: str, threads: int | None) -> "Target":
        if threads:
            torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype not in ("float32", "bfloat16", "float16"):
            raise typer.BadParameter(f"--dtype {dtype}: expected float32, bfloat16 or float16")
        return cls(device=torch.device(device), dtype=getattr(torch, dtype))

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def synchronize(self) -> None:
        """Waits for all launched kernels."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Runs `work` and returns its duration, up to the end of its last kernel."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started


def alternate(contestants: Mapping[str, Callable[[], float]], runs: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Runs each contestant once per round, in reverse order every other round. A contestant returns its seconds."""
    names = list(contestants)
    for _ in range(warm_up):
        for name in names:
            contestants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(runs):
        for name in names if i % 2 == 0 else reversed(names):
            seconds[name].append(contestants[name]())
    return seconds
