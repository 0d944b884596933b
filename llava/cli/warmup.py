"""The command warmup."""

import json
from dataclasses import asdict

from llava.cli.answer import load
from llava.cli.app import app
from llava.cli.kernel_cache import folders
from llava.cli.options import Adapters, AsJson, Base, Checkpoint, EngineFlags, ModelOptions, grouped


@app.command()
@grouped
def warmup(
    checkpoint: Checkpoint,
    *,
    base: Base = None,
    adapter: Adapters = None,
    loading: ModelOptions,
    engine: EngineFlags,
    as_json: AsJson = False,
) -> None:
    """Compile the GPU kernels that a model needs, so that later commands find them in a cache and start faster."""
    engine.options()
    from llava.checkpoint.load import resolve_device

    if resolve_device(loading.device).type == "cpu":
        empty = {"device": "cpu", "seconds": {}, "compiled": [], "cached": 0, "cache_bytes": {}}
        print(
            json.dumps(empty) if as_json else "nothing to warm up: the device is cpu, which needs no compiled kernels"
        )
        return
    vlm = load(checkpoint, loading, base=base, adapters=adapter, engine=engine)
    from llava.warmup import fill_caches

    warmed = fill_caches(vlm, folders())
    print(json.dumps(asdict(warmed)) if as_json else warmed.text())
