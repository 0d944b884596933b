"""Runs random schedules of requests on the engine and compares every reply with the plain model.

    python -m tests.schedules --n 1000 --seed 0 --out results.json     all models in turn
    python -m tests.schedules --n 300 --device cuda --jobs 6           on a GPU, in six processes
    python -m tests.schedules --seed 0 --case 17                       repeats one schedule and shows its details

A schedule is an engine with random options (chunks, pages, memory, prefix cache, batch size) and random requests, which
arrive, are aborted and fail at random steps. The reference computes whole sequences with `Decoder.forward` in float32,
without a cache. A token may differ only where the reference's two best scores are closer than TIE; the rest of that
reply is not compared. With batch_invariant=True, replies and log-probabilities must equal those of the same request
alone in an engine, without exception.
"""

import argparse
import json
import logging
import os
import platform
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Rest
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # before torch is imported

import torch
from PIL import Image
from torch import Tensor

import llava
from llava.config import IMAGE, EngineOptions
from llava.engine.adapters import Variant
from llava.engine.beam import BeamSearch
from llava.engine.engine import Engine
from llava.engine.reply import Output
from llava.engine.sampling import gumbel_noise, process, sample, warp
from llava.engine.sampling_params import SamplingParams
from llava.engine.sequence import FinishReason, Sequence
from llava.errors import LlavaError
from llava.model.attention import CausalContext
from llava.model.paged import cache_bytes_per_token
from llava.preprocess.inputs import ModelInput
from tests import tiny

TIE = 1e-4  # logits closer than this may be ordered either way
MAX_STEPS = 20_000  # of a schedule; more means that a request waits for ever
MARKS = ("<im_start>", "<im_end>")
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 96}
WINDOW: dict[str, Any] = {
    "model_type": "llava_mistral",
    "architectures": ["LlavaMistralForCausalLM"],
    "sliding_window": 24,
    "num_key_value_heads": 2,
}
ADAPTERS = ("cats", "dogs", "june")


# ------------------------------------------------------------------------------------------------ models and inputs


# Loads a model onto a device, after writing it into a folder
Load = Callable[[Path, str], llava.Assistant]


def _llava(**config: Any) -> Load:
    def load(folder: Path, device: str) -> llava.Assistant:
        clip = tiny.write_clip(folder / "clip")
        return _load(tiny.write_llava(folder / "model", clip=clip, **config), device)

    return load


def _load(path: Path | None, device: str, **options: Any) -> llava.Assistant:
    return llava.load(path, dtype="float32", device=device, **options)


def _mpt(folder: Path, device: str) -> llava.Assistant:
    return _load(tiny.write_mpt(folder / "model", clip=tiny.write_clip(folder / "clip")), device)


def _adapters(folder: Path, device: str) -> llava.Assistant:
    clip = tiny.write_clip(folder / "clip")
    more = {"vocab_size": tiny.PIECES + len(MARKS), "mm_use_im_start_end": True, "mm_projector_type": "linear"}
    tiny.write_lora(folder / "cats", clip=clip)
    tiny.write_lora(folder / "dogs", clip=clip, seed=5, targets=("k_proj", "down_proj"))
    tiny.write_lora(folder / "june", clip=clip, seed=6, added=MARKS, rows=True, **more)
    names = {name: folder / name for name in ADAPTERS}
    return _load(tiny.write_llava(folder / "base", clip=clip), device, adapters=names)


MODELS: dict[str, Load] = {
    "llava-tiny": lambda folder, device: _load(None, device),
    "mpt": _mpt,
    "gqa": _llava(num_key_value_heads=2),
    "window": _llava(**WINDOW),
    "dynamic": _llava(**DYNAMIC),
    "anyres": _llava(tower_seed=5, **tiny.ANYRES),
    "start-end": _llava(added=MARKS, mm_use_im_start_end=True),
    "adapters": _adapters,
}
QUESTIONS = (
    "What is it?",
    "Hi",
    "Which colours do you see? Answer in a few words.",
    "Look at the left side of the photo, then at the right one, and compare the two. Which one is darker?",
    "Once upon a time there was a painter who would only ever paint the sea. What is unusual about it?",
)


