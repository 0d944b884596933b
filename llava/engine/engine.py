"""Runs requests: encodes images, prefills all prompts together, then generates one token per row in each step.

B batch   S sequence length   D dim   V vocabulary size
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.engine import step
from llava.engine.detokenize import Detokenizer
from llava.engine.sampling import SamplingParams, sample
from llava.engine.sequence import Sequence
from llava.errors import PromptError
from llava.model.attention import CacheContext, decode_mask
from llava.model.kv_cache import KVCache
from llava.model.llava import Llava
from llava.preprocess.inputs import ModelInput
from llava.preprocess.tokenizer import Tokenizer

_WINDOW = 256  # compiled steps read a multiple of this many cache slots, to limit the number of distinct shapes


class Engine:
    """Generates replies with a model. `compile`: use torch.compile for prefill and decoding (needs a C++ compiler)."""

    def __init__(self, model: Llava, tokenizer: Tokenizer, *, compile: bool = False):
        self.model = model
        self.tokenizer = tokenizer
        self.compiled = compile
        self._prefill: Callable[..., Tensor] = torch.compile(step.prefill, dynamic=True) if compile else step.prefill
        self._decode: Callable[..., Tensor] = torch.compile(step.decode_step) if compile else step.decode_step

    def start(self, input: ModelInput, params: SamplingParams) -> Sequence:
        """Creates the sequence for a request. Raises PromptError if the prompt leaves no room for a reply."""
        context = self.model.config.decoder.max_seq
        n_prompt = len(input.ids)
        if n_prompt >= context and params.max_new_tokens:
            raise PromptError(
                f"the prompt has {n_prompt} tokens, which leaves no room for a reply in the model's context of "
                f"{context} tokens; shorten the prompt"
            )
        stops = [*params.stop, *([input.stop] if input.stop else [])]
        ids = {self.tokenizer.eos_id, *self.model.config.eos_ids, *map(self.tokenizer.id_of, stops)}
        generator = None
        if params.temperature > 0:
            generator = torch.Generator(self.model.device)
            generator.seed() if params.seed is None else generator.manual_seed(params.seed)
        return Sequence(
            input=input,
            detokenizer=Detokenizer(self.tokenizer.decode, stops),
            stop_ids=frozenset(id for id in ids if id is not None),
            max_new_tokens=min(params.max_new_tokens, context - n_prompt),
            generator=generator,
            n_prompt=n_prompt,
            seen=input.ids,
        )

    def run(self, sequences: list[Sequence], params: SamplingParams) -> Iterator[tuple[Sequence, str]]:
        """Generates all replies together and yields each piece of text with the sequence it belongs to."""
        scaling = self.model.config.decoder.rope_scaling
        if len(sequences) > 1 and scaling and scaling.kind == "dynamic":  # RoPE depends on row length, so do not batch
            for sequence in sequences:
                yield from self.run([sequence], params)
            return
        if params.max_new_tokens == 0:
            for sequence in sequences:
                sequence.finish_reason = "length"
                sequence.first_token = sequence.ended = time.perf_counter()
            return
        rows = sequences
        cache = self._new_cache(rows)
        logits = self._run_prefill(rows, cache)
        while True:
            ids = self._sample(logits, rows, params)
            for row, id in zip(rows, ids, strict=True):
                yield row, row.append(id)
            unfinished = [i for i, row in enumerate(rows) if not row.finish_reason]
            if not unfinished:
                return
            if len(unfinished) < len(rows):
                with torch.inference_mode():
                    cache.select(torch.tensor(unfinished, device=cache.k.device))
                rows, ids = [rows[i] for i in unfinished], [ids[i] for i in unfinished]
            logits = self._run_step(ids, rows, cache)

    def embed(self, inputs: list[ModelInput]) -> Tensor:
        """Returns the right-padded text and image embeddings [B, S, D] of prompts. Encodes all images in one batch."""
        images = iter(self.encode(inputs))
        model = self.model
        rows = [model.embed(input.ids.to(model.device), [next(images) for _ in input.views]) for input in inputs]
        return pad_sequence(rows, batch_first=True)

    def encode(self, inputs: list[ModelInput]) -> list[Tensor]:
        """Returns the embeddings [tokens, D] of each image in these prompts, in order."""
        pixels = [input.pixels for input in inputs if input.pixels is not None]
        if not pixels:
            return []
        views = [n for input in inputs for n in input.views]
        grids = [grid for input in inputs for grid in input.grids]
        return self.model.encode_images(torch.cat(pixels).to(self.model.device, self.model.dtype), views, grids)

    def _new_cache(self, rows: list[Sequence]) -> KVCache:
        slots = max(row.n_prompt + row.max_new_tokens for row in rows)
        if self.compiled:
            slots = _round_up(slots)
        model = self.model
        return KVCache(model.config.decoder, len(rows), slots, dtype=model.dtype, device=model.device)

    def _run_prefill(self, rows: list[Sequence], cache: KVCache) -> Tensor:
        with torch.inference_mode():
            x = self.embed([row.input for row in rows])
            n = x.shape[1]
            context = CacheContext(
                positions=torch.arange(n, device=x.device),
                seq_len=n,
                last=torch.tensor([[row.n_prompt - 1] for row in rows], device=x.device),
                cache=cache,
                window=n,
            )
            return self._prefill(self.model, x, context)

    def _run_step(self, ids: list[int], rows: list[Sequence], cache: KVCache) -> Tensor:
        with torch.inference_mode():
            device = cache.k.device
            positions = torch.tensor([[row.position] for row in rows], device=device)
            seq_len = max(row.position for row in rows) + 1
            window = _round_up(seq_len) if self.compiled else seq_len
            single = len(rows) == 1 and not self.compiled  # needs no mask: the token attends to the whole window
            context = CacheContext(
                positions=positions[0] if single else positions,
                seq_len=seq_len,
                mask=None if single else decode_mask(positions, window),
                cache=cache,
                window=window,
            )
            return self._decode(self.model, torch.tensor(ids, device=device), context)

    def _sample(self, logits: Tensor, rows: list[Sequence], params: SamplingParams) -> list[int]:
        with torch.inference_mode():
            chosen = sample(logits, params, [row.seen for row in rows], [row.generator for row in rows])
            ids: list[int] = chosen.tolist()
            if params.logprobs:
                _record_logprobs(logits, chosen, rows, int(params.logprobs))
            if params.repetition_penalty != 1:
                for row, id in zip(rows, ids, strict=True):
                    row.seen = torch.cat([row.seen, torch.tensor([id])])
        return ids


def _round_up(slots: int) -> int:
    return -(-slots // _WINDOW) * _WINDOW


def _record_logprobs(logits: Tensor, chosen: Tensor, rows: list[Sequence], n: int) -> None:
    """Records log-probabilities of the chosen token and the n most likely tokens, before temperature and filtering."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(n, logprobs.shape[-1]))
    of_chosen = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    for row, logprob, top_values, top_ids in zip(rows, of_chosen, values.tolist(), ids.tolist(), strict=True):
        row.logprobs.append(logprob)
        row.top_logprobs.append(dict(zip(top_ids, top_values, strict=True)))
