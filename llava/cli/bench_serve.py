"""The command bench-serve."""

import json
import os
from typing import Annotated, Any

import typer

from llava.cli.app import app, progress_bar
from llava.cli.options import AsJson
from llava.errors import ConfigError


@app.command("bench-serve")
def bench_serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="of a server with OpenAI's API, http://127.0.0.1:8000")],
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="name of the model, as the server lists it")],
    requests: Annotated[int, typer.Option("--requests", help="how many to send")] = 100,
    concurrency: Annotated[int, typer.Option("--concurrency", help="requests at a time")] = 8,
    rate: Annotated[
        float | None, typer.Option("--rate", help="instead, new requests per second, at random times")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="of each reply")] = 64,
    prompt_words: Annotated[int, typer.Option("--prompt-words", help="of each prompt")] = 40,
    pictures: Annotated[int, typer.Option("--pictures", help="in each request")] = 0,
    picture_size: Annotated[int, typer.Option("--picture-size", help="pixels on each side")] = 336,
    seed: Annotated[int, typer.Option("--seed", help="of the words and pictures")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure a server: request and token rates, times to the first token and between tokens. Key: LLAVA_API_KEY."""
    import asyncio

    try:
        import httpx  # noqa: F401
    except ImportError:
        raise ConfigError("llava bench-serve needs httpx: pip install 'llava-native[serve]'") from None
    from llava.serve import bench

    load = bench.Load(
        url=url.rstrip("/"),
        model=model,
        key=os.environ.get("LLAVA_API_KEY", ""),
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        prompt_words=prompt_words,
        max_tokens=max_tokens,
        pictures=pictures,
        picture_size=picture_size,
        seed=seed,
    )
    bodies = bench.bodies(load)
    with progress_bar("requests", unit="requests") as progress:
        found = bench.summary(*asyncio.run(bench.run(load, bodies, progress)))
    print(json.dumps(found) if as_json else _text(found))


def _text(found: dict[str, Any]) -> str:
    lines = [f"{name:<16}{value}" for name, value in found.items() if not isinstance(value, dict) and value is not None]
    for name, values in found.items():
        if isinstance(values, dict):
            lines.append(f"{name:<16}" + ", ".join(f"{key} {value:g}" for key, value in values.items()))
    return "\n".join(lines)