def pictures() -> list[Image.Image]:
    gradient = Image.linear_gradient("L")
    radial = Image.radial_gradient("L")
    return [gradient.resize((90, 60)), gradient.rotate(90).resize((56, 56)), radial.resize((40, 120))]


def conversations() -> list[Any]:
    """Prompts that share beginnings: pictures with several questions, second turns, several pictures, only text."""

    def user(text: str, *images: Image.Image) -> dict[str, Any]:
        return {"role": "user", "content": [*({"type": "image", "image": i} for i in images), _text(text)]}

    first, second, third = pictures()
    made: list[Any] = [[user(question)] for question in QUESTIONS]
    made += [[user(question, picture)] for picture in (first, second) for question in QUESTIONS[:3]]
    made.append([user(QUESTIONS[1], first, third)])
    answer = {"role": "assistant", "content": [_text("A boat lies at the shore of a lake.")]}
    made.append([user(QUESTIONS[0], first), answer, user(QUESTIONS[2])])
    made.append([user(QUESTIONS[4]), answer, user(QUESTIONS[3])])
    return made


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


class World:
    """A model with its adapters, and inputs prepared for each of them."""

    def __init__(self, name: str, folder: Path, device: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.variants = MODELS[name](folder, device).engine.variants
        self.references = {adapter: Reference(variant) for adapter, variant in self.variants.items()}
        self.alone: dict[tuple[Any, ...], Replied] = {}  # replies of requests that had an engine to themselves

    @cached_property
    def inputs(self) -> dict[str | None, list[ModelInput]]:
        messages = conversations()
        return {
            name: [variant.preprocessor.prepare(one) for one in messages] for name, variant in self.variants.items()
        }


# ---------------------------------------------------------------------------------------------------- the reference


@dataclass
class Row:
    """The state of a request from which the reference selects the next token. See `sampling.SamplingRow`."""

    params: SamplingParams
    seed: int
    prompt_ids: Rest[int]
    reply_ids: Rest[int]

    @property
    def n_generated(self) -> int:
        return len(self.reply_ids)


class Reference:
    """The model without an engine, a cache or a batch: each result comes from a forward pass over a whole sequence."""

    def __init__(self, variant: Variant):
        self.model, self.preprocessor = variant
        self._prompts: dict[int, Tensor] = {}  # embeddings by the id of the input
        scaling = self.model.config.decoder.rope_scaling
        self.is_dynamic = scaling is not None and scaling.kind == "dynamic"

    @torch.inference_mode()
    def logits(self, input: ModelInput, reply: Rest[int]) -> Tensor:
        """The logits after the prompt and after each token of the reply, [1 + len(reply), V] on the CPU."""
        states = self._states(input, reply)
        return self.model.decoder.logits(states[len(input.ids) - 1 :]).cpu()

    @torch.inference_mode()
    def prompt_logprobs(self, input: ModelInput) -> list[float | None]:
        """The log-probability of each token of the prompt but the first; None for those of pictures."""
        logprobs = self.model.decoder.logits(self._states(input, ())).log_softmax(-1).cpu()
        following: list[int] = input.ids.tolist()[1:]
        return [None if id == IMAGE else logprobs[i, id].item() for i, id in enumerate(following)]

    def _states(self, input: ModelInput, reply: Rest[int]) -> Tensor:
        device = self.model.device
        if id(input) not in self._prompts:
            images: list[Tensor] = []
            if input.pixels is not None:
                images = self.model.encode_images(input.pixels.to(device), input.views, input.grids)
            self._prompts[id(input)] = self.model.embed(input.ids.to(device), images)
        prompt = self._prompts[id(input)]
        x = torch.cat([prompt, self.model.decoder.lookup(torch.tensor(reply, dtype=torch.int64, device=device))])[None]
        context = CausalContext.of(x)
        if self.is_dynamic:  # a prompt is rotated for its length, and each generated token for the length up to it
            lengths = torch.arange(1, x.shape[1] + 1, device=device).clamp(min=len(prompt))
            context = CausalContext(positions=context.positions, seq_len=lengths)
        states: Tensor = self.model.decoder(x, context)[0]
        return states

    def stops(self, request: "Asked") -> tuple[list[str], set[int]]:
        tokenizer = self.preprocessor.tokenizer
        strings = [*request.params.stop, *([request.input.stop] if request.input.stop else [])]
        ids = {tokenizer.eos_id, *self.model.config.eos_ids, *map(tokenizer.id_of, strings)}
        return strings, {id for id in ids if id is not None}

    def beam_search(self, request: "Asked") -> tuple[list[int], float]:
        """The ids of the best hypothesis and its log-probability per token."""
        _, stop_ids = self.stops(request)
        search = BeamSearch(request.params.num_beams, stop_ids, request.params.max_new_tokens)
        while not search.finished:
            rows = [request.row(ids) for ids in search.live]
            logits = torch.stack([self.logits(request.input, ids)[-1] for ids in search.live])
            search.advance(process(logits.log_softmax(-1), rows))
        best = search.best()
        return best, self.mean_logprob(request, best)

    def mean_logprob(self, request: "Asked", reply: Rest[int]) -> float:
        logits = self.logits(request.input, reply)[:-1]
        rows = [request.row(reply[:i]) for i in range(len(reply))]
        logprobs = process(logits.log_softmax(-1), rows)
        return logprobs.gather(1, torch.tensor(reply)[:, None]).mean().item()


# ------------------------------------------------------------------------------------------------------- a schedule


class Planned(Exception):
    """Raised by a logits_mask on purpose."""


def even_ids(n_vocab: int) -> Callable[[Rest[int]], Tensor]:
    """A logits_mask that allows ids by turns: even ones, then those divisible by three."""
    return lambda ids: torch.arange(n_vocab) % (2 + len(ids) % 2) == 0


def failing(after: int, n_vocab: int) -> Callable[[Rest[int]], Tensor]:
    """A logits_mask that raises after some tokens."""

    def mask(ids: Rest[int]) -> Tensor:
        if len(ids) >= after:
            raise Planned("on purpose")
        return torch.ones(n_vocab, dtype=torch.bool)

    return mask


@dataclass
class Asked:
    """A request of a schedule."""

    input: ModelInput
    params: SamplingParams
    kind: str
    adapter: str | None = None
    priority: int = 0
    arrives: int = 0  # step
    aborted: int | None = None  # step
    key: tuple[Any, ...] = ()  # equal for equal requests

    def row(self, reply: Rest[int]) -> Row:
        return Row(self.params, self.params.seed or 0, self.input.ids.tolist(), reply)


@dataclass
class Replied:
    """What the engine returned for a request."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: LlavaError | None = None
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)

    def add(self, output: Output) -> None:
        assert self.finish_reason is None, "an output after the last one"
        self.text += output.text
        self.ids += output.token_ids
        self.finish_reason, self.error = output.finish_reason, output.error


KINDS = {"greedy": 6, "logprobs": 2, "sampled": 3, "penalties": 2, "masked": 1, "stop": 2, "beams": 1, "failing": 1,
         "prompt_logprobs": 1, "nothing": 0.5}  # fmt: skip
INVARIANT_KINDS = {"logprobs": 6, "sampled": 2, "penalties": 1, "prompt_logprobs": 1}


def random_params(rng: random.Random, kind: str, n_vocab: int, stop: Rest[str]) -> SamplingParams:
    n = rng.choice((1, 3, 8, 20, 40))
    if kind == "logprobs":
        return SamplingParams(max_new_tokens=n, logprobs=rng.choice((1, 3)))
    if kind == "sampled":
        more = rng.choice(({}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.2}))
        return SamplingParams(
            max_new_tokens=n, temperature=rng.choice((0.3, 1.0)), seed=rng.randrange(2**62), logprobs=1, **more
        )
    if kind == "penalties":
        bias = {rng.randrange(n_vocab): rng.uniform(-2, 4) for _ in range(3)}
        return SamplingParams(
            max_new_tokens=n, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.1, logit_bias=bias,
            logprobs=1,
        )  # fmt: skip
    if kind == "masked":
        return SamplingParams(max_new_tokens=n, logits_mask=even_ids(n_vocab))
    if kind == "stop":
        return SamplingParams(max_new_tokens=40, stop=tuple(rng.sample(stop, 2)))
    if kind == "beams":
        return SamplingParams(max_new_tokens=rng.choice((1, 4, 7)), num_beams=rng.choice((2, 3, 4)))
    if kind == "failing":
        return SamplingParams(max_new_tokens=n, logits_mask=failing(rng.choice((0, 1, 4)), n_vocab))
    if kind == "prompt_logprobs":
        return SamplingParams(max_new_tokens=rng.choice((0, 2)), prompt_logprobs=1)
    return SamplingParams(max_new_tokens=0 if kind == "nothing" else n)


STOPS = ("e", "th", "is a", "ing", ".", "an", "re", " o", "st", "on")  # some of these are in most replies


def random_request(rng: random.Random, world: World, invariant: bool) -> Asked:
    adapter = rng.choice(tuple(world.variants))
    kinds = INVARIANT_KINDS if invariant else KINDS
    kind = rng.choices(tuple(kinds), tuple(kinds.values()))[0]
    i = rng.randrange(len(world.inputs[adapter]))
    n_vocab = world.variants[adapter].model.config.decoder.vocab_size
    # few options with batch_invariant=True, so that replies to the same request alone can be reused
    seed = rng.randrange(3) if invariant else rng.randrange(2**32)
    params = random_params(random.Random(f"{kind}/{seed}"), kind, n_vocab, STOPS)
    return Asked(
        input=world.inputs[adapter][i],
        params=params,
        kind=kind,
        adapter=adapter,
        priority=rng.choice((0, 0, 0, 1, -1)),
        arrives=rng.choice((0, 0, rng.randrange(40))),
        aborted=rng.randrange(60) if rng.random() < 0.1 else None,
        key=(adapter, i, kind, seed),
    )


def random_options(rng: random.Random, world: World, requests: Rest[Asked], invariant: bool) -> EngineOptions:
    page_size = rng.randint(1, 32)
    model = world.variants[None].model
    longest = max(len(one.input.ids) + one.params.max_new_tokens for one in requests)
    total = sum(len(one.input.ids) + one.params.max_new_tokens for one in requests)
    # from the longest request by itself to all of them at once
    n_tokens = min(total, int(longest * rng.choice((1.0, 1.2, 2.0, 4.0)))) + page_size
    n_copies = 1 if invariant or model.device.type != "cpu" else 2  # on a CPU, half of the memory is for dense copies
    n_bytes = n_copies * page_size * cache_bytes_per_token(model.config.decoder, torch.float32)
    return EngineOptions(
        max_batch=rng.randint(1, 16),
        cache_memory=n_tokens // page_size * n_bytes,
        page_size=page_size,
        chunk_tokens=rng.choice((rng.randint(1, 16), rng.randint(1, 300))),
        prefix_cache=rng.random() < 0.7,
        batch_invariant=invariant,
        graphs=rng.random() < 0.5,
    )


class Failure(Exception):
    """The engine did something wrong."""


def run(engine: Engine, requests: Rest[Asked]) -> list[Replied]:
    """Runs a schedule. Raises Failure if requests are lost or pages are not given back."""
    replies = [Replied() for _ in requests]
    by_number: dict[int, int] = {}
    numbers: dict[int, int] = {}
    sequences: dict[int, Sequence] = {}  # outputs have no log-probabilities
    for step in range(MAX_STEPS):
        for i, one in enumerate(requests):
            if one.arrives == step:
                try:
                    numbers[i] = engine.add_request(one.input, one.params, adapter=one.adapter, priority=one.priority)
                    by_number[numbers[i]] = i
                    sequences[numbers[i]] = engine._inbox[-1]
                except LlavaError as error:
                    if one.params.num_beams == 1:
                        raise Failure(f"refused: {error}") from None
                    replies[i].finish_reason, replies[i].error = "error", error  # too many beams for the cache
            if one.aborted == step and i in numbers:
                engine.abort(numbers[i])
        for output in engine.step():
            reply = replies[by_number[output.request]]
            reply.add(output)
            if output.finish_reason:
                reply.logprobs = sequences[output.request].logprobs
                reply.prompt_logprobs = sequences[output.request].prompt_logprobs
        if not engine.has_requests:
            _check_idle(engine)
            if all(one.arrives <= step for one in requests):
                return replies
    raise Failure(f"requests wait for ever: {engine.stats()}")


def _check_idle(engine: Engine) -> None:
    engine.check()
    stats = engine.stats()
    if stats.pages_used or stats.running or stats.waiting:
        raise Failure(f"an idle engine holds pages: {stats}")


# ------------------------------------------------------------------------------------------------------- comparison


class Tie(Exception):
    """The reference's two best tokens are closer than TIE where the engine chose another one."""


def compare(world: World, request: Asked, reply: Replied) -> None:
    """Compares a reply with the reference. Raises Failure or Tie."""
    reference = world.references[request.adapter]
    if reply.finish_reason == "error":
        if request.kind not in ("failing", "beams"):
            raise Failure(f"an error: {reply.error}")
        if request.kind == "failing" and "on purpose" not in str(reply.error):
            raise Failure(f"another error: {reply.error}")
    if request.params.num_beams > 1:
        return _compare_beams(reference, request, reply)
    logits = reference.logits(request.input, reply.ids)
    for i, id in enumerate(reply.ids):
        _compare_token(request, logits[i], reply.ids[:i], id)
    _compare_logprobs(reference, request, reply, logits)
    return _compare_end(reference, request, reply)


def _compare_token(request: Asked, logits: Tensor, before: list[int], id: int) -> None:
    row = request.row(before)
    if sample(logits[None], [row]).item() == id:
        return
    scores = process(logits[None], [row])
    tie = TIE
    if request.params.temperature:
        weights = warp(scores, scores.amax(-1), [request.params])
        scores = weights + gumbel_noise(torch.tensor([row.seed]), torch.tensor([len(before)]), logits.shape[-1])
        tie /= request.params.temperature
    first, second = scores[0].topk(2).values.tolist()
    if first - second < tie:
        raise Tie
    raise Failure(f"token {len(before)} is {id}, expected {int(scores.argmax())}; margin {first - second:.2e}")


def _compare_logprobs(reference: Reference, request: Asked, reply: Replied, logits: Tensor) -> None:
    if request.params.logprobs:
        expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(reply.ids, dtype=torch.int64)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(reply.logprobs), expected, rtol=0, atol=1e-3)
    if request.params.prompt_logprobs and reply.finish_reason != "abort":
        wanted = reference.prompt_logprobs(request.input)
        found = reply.prompt_logprobs
        if [one is None for one in found] != [one is None for one in wanted]:
            raise Failure(f"{len(found)} prompt log-probabilities, expected {len(wanted)}")
        pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None and b is not None]
        if any(abs(a - b) > 1e-3 for a, b in pairs):
            raise Failure("other prompt log-probabilities")


