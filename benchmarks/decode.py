"""How many tokens per second does one answer get, and what share of the memory bandwidth is that?

Batch 1, greedy, without the prefill. Ours is the engine's own loop, including detokenization and the stop check;
transformers' is a plain loop over its model with its default cache, which is faster than its `generate`. Both copy
each id to the host.

    python benchmarks/decode.py --size tiny
"""

import time
from collections.abc import Sequence
from typing import Annotated, Any, cast

import torch
import typer
from ceilings import best, memory_ceilings, rates
from peers import check_agreement, hub_tensors, peer, peer_configs
from report import OURS, PEER, Commit, Out, Result, Save, benchmark_name
from shapes import IdsAsWords, Layers, Size, llava_config, random_llava
from timing import Device, DType, Runs, Target, Threads, alternate

from llava.engine.engine import Engine
from llava.engine.sampling import SamplingParams
from llava.engine.sequence import Sequence as Generated
from llava.model.attention import DenseCacheContext
from llava.model.kv_cache import KVCache
from llava.preprocess.inputs import ModelInput


def answered(engine: Engine, ids: torch.Tensor, n: int) -> Generated:
    """Runs our engine on a prompt for n + 1 tokens, the first of which comes from the prefill."""
    params = SamplingParams(max_new_tokens=n + 1)
    input = ModelInput(prompt="", token_ids=ids.tolist(), ids=ids, labels=ids)
    sequence = engine.start(input, params)
    for _ in engine.run([sequence], params):
        pass
    assert sequence.n_generated == n + 1
    return sequence


@torch.inference_mode()
def peer_answered(model: Any, ids: torch.Tensor, n: int) -> tuple[float, list[int]]:
    """Runs transformers for n steps. Returns their duration in seconds, and all ids, including that of the prefill."""
    state = model(ids[None], use_cache=True, logits_to_keep=1)
    written = state.logits[:, -1].argmax(-1).tolist()
    started = time.perf_counter()
    for _ in range(n):
        new = torch.tensor([[written[-1]]], device=ids.device)
        state = model(new, past_key_values=state.past_key_values, use_cache=True, logits_to_keep=1)
        written += state.logits[:, -1].argmax(-1).tolist()
    return time.perf_counter() - started, written


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor, target: Target) -> torch.Tensor:
    """Our logits after the prompt."""
    n = len(ids)
    cache = KVCache(model.config.decoder, 1, n, dtype=target.dtype, device=target.device)
    positions = torch.arange(n, device=target.device)
    context = DenseCacheContext(positions=positions, seq_len=n, cache=cache, window=n)
    return model.decoder.logits(model.decoder(model.embed(ids)[None], context, positions[-1:]))


def main(
    device: Device = "auto",
    dtype: DType = "bfloat16",
    layers: Layers = None,
    size: Size = "7b",
    runs: Runs = 5,
    threads: Threads = None,
    prompt: Annotated[int, typer.Option("--prompt", help="prompt tokens")] = 32,
    new: Annotated[int | None, typer.Option("--new", help="timed steps; default: 16 (on a GPU: 128)")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="run ours with torch.compile")] = False,
    out: Out = None,
    save: Save = False,
    commit: Commit = None,
) -> None:
    """Tokens per second of one answer, compared with transformers."""
    from transformers import LlamaForCausalLM

    target = Target.from_options(device, dtype, threads)
    n = new or (128 if target.on_gpu else 16)
    config = llava_config(size, layers, vision=False)
    model = random_llava(config, target)
    tensors = hub_tensors(model.state_dict())
    theirs = peer(LlamaForCausalLM, peer_configs(config)[0], tensors, target)
    engine = Engine(model, cast(Any, IdsAsWords()), compile=compile)
    ids = torch.randint(3, config.decoder.vocab_size, (prompt,), generator=torch.Generator().manual_seed(1))
    here = ids.to(target.device)
    with torch.inference_mode():
        error = check_agreement(logits(model, here, target), theirs(here[None], logits_to_keep=1).logits[:, -1], target)
    same = same_tokens(answered(engine, ids, n).detokenizer.ids, peer_answered(theirs, here, n)[1])
    print(f"first {same} of {n + 1} tokens are the same")

    def ours() -> float:
        answer = answered(engine, ids, n)
        return answer.ended - answer.first_token

    ceilings = memory_ceilings(target, size)
    contestants = {OURS: ours, PEER: lambda: peer_answered(theirs, here, n)[0]}
    seconds = alternate({**contestants, **{c.name: c.run for c in ceilings}}, runs)
    read = sum(t.nbytes for name, t in model.state_dict().items() if name != "decoder.embed.weight")
    ceiling = best(ceilings, seconds)
    speeds = rates(read * n, contestants, ceilings, seconds)
    Result(
        benchmark=benchmark_name("decode", layers=layers, size=size, extra="compiled" if compile else ""),
        question="How many tokens per second does one answer get?",
        device=target.device.type,
        dtype=target.dtype_name,
        settings={
            "size": size, "layers": config.decoder.n_layers, "batch": 1, "prompt_tokens": prompt, "steps": n,
            "runs": runs, "compile": compile, "peer_attention": theirs.config._attn_implementation,
        },
        seconds=seconds,
        unit="tokens/s",
        scale=lambda name, s: n / s if name in contestants else 1 / s,
        more={name: {"GB/s": rate / 1e9, "of the ceiling": rate / ceiling} for name, rate in speeds.items()},
        figures={"relative_difference": error, "same_tokens": same, "GB_read_a_step": read / 1e9},
        commit=commit,
    ).report(out, save)  # fmt: skip


def same_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens before the first that differs. In 16 bits, nearly equal logits can swap places."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


if __name__ == "__main__":
    typer.run(main)
