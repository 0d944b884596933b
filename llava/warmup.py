"""Fills the caches of compiled kernels: runs requests of each kind, whose kernels the next process finds there."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava.assistant import Assistant
from llava.config import IMAGE_PLACEHOLDER
from llava.doctor import measure
from llava.engine.fused import BUCKETS
from llava.engine.input_processor import Request
from llava.engine.sampling_params import SamplingParams
from llava.errors import counted
from llava.kernels.attend import SHARED_ROWS
from llava.tensors.atomic import size_text

_GREEDY = SamplingParams(max_new_tokens=8)
_SAMPLED = SamplingParams(max_new_tokens=8, temperature=0.7, top_p=0.9, seed=0)


@dataclass(frozen=True, kw_only=True)
class Warmed:
    """What a warm-up did."""

    device: str
    seconds: Mapping[str, float]  # by kind of request; includes compilation
    compiled: list[str]  # names of the kernels that were not in the cache; one may be compiled for several sizes
    cached: int  # kernels that were
    cache_bytes: Mapping[str, int]  # by folder

    def text(self) -> str:
        """Returns the report for people."""
        names = f": {', '.join(sorted(set(self.compiled)))}" if self.compiled else ""
        return "\n".join(
            [
                *(f"{name:<12}{seconds:8.2f} s" for name, seconds in self.seconds.items()),
                f"compiled {counted(len(self.compiled), 'kernel')}{names}; {self.cached} were in the cache",
                *(f"{folder}: {size_text(n_bytes)}" for folder, n_bytes in self.cache_bytes.items()),
            ]
        )


def fill_caches(vlm: Assistant, folders: Mapping[str, Path]) -> Warmed:
    """Runs requests of each kind. folders: the caches "triton" and "inductor"."""
    before = _kernels(folders["triton"])
    seconds = warm_up(vlm)
    after = _kernels(folders["triton"])
    return Warmed(
        device=str(vlm.device),
        seconds=seconds,
        compiled=[path.stem for path in sorted(after - before)],
        cached=len(before),
        cache_bytes={str(folder): measure(folder)[0] for folder in folders.values()},
    )


def _kernels(folder: Path) -> set[Path]:
    """Returns the files of the kernels in Triton's cache, which bear their names."""
    return set(folder.rglob("*.cubin"))


def warm_up(vlm: Assistant) -> dict[str, float]:
    """Runs a picture, sampling, questions that begin alike, and text at each batch size. Returns their seconds."""
    stages: dict[str, tuple[list[Request], SamplingParams]] = {}
    if vlm.model.vision is not None:
        picture = Image.linear_gradient("L").convert("RGB")
        stages["picture"] = ([(f"{IMAGE_PLACEHOLDER}\nA description of the picture, in detail:", [picture])], _GREEDY)
    stages["sampling"] = (_stories("sampling", 1), _SAMPLED)
    if vlm.engine.options.max_batch >= SHARED_ROWS:
        stages["questions"] = (_questions(SHARED_ROWS), _GREEDY)
    for n in batch_sizes(vlm.engine.options.max_batch):
        stages[f"batch {n}"] = (_stories(f"batch {n}", n), _GREEDY)
    seconds = {}
    for name, (inputs, params) in stages.items():
        started = time.perf_counter()
        vlm.engine.generate(inputs, params, adapter=vlm.active, at_once=len(inputs))
        seconds[name] = time.perf_counter() - started
    return seconds


def batch_sizes(max_batch: int) -> list[int]:
    """Returns the numbers of rows up to `max_batch` for which the engine captures graphs, and `max_batch`."""
    return sorted({*(size for size in BUCKETS if size <= max_batch), max_batch})


def _questions(n: int) -> list[Request]:
    """Returns n raw prompts that begin alike, as questions about the same picture do."""
    return [
        f"{'A story about a lake, some boats and the people there. ' * 16}What happens in part {i}?" for i in range(n)
    ]


def _stories(title: str, n: int) -> list[Request]:
    """Returns n raw prompts. All differ from the start, so that no request reuses what another has computed."""
    return [f"{i}, {title}. A long story about a lake, some boats and the people there:" for i in range(n)]