def _compare_end(reference: Reference, request: Asked, reply: Replied) -> None:
    """Checks that the reply ends where it has to, and its text."""
    decode = reference.preprocessor.tokenizer.decode
    strings, stop_ids = reference.stops(request)
    if reply.finish_reason != "stop":
        context = reference.model.config.decoder.max_seq
        n = min(request.params.max_new_tokens, context - len(request.input.ids))
        if reply.finish_reason == "length" and len(reply.ids) != n:
            raise Failure(f"{len(reply.ids)} tokens, expected {n}")
        if reply.text != decode(reply.ids).strip():
            raise Failure(f"the text is {reply.text!r}, expected {decode(reply.ids).strip()!r}")
        return
    ids = list(reply.ids)
    while len(ids) < request.params.max_new_tokens:
        chosen = int(sample(reference.logits(request.input, ids)[-1:], [request.row(ids)]).item())
        if chosen in stop_ids:
            expected = decode(ids).strip()
            break
        ids.append(chosen)
        found = [at for at in (decode(ids).find(stop) for stop in strings) if at >= 0]
        if found:
            expected = decode(ids)[: min(found)].strip()
            break
    else:
        raise Failure("the reply stops too early")
    if reply.text != expected:
        raise Failure(f"the text is {reply.text!r}, expected {expected!r}")


