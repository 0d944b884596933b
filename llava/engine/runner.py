"""Runs the model for one step: encodes pictures, computes the scheduled tokens and draws the next ones.

Nothing here waits for the device, except to capture a graph and for requests that ask for more than a reply.

S new tokens   D dim
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Rest
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from llava.config import DecoderConfig
from llava.engine import batch
from llava.engine.adapters import Joined, Variant, join
from llava.engine.batch import Batch
from llava.engine.draw import Drawn, Logits, draw, is_greedy
from llava.engine.feature_cache import FeatureCache
from llava.engine.fused import FusedRunner
from llava.engine.graphs import Graphs
from llava.engine.observe import record_attention, record_prompt_logprobs, record_states
from llava.engine.packing import Packer
from llava.engine.scheduler import Scheduled, feature_key
from llava.engine.sequence import PlacedImage, Sequence
from llava.engine.vision_graphs import VisionGraphs
from llava.kernels.support import can_run
from llava.model.batch_invariant import BatchInvariant
from llava.model.decoder import Decoder
from llava.model.fused import FusedDecoder, why_not
from llava.model.paged import PagedCache
from llava.model.row_cache import RowCaches, can_share
from llava.model.staging import on_device, to_device


class Runner:
    """Computes tokens with the model and keeps their keys and values in a paged cache."""

    def __init__(
        self,
        variants: Mapping[str | None, Variant],
        cache: PagedCache,
        features: FeatureCache,
        *,
        max_batch: int,
        batch_invariant: bool = False,
        graphs: bool = False,
        fused: bool | None = None,
    ):
        """graphs: whether to run steps and vision towers as CUDA graphs, on a GPU.

        fused: whether to use the fused decoder where it can be used; default: on a GPU with kernels.
        """
        self.cache, self.features = cache, features
        # the newest token of each running sequence, in its `pool_slot`; -1: none could be drawn
        self.pool = torch.zeros(max_batch, dtype=torch.int64, device=cache.k.device)
        self.batch_invariant = batch_invariant
        on_gpu = cache.k.device.type == "cuda" and can_run(cache.k.device)
        use_fused = not batch_invariant and (on_gpu if fused is None else fused)
        packer = Packer(variants, active=not batch_invariant and not use_fused)
        self.models = {name: packer.pack(one.model) for name, one in variants.items()}
        self.joined = [one._replace(decoder=packer.pack(one.decoder)) for one in join(variants)]
        has_copies = cache.k.device.type == "cpu" and not use_fused
        firsts = [joined.names[0] for joined in self.joined] if has_copies else []
        self.dense = {
            first: RowCaches(cache, share=can_share(variants[first].model.config.decoder)) for first in firsts
        }
        captures = Graphs(cache.k.device, active=graphs)
        self.vision = VisionGraphs(captures) if captures.active else None
        self.fused = self._fused(captures) if use_fused else {}
        self.seconds: dict[str, float] = defaultdict(float)  # spent on vision, prefill and decode
        self.seconds_per_view = 0.0  # of the most recent pictures

    @torch.inference_mode()
    def launch(self, scheduled: Rest[Scheduled]) -> list[Drawn]:
        """Computes the scheduled tokens, and draws the next token of sequences of which none is then left to compute.

        The tokens go into the token pool, which is not changed if this fails, so that the step can be computed again.
        """
        with on_device(self.pool.device):
            return self._launch(scheduled)

    def _launch(self, scheduled: Rest[Scheduled]) -> list[Drawn]:
        steps = self.run(scheduled)
        drawn = [draw(logits) for logits in steps]
        for logits, one in zip(steps, drawn, strict=True):
            if one is None or logits.in_pool:
                continue
            slots = to_device([sequence.pool_slot for sequence in one.sequences], torch.int64, self.pool.device)
            self.pool.index_copy_(0, slots, one.ids)
        return [one for one in drawn if one]

    @torch.inference_mode()
    def run(self, scheduled: Rest[Scheduled]) -> list[Logits]:
        """Computes the scheduled tokens. Returns logits for the sequences of which all tokens are then computed."""
        with BatchInvariant() if self.batch_invariant else nullcontext():
            return self._run(scheduled)

    def _run(self, scheduled: Rest[Scheduled]) -> list[Logits]:
        started = time.perf_counter()
        if pairs := [one.copy for one in scheduled if one.copy]:
            self.cache.copy_pages(pairs)
            for one in scheduled:
                one.copy = None  # if the step is computed again, the source may have been written by then
        if new := list(_partial_new_pages(scheduled, self.cache.page_size)):
            self.cache.clear_pages(new)
        self._encode_images(scheduled)
        encoded = time.perf_counter()
        results = [logits for joined in self.joined for logits in self._run_joined(joined, scheduled)]
        kind = "decode" if all(one.sequence.is_decoding for one in scheduled) else "prefill"
        self.seconds[kind] += time.perf_counter() - encoded
        self.seconds["vision"] += encoded - started
        return results

    def forget_rows(self) -> None:
        """Drops the dense copies of decoding rows, which may contain NaN after an error."""
        self.dense = {name: RowCaches(self.cache, share=one.share) for name, one in self.dense.items()}

    def _encode_images(self, scheduled: Rest[Scheduled]) -> None:
        """Adds the features of the pictures in the scheduled tokens to the feature cache."""
        missing: dict[str | None, dict[bytes, tuple[PlacedImage, list[Sequence]]]] = {}
        for one in scheduled:
            sequence = one.sequence
            for image in sequence.images_in(sequence.computed, sequence.computed + one.n_tokens):
                if self.features.acquire(feature_key(sequence, image), sequence.id) is None:
                    images = missing.setdefault(sequence.adapter, {})
                    images.setdefault(image.digest, (image, []))[1].append(sequence)
        for adapter, images in missing.items():
            started = time.perf_counter()
            features = self._encode(adapter, [image for image, _ in images.values()])
            for (image, sequences), of_image in zip(images.values(), features, strict=True):
                for sequence in sequences:
                    self.features.add(feature_key(sequence, image), of_image, sequence.id)
            n_views = sum(len(image.pixels) for image, _ in images.values())
            self.seconds_per_view = (time.perf_counter() - started) / n_views

    def _encode(self, adapter: str | None, images: list[PlacedImage]) -> list[Tensor]:
        if self.batch_invariant and len(images) > 1:
            return [features for image in images for features in self._encode(adapter, [image])]
        model = self.models[adapter]
        pixels = _joined([image.pixels for image in images], page_locked=model.device.type == "cuda")
        if self.vision:
            features = self.vision.features(model, pixels)
        else:
            features = model.view_features(pixels.to(model.device, model.dtype, non_blocking=True))
        return model.pack_images(features, [len(image.pixels) for image in images], [image.grid for image in images])

    def _run_joined(self, joined: Joined, scheduled: Rest[Scheduled]) -> Iterator[Logits]:
        """Runs the tokens of the variants whose decoders are joined."""
        rank = {name: i for i, name in enumerate(joined.names)}
        mine = [one for one in scheduled if one.sequence.adapter in rank]
        if not mine:
            return
        mine.sort(key=lambda one: (not one.sequence.is_decoding, rank[one.sequence.adapter]))
        fused = self.fused.get(joined.names[0])
        if fused and not batch.is_observed(mine):
            yield from self._run_fused(fused, mine, alone=len(mine) == len(scheduled))
            return
        step = batch.build(
            mine,
            self.cache,
            self.dense.get(joined.names[0]),
            dynamic_rope=has_dynamic_rope(self.models[joined.names[0]].config.decoder),
            batch_invariant=self.batch_invariant,
        )
        joined.routing.slices = step.adapters()
        x = torch.cat([self._embed(name, members) for name, members in _by_adapter(mine)])[None]
        states, ends = self._states(joined.decoder, step, x)
        for name, members in _by_adapter([mine[i] for i in ends]):
            n = len(members)
            head = self.models[name].decoder
            yield Logits([one.sequence for one in members], head.logits(states[:n]))
            states = states[n:]

    def _fused(self, graphs: Graphs) -> dict[str | None, FusedRunner]:
        """Returns the decoders that can be fused, by the first of their adapters."""
        found = {}
        for decoder, _, (name, *others) in self.joined:
            config = self.models[name].config.decoder
            if not others and why_not(decoder, config) is None:
                fused = FusedDecoder(decoder, config)
                found[name] = FusedRunner(decoder, fused, self.cache, self.pool, graphs)
        return found

    def _run_fused(self, fused: FusedRunner, scheduled: Rest[Scheduled], *, alone: bool) -> Iterator[Logits]:
        """Runs the tokens of a fused decoder. alone: no other decoder runs in this step."""
        rows = [one for one in scheduled if one.sequence.is_decoding]
        prompts = scheduled[len(rows) :]
        if prompts and not fused.prompts.suit(prompts, len(rows)):
            yield self._run_packed(fused, scheduled)
            return
        for one in prompts:
            logits = fused.prompts.logits(one, self._embed_whole(one))
            yield self._run_packed(fused, [one]) if logits is None else Logits([one.sequence], logits)
        if rows:
            # a step with several decoders or with log-probabilities can fail after this decoder has run, and is then
            # computed again from the token pool
            keep = alone and all(is_greedy(one.sequence) and not one.sequence.params.logprobs for one in scheduled)
            rows.sort(key=lambda one: one.sequence.block_table[0])  # equal beginnings side by side
            logits, ids = fused.decode(rows, keep=keep)
            if not alone:  # the graphs of another decoder may overwrite them before tokens are drawn
                logits, ids = logits.clone(), ids.clone()
            yield Logits([one.sequence for one in rows], logits, ids, in_pool=keep)

    def _run_packed(self, fused: FusedRunner, scheduled: Rest[Scheduled]) -> Logits:
        """Runs decoding rows and chunks of prompts as one packed row."""
        x = self._embed(scheduled[0].sequence.adapter, scheduled)
        ends = [i for i, one in enumerate(scheduled) if one.n_tokens == one.sequence.n_pending]
        return Logits([scheduled[i].sequence for i in ends], fused.prefill(scheduled, x, ends))

    def _embed_whole(self, one: Scheduled) -> Tensor:
        """Returns the embeddings [S, D] of a prompt, with those of tokens that were in the prefix cache."""
        new = self._embed(one.sequence.adapter, [one])
        if not one.sequence.computed:
            return new
        ids = to_device(one.sequence.tokens[: one.sequence.computed], torch.int64, new.device)
        return torch.cat([self.models[one.sequence.adapter].decoder.lookup(ids), new])

    def _embed(self, adapter: str | None, scheduled: Rest[Scheduled]) -> Tensor:
        """Returns the embeddings [S, D] of the new tokens of some sequences with the same adapter."""
        model = self.models[adapter]
        ids = to_device(batch.new_ids(scheduled), torch.int64, model.device)
        if pending := batch.in_flight(scheduled):
            at, slots = to_device(pending, torch.int64, model.device).T
            ids.index_copy_(0, at, self.pool[slots])
        x = model.decoder.lookup(ids)
        start = 0
        for one in scheduled:
            first, end = one.sequence.computed, one.sequence.computed + one.n_tokens
            for image in one.sequence.images_in(first, end):
                features = self.features.acquire(feature_key(one.sequence, image), one.sequence.id)
                assert features is not None
                a, b = max(first, image.start), min(end, image.end)
                x[start + a - first : start + b - first] = features[a - image.start : b - image.start].to(x.dtype)
            start += one.n_tokens
        return x

    def _states(self, decoder: Decoder, step: Batch, x: Tensor) -> tuple[Tensor, list[int]]:
        """Runs the decoder. Returns the states [ends, D] of the last tokens of the sequences in `ends`.

        `ends` are the indices of the sequences of which no token is pending afterwards. Records what the requests ask
        for about their tokens.
        """
        ends = [i for i, one in enumerate(step.scheduled) if one.n_tokens == one.sequence.n_pending]
        last = to_device([step.starts[i] + step.scheduled[i].n_tokens - 1 for i in ends], torch.int64, x.device)
        if step.observed:
            return self._observed_states(decoder, step, x)[last], ends
        if len(ends) == x.shape[1]:
            return decoder(x, step.context)[0], ends
        if len(step.adapters()) > 1:  # adapters are routed by the index in the packed row, so no token may be dropped
            return decoder(x, step.context)[0, last], ends
        return decoder(x, step.context, last), ends

    def _observed_states(self, decoder: Decoder, step: Batch, x: Tensor) -> Tensor:
        """Returns the states [S, D] of all tokens, and records states, attention and log-probabilities on the way."""
        by_start = dict(zip(step.starts, step.scheduled, strict=True))

        def keep(layer: int, states: Tensor) -> None:
            for start, one in by_start.items():
                record_states(one, layer, states[0, start : start + one.n_tokens])

        watched = {start + batch.n_skipped(one): one for start, one in by_start.items()}
        context = replace(
            step.context, observe=lambda block, chunk, p: record_attention(watched[chunk.start], block, p)
        )
        keep(0, x)
        for layer, states in enumerate(decoder.states(x, context), start=1):
            if layer != len(decoder.blocks):  # the last layer is the output of the norm, as in transformers
                keep(min(layer, len(decoder.blocks)), states)
        for start, one in by_start.items():
            if one.sequence.params.prompt_logprobs:
                head = self.models[one.sequence.adapter].decoder
                record_prompt_logprobs(one, states[0, start : start + one.n_tokens], head)
        final: Tensor = states[0]
        return final


def _joined(pixels: Rest[Tensor], *, page_locked: bool) -> Tensor:
    """Concatenates the views of pictures. A GPU copies from page-locked memory while the CPU continues."""
    if not page_locked:
        return torch.cat(list(pixels))
    n_views = sum(map(len, pixels))
    joined = torch.empty(n_views, *pixels[0].shape[1:], dtype=pixels[0].dtype, pin_memory=True)
    return torch.cat(list(pixels), out=joined)


def _partial_new_pages(scheduled: Rest[Scheduled], page_size: int) -> Iterator[int]:
    """Yields the pages of which this step writes the first tokens, but not the last."""
    for one in scheduled:
        end = one.sequence.computed + one.n_tokens
        start = end // page_size * page_size  # of the last page
        if one.sequence.computed <= start < end:
            yield one.sequence.block_table[start // page_size]


def has_dynamic_rope(config: DecoderConfig) -> bool:
    """Returns whether the rotation of a token depends on the length of its sequence."""
    scaling = config.rope_scaling
    return scaling is not None and scaling.kind == "dynamic"


def _by_adapter(scheduled: Rest[Scheduled]) -> Iterator[tuple[str | None, list[Scheduled]]]:
    """Yields each adapter with its consecutive sequences."""
    for name, members in groupby(scheduled, key=lambda one: one.sequence.adapter):
        yield name, list(members)
