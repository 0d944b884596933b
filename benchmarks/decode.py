"""How many tokens a second does one answer get, and how much of the memory's speed is that? Beside transformers.

Batch 1, greedy, the prefill not counted. Ours is the engine's own loop, text and stop check included; transformers' is
a plain loop over its model and its default cache, quicker than its `generate`. Both bring each id to the host.

    python benchmarks/decode.py --size tiny
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Annotated, Any, cast

import bench
import torch
import typer
from bench import OURS, PEER, Place

from llava.engine import step
from llava.engine.engine import Engine
from llava.engine.sampling import SamplingParams
from llava.engine.sequence import Sequence as Generated
from llava.model.attention import CacheContext
from llava.model.kv_cache import KVCache
from llava.preprocess.inputs import ModelInput


class Words:
    """Stands for a tokenizer: each id is a word, none ends an answer."""

    size = 1 << 30
    bos_id = eos_id = None
    special: frozenset[int] = frozenset()

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(f" {id}" for id in ids)

    def id_of(self, text: str) -> int | None:
        return None


def answered(engine: Engine, ids: torch.Tensor, n: int) -> Generated:
    """Ours: a prompt and n + 1 tokens, the first of which belongs to the prefill."""
    params = SamplingParams(max_new_tokens=n + 1)
    input = ModelInput(prompt="", token_ids=ids.tolist(), ids=ids, labels=ids)
    sequence = engine.start(input, params)
    for _ in engine.run([sequence], params):
        pass
    assert sequence.n_generated == n + 1
    return sequence


@torch.inference_mode()
def peer_answered(model: Any, ids: torch.Tensor, n: int) -> tuple[float, list[int]]:
    """transformers': seconds of n steps, and the ids."""
    state = model(ids[None], use_cache=True, logits_to_keep=1)
    written = state.logits[:, -1].argmax(-1).tolist()
    started = time.perf_counter()
    for _ in range(n):
        new = torch.tensor([[written[-1]]], device=ids.device)
        state = model(new, past_key_values=state.past_key_values, use_cache=True, logits_to_keep=1)
        written += state.logits[:, -1].argmax(-1).tolist()
    return time.perf_counter() - started, written


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor, place: Place) -> torch.Tensor:
    """Ours behind the prompt."""
    n = len(ids)
    cache = KVCache(model.config.decoder, 1, n, dtype=place.dtype, device=place.device)
    positions, last = torch.arange(n, device=place.device), torch.tensor([[n - 1]], device=place.device)
    context = CacheContext(positions=positions, seq_len=n, last=last, cache=cache, window=n)
    return step.prefill(model, model.embed(ids)[None], context)


def decode(
    device: bench.Device = "auto",
    dtype: bench.DType = "bfloat16",
    layers: bench.Layers = None,
    size: bench.Size = "7b",
    runs: bench.Runs = 5,
    threads: bench.Threads = None,
    prompt: Annotated[int, typer.Option("--prompt", help="tokens of the prompt")] = 32,
    new: Annotated[int | None, typer.Option("--new", help="steps timed; default 16, on a GPU 128")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="ours through torch.compile")] = False,
    out: bench.Out = None,
    save: bench.Save = False,
    commit: bench.Commit = None,
) -> None:
    """Tokens a second of one answer, beside transformers."""
    from transformers import LlamaForCausalLM

    place = Place.chosen(device, dtype, threads)
    n = new or (128 if place.on_gpu else 16)
    config = bench.config(size, layers, vision=False)
    model = bench.build(config, place)
    tensors = bench.hub_tensors(model.state_dict())
    theirs = bench.peer(LlamaForCausalLM, bench.peer_configs(config)[0], tensors, place)
    engine = Engine(model, cast(Any, Words()), compile=compile)
    ids = torch.randint(3, config.decoder.vocab_size, (prompt,), generator=torch.Generator().manual_seed(1))
    here = ids.to(place.device)
    with torch.inference_mode():
        error = bench.agree(logits(model, here, place), theirs(here[None], logits_to_keep=1).logits[:, -1], place)
    same = same_tokens(answered(engine, ids, n).detokenizer.ids, peer_answered(theirs, here, n)[1])
    print(f"first {same} of {n + 1} tokens are the same")

    def ours() -> float:
        answer = answered(engine, ids, n)
        return answer.ended - answer.first_token

    ceilings = bench.memory_ceilings(place, size)
    contestants = {OURS: ours, PEER: lambda: peer_answered(theirs, here, n)[0]}
    seconds = bench.alternate({**contestants, **{c.name: c.run for c in ceilings}}, runs)
    read = sum(t.nbytes for name, t in model.state_dict().items() if name != "decoder.embed.weight")
    ceiling = bench.best(ceilings, seconds)
    amounts = {OURS: read * n, PEER: read * n, **{c.name: c.amount for c in ceilings}}
    rates = {name: amount / median(seconds[name]) for name, amount in amounts.items()}
    bench.Result(
        benchmark=bench.tag("decode", layers=layers, size=size, extra="compiled" if compile else ""),
        question="How many tokens a second does one answer get?",
        device=place.device.type,
        dtype=place.dtype_name,
        settings={
            "size": size, "layers": config.decoder.n_layers, "batch": 1, "prompt_tokens": prompt, "steps": n,
            "runs": runs, "compile": compile, "peer_attention": theirs.config._attn_implementation,
        },
        seconds=seconds,
        unit="tokens/s",
        scale=lambda name, s: n / s if name in contestants else 1 / s,
        more={name: {"GB/s": rate / 1e9, "of the ceiling": rate / ceiling} for name, rate in rates.items()},
        figures={"relative_difference": error, "same_tokens": same, "GB_read_a_step": read / 1e9},
        commit=commit,
    ).report(out, save)  # fmt: skip


def same_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens up to the first that differs; near-equal logits part ways in 16 bits."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


if __name__ == "__main__":
    typer.run(decode)