def _compare_beams(reference: Reference, request: Asked, reply: Replied) -> None:
    if reply.finish_reason in ("abort", "error"):
        if reply.error and "beams" not in str(reply.error):
            raise Failure(f"an error: {reply.error}")
        return
    _, stop_ids = reference.stops(request)
    expected, best = reference.beam_search(request)
    expected = [id for id in expected if id not in stop_ids]
    if reply.ids == expected:
        return
    if abs(reference.mean_logprob(request, reply.ids) - best) < TIE:
        raise Tie
    raise Failure(f"beam search found {reply.ids}, expected {expected}")


def compare_alone(world: World, request: Asked, reply: Replied) -> None:
    """Checks that a reply equals, bit by bit, that to the same request alone in a batch-invariant engine."""
    if request.key not in world.alone:
        engine = Engine(world.variants, EngineOptions(batch_invariant=True, max_batch=1, graphs=False))
        world.alone[request.key] = run(engine, [Asked(request.input, request.params, request.kind, request.adapter)])[0]
    alone = world.alone[request.key]
    n = len(reply.ids) if reply.finish_reason == "abort" else None
    if reply.ids != alone.ids[:n] or reply.logprobs != alone.logprobs[:n]:
        differ = [i for i, (a, b) in enumerate(zip(reply.logprobs, alone.logprobs, strict=False)) if a != b]
        raise Failure(f"with batch_invariant=True, another reply than alone, from token {differ[:1]} on")
    if n is None and (reply.text, reply.prompt_logprobs) != (alone.text, alone.prompt_logprobs):
        raise Failure("with batch_invariant=True, another text than alone")


