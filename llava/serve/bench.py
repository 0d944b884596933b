"""A load generator for servers with OpenAI's API: streams chats, and measures when their tokens arrive."""

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from llava.errors import ConfigError, LlavaError

_ADJECTIVES = ("red", "blue", "green", "small", "large", "round", "square", "near", "far", "bright", "dark", "old")
_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to send: `concurrency` requests at a time, or `rate` new ones a second, at random times."""

    url: str  # such as http://127.0.0.1:8000
    model: str
    key: str = ""
    requests: int = 100
    concurrency: int = 8
    rate: float | None = None  # None: `concurrency` decides
    prompt_words: int = 40
    max_tokens: int = 64
    pictures: int = 0  # in each request
    picture_size: int = 336  # pixels on each side
    timeout_s: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "concurrency", "max_tokens", "prompt_words", "picture_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 1 or more")
        if self.rate is not None and not 0 < self.rate < 1e6:
            raise ConfigError(f"--rate is {self.rate}; expected a number above 0, in requests per second")
        if not 0 <= self.pictures <= 64:
            raise ConfigError(f"--pictures is {self.pictures}; expected 0 to 64")


@dataclass(kw_only=True)
class Sample:
    """One request and its reply. Times are in seconds."""

    body: Mapping[str, Any]
    text: str = ""
    error: str | None = None
    first_token_s: float = 0.0
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # between chunks
    n_tokens: int = 0


def bodies(load: Load) -> list[dict[str, Any]]:
    """Returns the bodies of all requests: random words, and pictures with random shapes, each different."""
    chance = random.Random(load.seed)
    return [_body(load, chance) for _ in range(load.requests)]


def _body(load: Load, chance: random.Random) -> dict[str, Any]:
    text = "Describe this: " + " ".join(chance.choice(_ADJECTIVES) for _ in range(load.prompt_words))
    pictures = [{"type": "image_url", "image_url": {"url": _picture(load, chance)}} for _ in range(load.pictures)]
    return {
        "model": load.model,
        "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}],
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _picture(load: Load, chance: random.Random) -> str:
    from PIL import Image, ImageDraw

    def colour() -> tuple[int, int, int]:
        return chance.randrange(256), chance.randrange(256), chance.randrange(256)

    side = load.picture_size
    image = Image.new("RGB", (side, side), colour())
    for _ in range(3):
        x, y, r = chance.randrange(side), chance.randrange(side), chance.randrange(side // 8 + 1, side // 2 + 2)
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=colour())
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


async def run(
    load: Load, requests: Sequence[Mapping[str, Any]], progress: Callable[[int, int], None] | None = None
) -> tuple[list[Sample], float]:
    """Sends all requests. Returns the samples, in order, and the seconds from the first to the last."""
    at_once = asyncio.Semaphore(load.concurrency if load.rate is None else len(requests))
    n_done = 0
    async with _clients(load) as client:

        async def one(body: Mapping[str, Any], delay_s: float) -> Sample:
            nonlocal n_done
            await asyncio.sleep(delay_s)
            async with at_once, client() as own:
                sample = await request(own, body)
            n_done += 1
            if progress:
                progress(n_done, len(requests))
            return sample

        started = time.perf_counter()
        pairs = zip(requests, _delays(load, len(requests)), strict=True)
        samples = await asyncio.gather(*(one(body, delay) for body, delay in pairs))
        return samples, time.perf_counter() - started


@asynccontextmanager
async def _clients(load: Load) -> AsyncIterator[Callable[[], AbstractAsyncContextManager[Any]]]:
    """Yields what lends an `httpx.AsyncClient` with one connection to each request in flight.

    A client that all of them share looks at each pair of its connections before and after each request: with 128, it
    cannot send more than 14 requests per second.
    """
    import httpx

    headers = {"Authorization": f"Bearer {load.key}"} if load.key else {}
    verify = httpx.create_ssl_context()  # takes 20 ms
    idle: list[httpx.AsyncClient] = []
    async with AsyncExitStack() as stack:

        @asynccontextmanager
        async def lend() -> AsyncIterator[httpx.AsyncClient]:
            client = (
                idle.pop()
                if idle
                else await stack.enter_async_context(
                    httpx.AsyncClient(base_url=load.url, headers=headers, timeout=load.timeout_s, verify=verify)
                )
            )
            try:
                yield client
            finally:
                idle.append(client)

        yield lend


def _delays(load: Load, n: int) -> list[float]:
    """Returns when to send each request, in seconds from the start."""
    if load.rate is None:
        return [0.0] * n
    chance, delays = random.Random(load.seed + 1), [0.0]
    while len(delays) < n:
        delays.append(delays[-1] + chance.expovariate(load.rate))
    return delays


async def request(client: Any, body: Mapping[str, Any]) -> Sample:
    """Sends a request and reads its stream. client: an `httpx.AsyncClient`."""
    import httpx

    sample, started = Sample(body=body), time.perf_counter()
    last, complete = started, False
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                sample.error = f"status {response.status_code}: {(await response.aread())[:200]!r}"
                return sample
            async for line in response.aiter_lines():
                complete = complete or line == "data: [DONE]"
                if line.startswith("data: {"):
                    last = _read(sample, json.loads(line[6:]), started, last)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.total_s = time.perf_counter() - started
    if not complete:
        sample.error = sample.error or "the stream ended early"
    return sample


def _read(sample: Sample, chunk: Mapping[str, Any], started: float, last: float) -> float:
    """Adds a chunk to a sample. Returns when the last chunk with text arrived."""
    now = time.perf_counter()
    if "error" in chunk:
        sample.error = str(chunk["error"])
        return last
    if chunk.get("usage"):
        sample.n_tokens = chunk["usage"]["completion_tokens"]
    text = (chunk["choices"][0]["delta"].get("content") or "") if chunk["choices"] else ""
    if not text:
        return last
    if sample.text:
        sample.gaps_s.append(now - last)
    else:
        sample.first_token_s = now - started
    sample.text += text
    return now


def summary(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """Returns rates, and percentiles of times in milliseconds. Raises LlavaError if no request succeeded."""
    good = [one for one in samples if not one.error]
    errors = [one.error for one in samples if one.error]
    if not good:
        raise LlavaError(f"no request succeeded; the first error: {errors[0]}")
    return {
        "requests": len(samples),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(good) / seconds, 3),
        "tokens_per_s": round(sum(one.n_tokens for one in good) / seconds, 1),
        "first_token_ms": _percentiles([one.first_token_s for one in good]),
        "inter_token_ms": _percentiles([gap for one in good for gap in one.gaps_s]),
        "total_ms": _percentiles([one.total_s for one in good]),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{p}": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 2) for p in _PERCENTILES}
