"""Our cases of `gpu.py`, measured through the engine of an `Assistant` with a random model of the published shapes."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from ceilings import tower_flops
from gpu_ceilings import ceilings
from gpu_decoding import Decoding, lead_in
from gpu_inputs import (
    EndlessTokenizer,
    jpeg_decoder,
    jpegs,
    picture_input,
    random_ids,
    random_picture_input,
    random_pixels,
    text_input,
    values_unlike_pillow,
)
from gpu_profile import profiled, table
from gpu_setup import CLIP_BATCHES, DECODE_ROWS, INVARIANT_ROWS, Measured, Setup, Skipped, Work
from prefill import flops
from result import OURS
from shapes import llava_config, mpt_config, random_llava

from llava.assistant import Assistant, question_about
from llava.config import EngineOptions, LlavaConfig
from llava.engine.engine import Engine
from llava.engine.graphs import Graphs
from llava.engine.memory import free_bytes
from llava.engine.sampling_params import SamplingParams
from llava.engine.vision_graphs import VisionGraphs
from llava.model.paged import cache_bytes_per_token
from llava.model.shallow import shallow_copy
from llava.preprocess.inputs import Preprocessor

_SLACK = 32  # tokens that a row of the cache has beyond the longest request: partly filled pages, steps in flight


class Ours:
    """A random model and the engine of the current case. Cases with the same engine share it."""

    def __init__(self, setup: Setup, config: LlavaConfig):
        self.setup, self.target, self.lengths, self.config = setup, setup.target, setup.lengths, config
        self.model = random_llava(config, self.target)
        state = self.model.state_dict()
        # a step reads a few rows of the embedding table, and all rows of the head, also if they are the same weight
        self.weight_bytes = sum(
            t.nbytes for name, t in state.items() if name.startswith("decoder.") and name != "decoder.embed.weight"
        )
        self.tower_bytes = sum(t.nbytes for name, t in state.items() if name.startswith("vision."))
        self._options: EngineOptions | None = None
        self._assistant: Assistant | None = None

    def assistant(self, rows: int, row_tokens: int, **options: bool) -> Assistant:
        """An assistant that runs `rows` requests of `row_tokens` tokens at once. Kept until another one is needed."""
        settings = {
            "max_batch": rows,
            "cache_memory": self.cache_bytes(rows * (row_tokens + _SLACK)),
            "prefix_cache": False,
            "graphs": self.setup.graphs,
            "batch_invariant": self.setup.batch_invariant,
        }
        chosen = EngineOptions(**settings | options)
        if self._assistant is None or self._options != chosen:
            self.free()
            tokenizer: Any = EndlessTokenizer(self.config.decoder.vocab_size)
            preprocessor = Preprocessor(self.config, tokenizer, template="vicuna_v1")
            self._assistant, self._options = Assistant(self.model, preprocessor, options=chosen), chosen
        return self._assistant

    def cache_bytes(self, tokens: int) -> int:
        copies = 1 if self.target.on_gpu else 2
        return copies * tokens * cache_bytes_per_token(self.config.decoder, self.target.dtype)

    def rows_that_fit(self, rows: int, row_tokens: int) -> int:
        """At most `rows`, as many as 85 % of the free memory holds."""
        self.free()
        return max(1, min(rows, int(0.85 * free_bytes(self.target.device)) // self.cache_bytes(row_tokens + _SLACK)))

    def free(self) -> None:
        """Frees the engine with its cache and graphs."""
        self._assistant = self._options = None
        gc.collect()
        if self.target.on_gpu:
            torch.cuda.empty_cache()

    @contextmanager
    def timed(self, case: str) -> Iterator[None]:
        """Surrounds what is timed; with --profile, records it."""
        if not self.setup.profile:
            yield
            return
        with profiled(self.target) as spans:
            yield
        raise Skipped(f"profiled, not timed: {case}\n{table(spans)}")

    def measured(self, case: str, unit: str, values: Sequence[float], work: Work | None, **figures: Any) -> Measured:
        return Measured(case=case, contestant=OURS, values=values, unit=unit, work=work, figures=figures)

    # --- decoding ---------------------------------------------------------------------------------------------------

    def decode_work(self, rows: int, cached: float, steps: int = 1) -> Work:
        """The least for `steps` steps of `rows` rows with `cached` tokens in the cache of each."""
        decoder = self.config.decoder
        read = self.weight_bytes + rows * cached * cache_bytes_per_token(decoder, self.target.dtype)
        weights = self.weight_bytes / self.target.dtype.itemsize
        attention = 4.0 * cached * decoder.n_heads * decoder.head_dim * decoder.n_layers
        return Work(n_bytes=steps * read, flops=steps * rows * (2 * weights + attention), amount=steps * rows)

    def decode_one(self, case: str, cached: int) -> Measured:
        """Tokens per second of one reply, from its first to its last token, with `cached` tokens in the middle."""
        room = 2 * (self.config.decoder.max_seq - cached) - 2
        steps = min(self.lengths.steps, room)
        prompt = cached - steps // 2
        engine = self.shared_engine() if self.config.vision else self.assistant(1, prompt + steps).engine
        input = text_input(self.config, prompt, seed=1)

        def tokens_per_s(n: int) -> float:
            (reply,) = engine.generate([input], SamplingParams(max_new_tokens=n + 1))
            assert len(reply.token_ids) == n + 1
            return n / reply.timings.decode_s

        tokens_per_s(min(16, steps))
        if self.setup.profile:
            self.profile_rows(case, engine, 1, prompt)
        values = [tokens_per_s(steps) for _ in range(self.lengths.runs)]
        return self.measured(case, "tok/s", values, self.decode_work(1, prompt + steps / 2), prompt=prompt, steps=steps)

    def decode_many(self, case: str, rows: int, engine: Engine | None = None) -> Measured:
        """Tokens per second of `rows` requests, over steps in which all of them decode."""
        n, engine = self.lengths, engine or self.shared_engine()
        lead = lead_in(rows, n.cached, engine.scheduler.chunk_tokens)
        prompt = n.cached - n.row_steps // 2 - lead // 2
        decoding = Decoding(engine, self.config, rows, prompt, n.row_steps + 2 * lead + 24)
        decoding.warm_up()
        self.target.synchronize()
        cached = decoding.tokens_cached()
        with self.timed(case):
            per_chunk = 2 if self.setup.profile else max(1, n.row_steps // 8)
            seconds = [decoding.seconds(per_chunk) for _ in range(8)]
        cached = (cached + decoding.tokens_cached()) / 2
        steps = len(seconds) * per_chunk
        decoding.stop(steps)
        values = [rows * per_chunk / s for s in seconds]
        return self.measured(case, "tok/s", values, self.decode_work(rows, cached), cached=round(cached), steps=steps)

    def invariant(self, case: str, rows: int) -> Measured:
        """The same with an engine whose replies do not depend on the batch."""
        row_tokens = self.lengths.cached + self.lengths.row_steps
        return self.decode_many(case, rows, self.assistant(rows, row_tokens, batch_invariant=True).engine)

    def profile_rows(self, case: str, engine: Engine, rows: int, prompt: int) -> None:
        decoding = Decoding(engine, self.config, rows, prompt, 64)
        decoding.warm_up()
        with self.timed(case):
            decoding.seconds(10)

    def shared_engine(self) -> Engine:
        """The engine of all cases without prefix cache: 128 requests at once."""
        n, rows = self.lengths, max(DECODE_ROWS.values())
        lead = lead_in(rows, n.cached, 2048 if self.target.on_gpu else 512)
        return self.assistant(rows, n.cached + (n.row_steps + lead) // 2 + 16).engine

    # --- pictures ---------------------------------------------------------------------------------------------------

    def first_token(self, case: str) -> Measured:
        """Milliseconds from preprocessed pixels on the host and token ids to the first token. No cache can help."""
        engine, n = self.shared_engine(), self.lengths.first_tokens
        inputs = [random_picture_input(self.config, self.lengths.text, seed) for seed in range(n + 3)]
        values = self.first_tokens(case, engine, inputs)
        work = Work(n_bytes=self.weight_bytes, flops=flops(self.config, len(inputs[0].ids)))
        return self.measured(case, "ms", values, work)

    def first_tokens(self, case: str, engine: Engine, inputs: Sequence[Any]) -> list[float]:
        """Milliseconds to the first token of each request, except for three that warm up."""

        def ms(input: Any) -> float:
            started = time.perf_counter()
            stream = engine.stream(input, SamplingParams(max_new_tokens=1))
            for _ in stream:
                pass
            seconds = time.perf_counter() - started
            assert len(stream.reply().token_ids) == 1
            return 1e3 * seconds

        for input in inputs[:3]:
            ms(input)
        with self.timed(case):
            return [ms(input) for input in inputs[3:][: 5 if self.setup.profile else None]]

    def first_token_jpeg(self, case: str) -> Measured:
        """Milliseconds from the bytes of a JPEG file and a question to the first token."""
        decoder = jpeg_decoder()
        assistant, n = self._shared_assistant(), self.lengths.first_tokens
        pictures = jpegs(n + 3, self.lengths.jpeg)
        requests = [question_about(picture, "What is unusual about this picture?") for picture in pictures]
        wrong = sum(self.unlike_pillow(assistant, *pair) for pair in zip(requests[:3], pictures, strict=False))
        if wrong:
            raise AssertionError(f"{wrong} values of three pictures differ from Pillow's")
        values = self.first_tokens(case, assistant.engine, requests)
        figures = {"decoder": decoder, "megabytes": round(len(pictures[0]) / 1e6, 2), "values_unlike_pillow": wrong}
        return self.measured(case, "ms", values, None, **figures)

    def unlike_pillow(self, assistant: Assistant, messages: Any, jpeg: bytes) -> int:
        pixels = assistant.prepare(messages).pixels
        assert pixels is not None
        assert self.config.image
        return values_unlike_pillow(pixels, self.config.image, jpeg)

    def _shared_assistant(self) -> Assistant:
        self.shared_engine()
        assert self._assistant
        return self._assistant

    @torch.inference_mode()
    def clip(self, case: str, batch: int) -> Measured:
        """Pictures per second through the tower, several batches of pixels on the device one after the other."""
        tower = self.config.vision
        assert tower
        encode, n = tower_of(self._shared_assistant()), self.lengths.clip_batches
        pixels = random_pixels(batch, tower.image_size, 1).to(self.target.device, self.target.dtype)
        for _ in range(3):
            encode(pixels)
        with self.timed(case):
            seconds = [self.target.seconds(lambda: [encode(pixels) for _ in range(n)]) for _ in range(5)]
        work = Work(n_bytes=self.tower_bytes, flops=tower_flops(tower) * batch, amount=batch)
        return self.measured(case, "images/s", [batch * n / s for s in seconds], work)

    # --- many requests ----------------------------------------------------------------------------------------------

    def requests(self, case: str) -> Measured:
        """Requests per second: many at once, each about a picture of its own."""
        engine, n = self.shared_engine(), self.lengths
        length = len(random_picture_input(self.config, self.lengths.text, 0).ids)

        def seconds(first: int, new: int) -> float:
            inputs = [
                random_picture_input(self.config, self.lengths.text, seed) for seed in range(first, first + n.requests)
            ]
            started = time.perf_counter()
            replies = engine.generate(inputs, SamplingParams(max_new_tokens=new))
            elapsed = time.perf_counter() - started
            assert all(len(reply.token_ids) == new for reply in replies)
            return elapsed

        for seed in (1, 2):  # captures a graph for each number of rows, and fills the allocator of the device
            seconds(1000 * seed, n.new)
        with self.timed(case):
            runs = [seconds(3000 + 1000 * i, n.new) for i in range(1 if self.setup.profile else 3)]
        steps = self.decode_work(n.requests, length + n.new / 2, n.new - 1)
        work = Work(
            n_bytes=steps.n_bytes, flops=n.requests * flops(self.config, length), amount=n.requests, in_turn=True
        )
        return self.measured(case, "requests/s", [n.requests / s for s in runs], work, prompt=length, new=n.new)

    def prefix(self, case: str) -> Measured:
        """How many times as fast questions about one picture are answered with the prefix cache as without it."""
        with_cache, hits = self.questions_per_s(case, True)
        without, _ = self.questions_per_s(case, False)
        figures = {"questions_per_s": with_cache, "without_cache": without, "tokens_from_cache": hits}
        return self.measured(case, "times", [with_cache / without], None, **figures)

    def questions_per_s(self, case: str, prefix_cache: bool) -> tuple[float, int]:
        """Questions per second, and how many tokens of each came from the prefix cache on average."""
        n, vocab = self.lengths, self.config.decoder.vocab_size
        assert self.config.vision
        side, n_features = self.config.vision.image_size, self.config.vision.n_features
        own = n.text + n.question_new + (16 if prefix_cache else n_features)  # tokens of a row in the cache
        engine = self.assistant(self.rows_that_fit(n.questions, own), own, prefix_cache=prefix_cache).engine

        def seconds(seed: int, new: int) -> float:
            picture = random_pixels(1, side, seed)
            start = random_ids(4, vocab, seed)  # the tokens before the picture
            rests = [random_ids(n.text - 4, vocab, seed + 1 + i) for i in range(n.questions)]
            inputs = [picture_input(torch.cat([start, rest]), picture, n_features) for rest in rests]
            started = time.perf_counter()
            engine.generate(inputs, SamplingParams(max_new_tokens=new))
            return time.perf_counter() - started

        seconds(10**6, n.question_new)
        with self.timed(f"{case}, prefix_cache={prefix_cache}"):
            before = engine.stats().prefix_hit_tokens
            elapsed = seconds(2 * 10**6, n.question_new)
            hits = engine.stats().prefix_hit_tokens - before
            return n.questions / elapsed, hits // n.questions

    def measure(self, case: str) -> list[Measured]:
        n = self.lengths
        cases: dict[str, Callable[[str], Measured | list[Measured]]] = {
            "ceilings": lambda case: ceilings(self.target, tiny=self.setup.size == "tiny"),
            "decode-1": partial(self.decode_one, cached=n.cached),
            "decode-4000": partial(self.decode_one, cached=n.long),
            **{name: partial(self.decode_many, rows=rows) for name, rows in DECODE_ROWS.items()},
            "first-token": self.first_token,
            "first-token-jpeg": self.first_token_jpeg,
            "first-token-jpeg-pillow": self.first_token_jpeg,
            **{name: partial(self.clip, batch=batch) for name, batch in CLIP_BATCHES.items()},
            "requests-128": self.requests,
            "prefix": self.prefix,
            **{name: partial(self.invariant, rows=rows) for name, rows in INVARIANT_ROWS.items()},
            "mpt": partial(self.decode_one, cached=n.cached),
        }
        found = cases[case](case)
        return found if isinstance(found, list) else [found]


def tower_of(assistant: Assistant) -> Callable[[torch.Tensor], torch.Tensor]:
    """What computes the features of pixels [views, 3, size, size] for the engine: CLIP without the projector."""
    graphs = Graphs(assistant.device, active=assistant.engine.options.graphs)
    if not graphs.active:
        return assistant.vision_features
    tower = shallow_copy(assistant.model)
    tower.projector = torch.nn.Identity()
    vision = VisionGraphs(graphs)
    return lambda pixels: vision.features(tower, pixels)


def llava(setup: Setup) -> Ours:
    return Ours(setup, llava_config(setup.size, setup.layers, vision=True))


def mpt(setup: Setup) -> Ours:
    return Ours(setup, LlavaConfig(decoder=mpt_config(setup.size, setup.layers)))