def run_case(
    seed: int, number: int, worlds: dict[str, World], *, overlap: bool | None = None, fused: bool | None = None
) -> dict[str, Any]:
    """Runs one schedule and returns its result: counts, and what went wrong. overlap, fused: see `Engine`."""
    rng = random.Random(f"{seed}/{number}")
    world = worlds[tuple(worlds)[number % len(worlds)]]
    invariant = rng.random() < 0.2
    requests = [random_request(rng, world, invariant) for _ in range(rng.choice((1, 3, 6, 10, 16)))]
    options = random_options(rng, world, requests, invariant)
    result: dict[str, Any] = {"case": number, "model": world.name, "options": str(options), "invariant": invariant}
    started = time.monotonic()
    counts: Counter[str] = Counter()
    detail = ""
    try:
        engine = Engine(world.variants, options, overlap=overlap, fused=fused)
        preempted = count_preemptions(engine)
        replies = run(engine, requests)
        counts.update({"preemptions": len(preempted), "prefix_hit_tokens": engine.stats().prefix_hit_tokens})
        counts["feature_hits"] += engine.stats().feature_hits
    except Exception as error:  # a crash of the engine is a finding like any other
        detail, replies = f"{type(error).__name__}: {error}", []
    for i, (request, reply) in enumerate(zip(requests, replies, strict=False)):
        counts.update([request.kind, f"finish: {reply.finish_reason}"])
        counts["tokens"] += len(reply.ids)
        try:
            compare(world, request, reply)
        except Tie:
            counts["ties"] += 1
        except (Failure, AssertionError) as error:
            detail = detail or f"request {i} ({request.kind}): {error}"
        if invariant:
            try:
                compare_alone(world, request, reply)
            except Failure as error:
                detail = detail or f"request {i} ({request.kind}): {error}"
    counts["requests"] += len(requests)
    return result | {
        "outcome": "wrong" if detail else "equal",
        "detail": detail,
        "counts": dict(counts),
        "seconds": time.monotonic() - started,
    }


