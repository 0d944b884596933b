"""How much slower is decoding when replies do not depend on the batch?

`batch_invariant=True` computes with one kernel for all numbers of rows, where the libraries choose the fastest one for
each. Greedy requests that start together, each with a text prompt of its own, of which all are computed in one step.
Measured are the steps after it, including scheduling, detokenization and the stop check.

    python benchmarks/invariant.py --size tiny
"""

from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
import typer
from result import OURS, Commit, Out, Result, Save, benchmark_name
from shapes import IdsAsWords, Layers, Size, llava_config, random_llava
from timing import Device, DType, Runs, Target, Threads, alternate

from llava.config import EngineOptions
from llava.engine.adapters import Variant
from llava.engine.engine import Engine
from llava.engine.sampling_params import SamplingParams
from llava.model.llava import Llava
from llava.preprocess.inputs import ModelInput, Preprocessor

INVARIANT = "llava, batch-invariant"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that start together."""

    batch: int = 1
    prompt: int = 704  # tokens cached before the first step that is timed
    new: int = 32  # timed steps


def prompts(n_vocab: int, work: Workload) -> list[ModelInput]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, n_vocab, (work.batch, work.prompt), generator=generator)
    return [ModelInput(prompt="", token_ids=ids.tolist(), ids=ids, labels=ids) for ids in rows]


def engine_with(model: Llava, work: Workload, *, batch_invariant: bool) -> Engine:
    """Returns an engine that computes the same prompts again each time, all of them in one step."""
    options = EngineOptions(
        max_batch=work.batch,
        prefix_cache=False,
        batch_invariant=batch_invariant,
        chunk_tokens=work.batch * work.prompt,
    )
    return Engine({None: Variant(model, Preprocessor(model.config, cast(Any, IdsAsWords())))}, options)


def decode_seconds(engine: Engine, inputs: list[ModelInput], work: Workload) -> float:
    """Runs the requests to their end. Returns the seconds from the first tokens to the last ones."""
    replies = engine.generate(inputs, SamplingParams(max_new_tokens=work.new + 1))
    assert all(len(reply.token_ids) == work.new + 1 for reply in replies)
    return max(reply.timings.decode_s for reply in replies)


def invariant_seconds(model: Llava, work: Workload, runs: int) -> dict[str, list[float]]:
    """Returns the seconds of each run with and without `batch_invariant`. The two take turns."""
    inputs = prompts(model.config.decoder.vocab_size, work)
    engines = {name: engine_with(model, work, batch_invariant=name == INVARIANT) for name in (OURS, INVARIANT)}
    return alternate(
        {name: lambda engine=engine: decode_seconds(engine, inputs, work) for name, engine in engines.items()}, runs
    )


def invariant_cost(model: Llava, work: Workload | None = None, runs: int = 3) -> tuple[float, float]:
    """Returns the median tokens/s of all requests together, with `batch_invariant` and without."""
    work = work or Workload()
    seconds = invariant_seconds(model, work, runs)
    with_it, without = (sorted(seconds[name])[runs // 2] for name in (INVARIANT, OURS))
    return work.batch * work.new / with_it, work.batch * work.new / without


def main(
    device: Device = "auto",
    dtype: DType = "bfloat16",
    layers: Layers = None,
    size: Size = "7b",
    runs: Runs = 3,
    threads: Threads = None,
    batch: Annotated[int, typer.Option("--batch", help="requests that run together", min=1)] = 1,
    prompt: Annotated[int | None, typer.Option("--prompt", help="prompt tokens; default: 32 (on a GPU: 704)")] = None,
    new: Annotated[int | None, typer.Option("--new", help="timed steps; default: 8 (on a GPU: 64)")] = None,
    out: Out = None,
    save: Save = False,
    commit: Commit = None,
) -> None:
    """Tokens per second with and without `batch_invariant`."""
    target = Target.from_options(device, dtype, threads)
    default = Workload(batch=batch, prompt=704, new=64) if target.on_gpu else Workload(batch=batch, prompt=32, new=8)
    work = Workload(batch=batch, prompt=prompt or default.prompt, new=new or default.new)
    config = llava_config(size, layers, vision=False)
    seconds = invariant_seconds(random_llava(config, target), work, runs)
    Result(
        benchmark=benchmark_name("invariant", layers=layers, size=size),
        question="How much slower is decoding when replies do not depend on the batch?",
        device=target.device.type,
        dtype=target.dtype_name,
        settings={
            "size": size, "layers": config.decoder.n_layers, "batch": work.batch, "prompt_tokens": work.prompt,
            "steps": work.new, "runs": runs,
        },
        seconds=seconds,
        unit="tokens/s",
        scale=lambda name, s: work.batch * work.new / s,
        pairs=((INVARIANT, OURS),),
        commit=commit,
    ).report(out, save)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
