"""The command warmup."""

import json
import time
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
        found = {"device": "cpu", "stages": [], "compiled": [], "cache_bytes": {}}
        print(
            json.dumps(found) if as_json else "nothing to warm up: the device is cpu, which needs no compiled kernels"
        )
        return
    started = time.perf_counter()
    vlm = load(checkpoint, loading, base=base, adapters=adapter, engine=engine)
    from llava import warmup as job
    from llava.doctor import measure
    from llava.errors import counted
    from llava.tensors.atomic import size_text

    stages = [job.Stage("load", time.perf_counter() - started)]
    caches = folders()
    before = job.compiled_kernels(caches["triton"])
    for stage in job.warm_up(vlm):
        stages.append(stage)
    kernels = job.compiled_kernels(caches["triton"])
    compiled = sorted(name for path, name in kernels.items() if path not in before)
    sizes = {str(folder): measure(folder)[0] for folder in caches.values()}
    if as_json:
        found = {"device": str(vlm.device), "stages": [asdict(one) for one in stages], "compiled": compiled}
        print(json.dumps(found | {"cache_bytes": sizes}))
        return
    for one in stages:
        print(f"{one.name:<12}{one.seconds:8.2f} s")
    names = f": {', '.join(sorted(set(compiled)))}" if compiled else ""
    print(f"compiled {counted(len(compiled), 'kernel')}{names}; {len(before)} were in the cache before")
    for folder, n_bytes in sizes.items():
        print(f"{folder}: {size_text(n_bytes)}")
