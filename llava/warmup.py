"""Fills the caches of compiled kernels: runs requests of each kind, whose kernels the next process finds there."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava.assistant import Assistant
from llava.config import IMAGE_PLACEHOLDER
from llava.engine.input_processor import Request
from llava.engine.sampling_params import SamplingParams

_GREEDY = SamplingParams(max_new_tokens=8)
_SAMPLED = SamplingParams(max_new_tokens=8, temperature=0.7, top_p=0.9, seed=0)


@dataclass(frozen=True)
class Stage:
    """A kind of request that has run."""

    name: str
    seconds: float


def warm_up(vlm: Assistant) -> Iterator[Stage]:
    """Runs a picture, and text at each batch size that kernels are made for. Yields each stage when it has ended."""
    stages: dict[str, tuple[list[Request], SamplingParams]] = {}
    if vlm.model.vision is not None:
        picture = Image.linear_gradient("L").convert("RGB")
        stages["picture"] = ([(f"{IMAGE_PLACEHOLDER}\nA description of the picture, in detail:", [picture])], _GREEDY)
    stages["sampling"] = (_stories(1), _SAMPLED)
    for n in batch_sizes(vlm.engine.options.max_batch):
        stages[f"batch {n}"] = (_stories(n), _GREEDY)
    for name, (inputs, params) in stages.items():
        started = time.perf_counter()
        vlm.engine.generate(inputs, params, adapter=vlm.active, at_once=len(inputs))
        yield Stage(name, time.perf_counter() - started)


def batch_sizes(max_batch: int) -> list[int]:
    """Returns the powers of two up to `max_batch`, and `max_batch`."""
    return sorted({*(2**i for i in range(max_batch.bit_length())), max_batch})


def _stories(n: int) -> list[Request]:
    """Returns n raw prompts. All differ from the start, so that no request reuses what another has computed."""
    return [f"{n}.{i} A long story about a lake, some boats and the people who live there:" for i in range(n)]


def compiled_kernels(folder: Path) -> dict[Path, str]:
    """Returns the names of the kernels in Triton's cache, by their files."""
    return {path: path.stem for path in folder.rglob("*.cubin")}
