"""What the card of `gpu.py` can do at most."""

from collections.abc import Callable, Sequence
from statistics import median

import torch
from gpu_setup import Measured
from result import OURS
from shapes import Noise
from timing import Target


def ceilings(target: Target, *, tiny: bool) -> list[Measured]:
    """Reading 4 GiB, the faster of two ways, and a bfloat16 product of matrices of 8192 rows and columns."""
    n_bytes, side, repeats = (2**24, 256, 1) if tiny else (2**32, 8192, 10)
    values = torch.empty(n_bytes // target.dtype.itemsize, dtype=target.dtype, device=target.device)
    Noise(target).fill(values)
    ways = (values.max, values.view(torch.int32).max)
    read = max((rates(target, way, repeats) for way in ways), key=median)
    del values
    a, b = (torch.randn(side, side, device=target.device).to(target.dtype) for _ in "ab")
    product = rates(target, lambda: a @ b, repeats)
    return [
        measured("bandwidth", "TB/s", [n_bytes * rate / 1e12 for rate in read]),
        measured("product", "TFLOP/s", [2 * side**3 * rate / 1e12 for rate in product]),
    ]


def rates(target: Target, work: Callable[[], object], repeats: int) -> list[float]:
    """Calls of `work` per second, in ten runs."""
    work()
    return [repeats / target.seconds(lambda: [work() for _ in range(repeats)]) for _ in range(10)]


def measured(case: str, unit: str, values: Sequence[float]) -> Measured:
    return Measured(case=case, contestant=OURS, values=values, unit=unit)