def count_preemptions(engine: Engine) -> list[int]:
    """Returns a list to which the engine adds each sequence that it preempts."""
    preempted: list[int] = []
    preempt = engine.scheduler.preempt

    def counted(sequence: Any) -> None:
        preempted.append(sequence.id)
        preempt(sequence)

    engine.scheduler.preempt = counted  # type: ignore[method-assign]
    return preempted


def summary(results: list[dict[str, Any]], options: argparse.Namespace, took: float) -> dict[str, Any]:
    """The figures of a run for the result file."""
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result["counts"])
    return {
        "schedules": len(results),
        "seed": options.seed,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "seconds": round(took, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "llava": llava.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "tie": TIE,
        "batch_invariant": sum(result["invariant"] for result in results),
        "outcomes": dict(Counter(result["outcome"] for result in results)),
        "ties_per_request": counts["ties"] / max(1, counts["requests"]),
        "counts": dict(sorted(counts.items())),
        "models": dict(Counter(result["model"] for result in results)),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "failures": [result for result in results if result["outcome"] != "equal"],
    }


def load_worlds(folder: Path, device: str = "cpu") -> dict[str, World]:
    return {name: World(name, folder / name, device) for name in MODELS}


def run_cases(seed: int, numbers: Rest[int], device: str, overlap: bool | None) -> list[dict[str, Any]]:
    """Runs schedules and reports those that go wrong as soon as they end."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL if len(numbers) > 1 else logging.NOTSET)
    results = []
    with tempfile.TemporaryDirectory(prefix="schedules-") as scratch:
        worlds = load_worlds(Path(scratch), device)
        for number in numbers:
            results.append(result := run_case(seed, number, worlds, overlap=overlap))
            if result["outcome"] != "equal":
                print(number, result["model"], result["options"], "\n ", result["detail"], flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the counts and failures")
    parser.add_argument("--case", type=int, help="run only this schedule and show its details")
    parser.add_argument("--overlap", action="store_true", help="launch a step before the tokens of the last are read")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the schedules")
    options = parser.parse_args()
    overlap = options.overlap or None  # None: as the device does by itself
    if options.case is not None:
        print(json.dumps(run_cases(options.seed, [options.case], options.device, overlap), indent=1))
        return 0
    started = time.perf_counter()
    shares = [range(i, options.n, options.jobs) for i in range(options.jobs)]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(run_cases, options.seed, share, options.device, overlap) for share in shares]
        results = sorted((one for run in runs for one in run.result()), key=lambda result: result["case"])
    report = summary(results, options, time.perf_counter() - started)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"outcomes": report["outcomes"], "counts": report["counts"], "seconds": report["seconds"]}))
    return int(bool(report["failures"]))


if __name__ == "__main__":
    sys.exit(main())
