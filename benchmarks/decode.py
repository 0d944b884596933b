"""How many tokens per second does one answer get, and what share of the memory bandwidth is that?

Batch 1, greedy, without the prefill. Ours are the engine's steps, from the first token to the last one, including
scheduling, detokenization and the stop check; transformers' is a plain loop over its model with its default cache,
which is faster than its `generate`. Both copy each id to the host.

    python benchmarks/decode.py --size tiny
"""

import time
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from ceilings import best, memory_ceilings, rates
from peers import check_agreement, hub_tensors, peer, peer_configs
from result import OURS, PEER, Commit, Out, Result, Save, benchmark_name
from shapes import Layers, Size, engine_for, engine_logits, llava_config, random_llava
from timing import Device, DType, Runs, Target, Threads, alternate

from llava.engine.engine import Engine
from llava.engine.reply import Reply
from llava.engine.sampling_params import SamplingParams
from llava.preprocess.inputs import ModelInput


def answered(engine: Engine, input: ModelInput, n: int) -> Reply:
    """Runs our engine on a prompt for n + 1 tokens, the first of which comes from the prefill."""
    (reply,) = engine.generate([input], SamplingParams(max_new_tokens=n + 1))
    assert len(reply.token_ids) == n + 1
    return reply


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


def main(
    device: Device = "auto",
    dtype: DType = "bfloat16",
    layers: Layers = None,
    size: Size = "7b",
    runs: Runs = 5,
    threads: Threads = None,
    prompt: Annotated[int, typer.Option("--prompt", help="prompt tokens")] = 32,
    new: Annotated[int | None, typer.Option("--new", help="timed steps; default: 16 (on a GPU: 128)")] = None,
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
    engine = engine_for(model)
    ids = torch.randint(3, config.decoder.vocab_size, (prompt,), generator=torch.Generator().manual_seed(1))
    input = ModelInput(prompt="", token_ids=ids.tolist(), ids=ids, labels=ids)
    here = ids.to(target.device)
    with torch.inference_mode():
        error = check_agreement(
            engine_logits(engine, input), theirs(here[None], logits_to_keep=1).logits[:, -1], target
        )
    same = same_tokens(answered(engine, input, n).token_ids, peer_answered(theirs, here, n)[1])
    print(f"first {same} of {n + 1} tokens are the same")

    ceilings = memory_ceilings(target, size)
    contestants = {
        OURS: lambda: answered(engine, input, n).timings.decode_s,
        PEER: lambda: peer_answered(theirs, here, n)[0],
    }
    seconds = alternate({**contestants, **{c.name: c.run for c in ceilings}}, runs)
    read = sum(t.nbytes for name, t in model.state_dict().items() if name != "decoder.embed.weight")
    ceiling = best(ceilings, seconds)
    speeds = rates(read * n, contestants, ceilings, seconds)
    Result(
        benchmark=benchmark_name("decode", layers=layers, size=size),
        question="How many tokens per second does one answer get?",
        device=target.device.type,
        dtype=target.dtype_name,
        settings={
            "size": size, "layers": config.decoder.n_layers, "batch": 1, "prompt_tokens": prompt, "steps": n,
            "runs": runs, "peer_attention": theirs.config._attn_implementation,
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
