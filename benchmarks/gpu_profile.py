"""Where the time of a case goes: kernels by their time, and the share of time in which the GPU is idle."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from timing import Target
from torch.profiler import ProfilerActivity, profile

_SHOWN = 15  # kernels


class Span(NamedTuple):
    """One kernel on the GPU, or one operator on a CPU. Times in microseconds."""

    name: str
    start: float
    end: float


@contextmanager
def profiled(target: Target) -> Iterator[list[Span]]:
    """Records the code in the context. The yielded list is filled at its end."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if target.on_gpu else [])
    spans: list[Span] = []
    target.synchronize()
    with profile(activities=activities) as recorded:
        yield spans
        target.synchronize()
    for event in recorded.events() or ():
        if ("CUDA" in str(event.device_type)) == target.on_gpu:
            spans.append(Span(event.name, event.time_range.start, event.time_range.end))


def table(spans: list[Span]) -> str:
    """The kernels that take the most time, and the idle share between the first and the last kernel."""
    if not spans:
        return "no kernel was recorded"
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for span in spans:
        total[span.name] += span.end - span.start
        count[span.name] += 1
    wall = max(span.end for span in spans) - min(span.start for span in spans)
    lines = [f"{wall / 1e3:.2f} ms, idle {1 - busy(spans) / max(wall, 1e-9):.1%}, {len(spans)} kernels"]
    for name in sorted(total, key=lambda name: -total[name])[:_SHOWN]:
        mean = total[name] / count[name]
        lines.append(
            f"{total[name] / 1e3:9.2f} ms {total[name] / wall:6.1%} {count[name]:6} x {mean:8.1f} us  {name:.80}"
        )
    return "\n".join(lines)


def busy(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one kernel runs."""
    found, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        found += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return found
