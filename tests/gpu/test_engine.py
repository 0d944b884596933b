"""What the engine promises holds on a GPU too: its replies are those of the plain model, whatever else it computes.

Each test runs on the CPU as well, so that it is known to be right before it meets a GPU.
"""

import copy
import random
from collections.abc import Callable, Iterable

import pytest
import torch

from llava.config import EngineOptions
from llava.engine.adapters import Variant
from llava.engine.engine import Engine
from llava.engine.reply import Reply
from llava.engine.sampling_params import SamplingParams
from llava.model.paged import cache_bytes_per_token
from llava.preprocess.inputs import ModelInput
from tests.schedules import ADAPTERS, Asked, Reference, Tie, World, compare, count_preemptions, run

Worlds = Callable[[str], World]


@pytest.fixture(scope="module")
def worlds(device: str, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """`worlds(name)`: a model of tests/schedules.py in float32 on the device."""
    made: dict[str, World] = {}

    def world(name: str) -> World:
        if name not in made:
            made[name] = World(name, tmp_path_factory.mktemp("world") / name, device)
        return made[name]

    return world


def in_bfloat16(variant: Variant) -> Variant:
    return variant._replace(model=copy.deepcopy(variant.model).to(torch.bfloat16))


@pytest.mark.parametrize(("name", "decided"), [("llava-tiny", 0.8), ("mpt", 0.2), ("gqa", 0.2), ("window", 0.2)])
def test_greedy_replies_in_bfloat16_are_those_of_float32_where_the_margin_allows(
    worlds: Worlds, graphs: bool, name: str, decided: float
) -> None:
    """A token may differ only where rounding to bfloat16 can change the order of the float32 logits.

    decided: share of the tokens, at least, for which it can not.
    """
    world = worlds(name)
    variant = in_bfloat16(world.variants[None])
    options = EngineOptions(graphs=graphs, chunk_tokens=100, max_batch=6, page_size=7)
    inputs = world.inputs[None]
    replies = Engine({None: variant}, options).generate(inputs, SamplingParams(max_new_tokens=24))
    references, clear = (world.references[None], Reference(variant)), []
    for input, reply in zip(inputs, replies, strict=True):
        ids = torch.tensor(reply.token_ids)
        exact, rounded = (one.logits(input, reply.token_ids)[:-1] for one in references)
        allowed = 4 * (rounded - exact).abs().amax()
        best, second = exact.topk(2).values.T
        assert (best - exact.gather(1, ids[:, None])[:, 0]).amax() < allowed
        clear += (best - second > allowed).tolist()
    assert sum(clear) > decided * len(clear)


def requests(world: World, rng: random.Random, n: int) -> list[Asked]:
    """Random requests: greedy ones, samples with log-probabilities and beams, for all adapters in turn."""
    kinds = {
        "greedy": SamplingParams(max_new_tokens=24),
        "sampled": SamplingParams(max_new_tokens=16, temperature=1.0, seed=3, logprobs=2),
        "beams": SamplingParams(max_new_tokens=7, num_beams=3),
    }
    adapters, names = tuple(world.variants), tuple(kinds)
    made = []
    for i in range(n):
        adapter, kind = adapters[i % len(adapters)], names[i // 2 % len(names)]
        input = rng.choice(world.inputs[adapter])
        made.append(Asked(input, kinds[kind], kind, adapter, arrives=rng.randrange(12)))
    return made


@pytest.mark.parametrize("name", ["adapters", "mpt", "window", "dynamic"])
def test_prefix_hits_preemptions_adapters_and_beams_change_no_reply(worlds: Worlds, graphs: bool, name: str) -> None:
    world = worlds(name)
    asked = requests(world, random.Random(7), 24)
    model = world.variants[None].model
    longest = max(len(one.input.ids) + one.params.max_new_tokens for one in asked)
    n_bytes = 2 * longest * cache_bytes_per_token(model.config.decoder, torch.float32)
    n_copies = 2 if model.device.type == "cpu" else 1
    engine = Engine(
        world.variants,
        EngineOptions(graphs=graphs, chunk_tokens=60, max_batch=8, page_size=5, cache_memory=n_copies * n_bytes),
    )
    preempted = count_preemptions(engine)
    ties = 0
    for one, reply in zip(asked, run(engine, asked), strict=True):
        try:
            compare(world, one, reply)
        except Tie:
            ties += 1
    assert ties <= 2
    assert preempted
    assert engine.stats().prefix_hit_tokens
    assert {one.adapter for one in asked} == ({None, *ADAPTERS} if name == "adapters" else {None})


def bits(reply: Reply) -> tuple[object, ...]:
    return reply.token_ids, reply.logprobs, reply.top_logprobs, reply.prompt_logprobs


@pytest.mark.parametrize("name", ["adapters", "mpt", "gqa", "start-end"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant_logits_have_the_same_bits_alone_and_in_any_batch(
    worlds: Worlds, device: str, graphs: bool, name: str, dtype: torch.dtype
) -> None:
    """Compares the log-probabilities of all tokens of the vocabulary, of requests in batches of 1 to 17."""
    world = worlds(name)
    variants = world.variants
    if dtype == torch.bfloat16:
        variants = {None: in_bfloat16(variants[None])}  # adapters share weights with the base, copies would not
    n_vocab = world.variants[None].model.config.decoder.vocab_size
    rng = random.Random(3)
    pairs: list[tuple[ModelInput, str | None]] = []
    for i in range(17):
        adapter = tuple(variants)[i % len(variants)]
        pairs.append((rng.choice(world.inputs[adapter]), adapter))
    params = [SamplingParams(max_new_tokens=3 + i % 4, logprobs=n_vocab, prompt_logprobs=1) for i in range(17)]

    def replies(chosen: Iterable[int], **options: int) -> dict[int, tuple[object, ...]]:
        """The replies to some of the requests, each of which arrives a step later than the one before it."""
        engine = Engine(variants, EngineOptions(batch_invariant=True, graphs=graphs, page_size=5, **options))
        streams = {}
        for i in chosen:
            streams[i] = engine.stream(pairs[i][0], params[i], adapter=pairs[i][1])
            engine.step()
        for stream in streams.values():
            "".join(stream)  # reads it to its end
        return {i: bits(stream.reply()) for i, stream in streams.items()}

    alone = replies(range(17), max_batch=1, prefix_cache=False)
    for n in (2, 3, 8, 17) if device == "cuda" else (3, 17):
        chosen = rng.sample(range(17), n)
        assert replies(chosen, chunk_tokens=29) == {i: alone[i] for i in chosen}
