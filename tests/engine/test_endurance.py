"""Ten thousand requests leave nothing behind: no page, no picture, no memory."""

import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

import llava
from llava.config import EngineOptions
from llava.engine.engine import Engine, Request
from llava.engine.sampling_params import SamplingParams
from llava.model.paged import cache_bytes_per_token
from tests import tiny

pytestmark = pytest.mark.usefixtures("overlap")

N = 10_000
EVERY = 500  # requests between checks
GROWTH = 12 * 2**20  # bytes by which the process may grow in the second half


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def opened(folder: Path) -> llava.Assistant:
    """Opens a model with a cache of 64 pages, which are used again all the time, and steps of few different shapes."""
    path = tiny.write_llava(folder / "model", clip=tiny.write_clip(folder / "clip"))
    config = llava.load(path, dtype="float32", device="cpu").config.decoder
    memory = 2 * 64 * 16 * cache_bytes_per_token(config, torch.float32)
    return llava.load(
        path, dtype="float32", device="cpu", engine=EngineOptions(max_batch=4, chunk_tokens=16, cache_memory=memory)
    )


def request(rng: random.Random, pictures: list[Image.Image]) -> tuple[Request, SamplingParams]:
    """Returns a short question, one in twenty about a picture, of which some are new and some have been seen."""
    text = f"Question {rng.randrange(3000)}?"
    params = SamplingParams(
        max_new_tokens=rng.randint(1, 3),
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(100),
        logprobs=rng.choice((0, 0, 2)),
        stop=rng.choice(((), ("ab",))),
    )
    if rng.random() < 0.95:
        return text, params
    picture = rng.choice([*pictures, Image.effect_noise((20, 20), rng.uniform(1, 100)).convert("RGB")])
    return (f"<image>\n{text}", [picture]), params


def serve(engine: Engine, rng: random.Random, n: int, pictures: list[Image.Image]) -> int:
    """Adds `n` requests, a few per step, and aborts some. Returns how many have finished."""
    finished, added = 0, 0
    while added < n or engine.has_requests:
        for _ in range(min(rng.randint(1, 3), n - added)):
            number = engine.add_request(*request(rng, pictures), priority=rng.randrange(3))
            added += 1
            if rng.random() < 0.05:
                engine.abort(number - rng.randrange(8))
        outputs = engine.step()
        assert not any(output.error for output in outputs)
        finished += sum(output.finish_reason is not None for output in outputs)
    return finished


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc to measure memory")
def test_ten_thousand_requests_leave_no_page_and_no_memory(tmp_path: Path) -> None:
    rng = random.Random(0)
    engine = opened(tmp_path).engine
    pictures = [Image.linear_gradient("L").rotate(90 * i).convert("RGB") for i in range(4)]
    n_pages = engine.stats().pages_free
    sizes = []
    for _ in range(N // EVERY):
        assert serve(engine, rng, EVERY, pictures) == EVERY
        engine.check()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.pages_used, stats.pages_free) == (0, 0, 0, n_pages)
        sizes.append(resident_bytes())
    assert stats.prefix_hit_tokens > 0
    assert stats.feature_hits > 0
    half = len(sizes) // 2
    growth = max(sizes[half:]) - max(sizes[:half])
    assert growth < GROWTH, f"{[size >> 20 for size in sizes]}: the process grew by {growth / 2**20:.1f} MiB"
