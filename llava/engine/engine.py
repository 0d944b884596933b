"""Runs requests: pictures encoded, prompts prefilled together, then each row gets a token a step until it ends.

B rows   S places   D dim   V vocabulary rows
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.engine import step
from llava.engine.sampling import Sampling, sample
from llava.engine.text import TextStream
from llava.errors import PromptError
from llava.model.cache import KVCache
from llava.model.llama import visible
from llava.model.llava import Llava
from llava.preprocess.inputs import ModelInput
from llava.preprocess.tokenizer import Tokenizer

_WINDOW = 256  # slots; a compiled step reads the cache in multiples of this, so that few shapes are compiled


@dataclass(eq=False, kw_only=True)
class Answer:
    """One row being written."""

    input: ModelInput
    text: TextStream
    stop_ids: frozenset[int]
    limit: int  # tokens that may be written
    generator: torch.Generator | None
    n_prompt: int
    seen: Tensor  # ids of prompt and answer, for the repetition penalty
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: list[float] = field(default_factory=list)  # of each token written
    top_logprobs: list[dict[int, float]] = field(default_factory=list)  # of the likeliest ids at each token
    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0  # clock at the first token
    ended: float = 0.0

    n_written: int = 0

    @property
    def next_place(self) -> int:
        """Position of the token written last, which the next step reads."""
        return self.n_prompt + self.n_written - 1

    def take(self, id: int) -> str:
        """Takes a new token and returns the text that became certain; sets `finish_reason` when it was the last."""
        now = time.perf_counter()
        self.first_token = self.first_token or now
        self.n_written += 1
        piece = ""
        if id in self.stop_ids:
            self.finish_reason = "stop"
        else:
            piece = self.text.push(id)
            if self.text.stopped:
                self.finish_reason = "stop"
            elif self.n_written >= self.limit:
                self.finish_reason = "length"
        if self.finish_reason:
            self.ended = now
            piece += self.text.finish()
            del self.logprobs[len(self.text.ids) :], self.top_logprobs[len(self.text.ids) :]
        return piece


class Engine:
    """Holds a model and the steps that run it. `compile`: the steps go through torch.compile (needs a C++ compiler)."""

    def __init__(self, model: Llava, tokenizer: Tokenizer, *, compile: bool = False):
        self.model = model
        self.tokenizer = tokenizer
        self.compiled = compile
        self._prefill: Callable[..., Tensor] = torch.compile(step.prefill, dynamic=True) if compile else step.prefill
        self._decode: Callable[..., Tensor] = torch.compile(step.decode_step) if compile else step.decode_step

    def start(self, input: ModelInput, options: Sampling) -> Answer:
        """A row for a request. Raises PromptError if the context has no room for an answer."""
        context = self.model.config.decoder.max_seq
        n_prompt = len(input.ids)
        if n_prompt >= context and options.max_new_tokens:
            raise PromptError(
                f"the prompt has {n_prompt} tokens, the model's context holds {context}: no room to answer"
            )
        stops = [*options.stop, *([input.stop] if input.stop else [])]
        ids = {self.tokenizer.eos_id, *self.model.config.eos_ids, *map(self.tokenizer.id_of, stops)}
        generator = None
        if options.temperature > 0:
            generator = torch.Generator(self.model.device)
            generator.seed() if options.seed is None else generator.manual_seed(options.seed)
        return Answer(
            input=input,
            text=TextStream(self.tokenizer.decode, stops),
            stop_ids=frozenset(id for id in ids if id is not None),
            limit=min(options.max_new_tokens, context - n_prompt),
            generator=generator,
            n_prompt=n_prompt,
            seen=input.ids,
        )

    def run(self, answers: Sequence[Answer], options: Sampling) -> Iterator[tuple[Answer, str]]:
        """Writes all answers, side by side; yields each piece of text with the answer it belongs to."""
        scaling = self.model.config.decoder.rope_scaling
        if len(answers) > 1 and scaling and scaling.kind == "dynamic":  # frequencies depend on each row's own length
            for answer in answers:
                yield from self.run([answer], options)
            return
        if options.max_new_tokens == 0:
            for answer in answers:
                answer.finish_reason = "length"
                answer.first_token = answer.ended = time.perf_counter()
            return
        rows = list(answers)
        cache = self._new_cache(rows)
        with torch.inference_mode():
            x = self.embed([row.input for row in rows])
            lengths = torch.tensor([row.n_prompt for row in rows], device=x.device)
            cache.window = x.shape[1]
            logits = self._prefill(self.model, x, lengths, cache)
        while True:
            ids = self._sample(logits, rows, options)
            for row, id in zip(rows, ids, strict=True):
                yield row, row.take(id)
            going = [i for i, row in enumerate(rows) if not row.finish_reason]
            if not going:
                return
            if len(going) < len(rows):
                with torch.inference_mode():
                    cache.keep(torch.tensor(going, device=cache.k.device))
                rows, ids = [rows[i] for i in going], [ids[i] for i in going]
            logits = self._step(ids, rows, cache)

    def embed(self, inputs: Sequence[ModelInput]) -> Tensor:
        """Prompts with their pictures -> [B, S, D], padded on the right; all pictures go through the tower together."""
        left = iter(self.encode(inputs))
        model = self.model
        rows = [model.embed(input.ids.to(model.device), [next(left) for _ in input.views]) for input in inputs]
        return pad_sequence(rows, batch_first=True)

    def encode(self, inputs: Sequence[ModelInput]) -> list[Tensor]:
        """What stands for each picture of these prompts, in order, [places, D]."""
        pixels = [input.pixels for input in inputs if input.pixels is not None]
        if not pixels:
            return []
        views = [n for input in inputs for n in input.views]
        grids = [grid for input in inputs for grid in input.grids]
        return self.model.encode_images(torch.cat(pixels).to(self.model.device, self.model.dtype), views, grids)

    def _new_cache(self, rows: Sequence[Answer]) -> KVCache:
        slots = max(row.n_prompt + row.limit for row in rows)
        if self.compiled:
            slots = -(-slots // _WINDOW) * _WINDOW
        model = self.model
        return KVCache(model.config.decoder, len(rows), slots, dtype=model.dtype, device=model.device)

    def _step(self, ids: list[int], rows: Sequence[Answer], cache: KVCache) -> Tensor:
        with torch.inference_mode():
            places = [row.next_place for row in rows]
            length = max(places) + 1
            cache.window = -(-length // _WINDOW) * _WINDOW if self.compiled else length
            device = cache.k.device
            pos = torch.tensor(places, device=device)
            mask = None if len(rows) == 1 and not self.compiled else visible(pos, cache.window)
            return self._decode(self.model, torch.tensor(ids, device=device), pos, mask, cache, length)

    def _sample(self, logits: Tensor, rows: Sequence[Answer], options: Sampling) -> list[int]:
        with torch.inference_mode():
            chosen = sample(logits, options, [row.seen for row in rows], [row.generator for row in rows])
            ids: list[int] = chosen.tolist()
            if options.logprobs:
                self._note_logprobs(logits, chosen, rows, options)
            if options.repetition_penalty != 1:
                for row, id in zip(rows, ids, strict=True):
                    row.seen = torch.cat([row.seen, torch.tensor([id])])
        return ids

    def _note_logprobs(self, logits: Tensor, chosen: Tensor, rows: Sequence[Answer], options: Sampling) -> None:
        """Of the model's own distribution, before temperature and filters."""
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(int(options.logprobs), logprobs.shape[-1]))
        own = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
        for row, value, best, at in zip(rows, own, values.tolist(), ids.tolist(), strict=True):
            row.logprobs.append(value)
            row.top_logprobs.append(dict(zip(at, best, strict=True)))
