"""Turns the input of a request into a sequence: renders and encodes it, reads its pictures, checks its length."""

import itertools
import logging
import secrets
import time
from collections.abc import Mapping
from collections.abc import Sequence as Rest
from typing import cast

import torch

from llava.config import IMAGE, EngineOptions, LlavaConfig
from llava.engine.adapters import Variant
from llava.engine.capture import Capture, Captured
from llava.engine.detokenize import Detokenizer
from llava.engine.picture_memory import GpuPictureMemory
from llava.engine.prefetch import Prefetch, n_preparing_threads
from llava.engine.sampling_params import SamplingParams
from llava.engine.sequence import Sequence, placed_images
from llava.errors import ConfigError, ContextError, PromptError
from llava.preprocess.image import Picture
from llava.preprocess.inputs import Messages, ModelInput, Preprocessor

log = logging.getLogger(__name__)

Request = Messages | ModelInput | tuple[str, Rest[Picture]]  # a conversation, a raw prompt, one with its pictures
_AFTER = 8  # ids of the prompt that determine whether the text of a reply begins with a space
_LATER = 1000  # a request with priority p + 1 is served like one with priority p that arrived this many requests later


class InputProcessor:
    """Prepares the requests for one engine. Its methods can be called from several threads."""

    def __init__(self, variants: Mapping[str | None, Variant], n_pages: int, options: EngineOptions):
        """n_pages: size of the cache."""
        self.variants, self.n_pages, self.options = variants, n_pages, options
        self.capacity = n_pages * options.page_size  # tokens that the cache holds
        longest = max(variant.model.config.decoder.max_seq for variant in variants.values())
        if self.capacity < longest:
            log.warning(
                "the cache holds %d tokens, fewer than the model's context of %d: requests are limited to it; "
                "raise cache_memory= (--cache-memory) for longer ones",
                self.capacity,
                longest,
            )
        device = variants[None].model.device
        self.memory = GpuPictureMemory(device) if device.type == "cuda" else None  # for large pictures
        self._numbers = itertools.count()
        self._reported: set[str] = set()  # warnings about pictures that have been logged

    def next_number(self) -> int:
        """Returns a new number for a request or a sequence."""
        return next(self._numbers)

    def prepare(
        self,
        messages: Messages,
        *,
        images: Rest[Picture] | None = None,
        template: str | None = None,
        adapter: str | None = None,
        literal: bool = False,
    ) -> ModelInput:
        """Returns the model input: prompt, ids and pixels. Raises PromptError, ImageError, ConfigError.

        literal: see `Preprocessor.prepare`.

        Logs each kind of loss in reading the images once, and once that there are several.
        """
        preprocessor = self.variant(adapter).preprocessor
        input = None
        if self.memory and not literal:  # whoever asks for literal text reads the images elsewhere
            input = self._prepare_on_gpu(preprocessor, messages, images, template)
        input = input or preprocessor.prepare(messages, images=images, template=template, literal=literal)
        if literal:  # what pictures of clients lose is neither logged nor kept
            return input
        losses = [*input.losses, _SEVERAL_IMAGES] if len(input.views) > 1 else input.losses
        for loss in losses:
            if loss not in self._reported:  # the images of a conversation are read again in every turn
                log.warning("%s", loss)
            self._reported.add(loss)
        return input

    def prefetch(
        self, inputs: Rest[Request], adapter: str | None, *, template: str | None = None, n_ahead: int
    ) -> Prefetch[Request, ModelInput]:
        """Returns the prepared inputs of many requests. While a GPU computes, threads prepare up to `n_ahead` of them.

        On a CPU, each is prepared when it is taken, because the model already uses all cores.
        """

        def prepare(input: Request) -> ModelInput:
            if not isinstance(input, ModelInput):
                messages, pictures = split_request(input)
                input = self.prepare(messages, images=pictures, template=template, adapter=adapter)
            _ = input.digests  # takes about as long as resizing a picture, and is kept
            return input

        n_threads = n_preparing_threads(len(inputs)) if self.memory else 0
        return Prefetch(prepare, inputs, n_threads=n_threads, n_ahead=n_ahead)

    def _prepare_on_gpu(
        self, preprocessor: Preprocessor, messages: Messages, images: Rest[Picture] | None, template: str | None
    ) -> ModelInput | None:
        """Prepares an input whose large pictures are resized by the GPU, or returns None if its memory is full."""
        assert self.memory
        try:
            with self.memory.stream():
                return preprocessor.prepare(messages, images=images, template=template, memory=self.memory)
        except torch.OutOfMemoryError:
            return None

    def sequence(
        self,
        input: Request,
        params: SamplingParams,
        adapter: str | None,
        *,
        priority: int = 0,
        capture: Capture | None = None,
        salt: bytes = b"",
    ) -> Sequence:
        """Prepares a request. Raises LlavaError. salt: see `Engine.add_request`."""
        started = time.perf_counter()
        model, preprocessor = self.variant(adapter)
        if not isinstance(input, ModelInput):
            messages, pictures = split_request(input)
            input = self.prepare(messages, images=pictures, adapter=adapter)
        tokens: list[int] = input.ids.tolist()
        _check_belongs(input, tokens, model.config, preprocessor)
        context = min(model.config.decoder.max_seq, self.capacity)
        self._check_length(len(tokens), params, context)
        self._check_beams(len(tokens), params, context)
        number = self.next_number()
        stops = [*params.stop, *([input.stop] if input.stop else [])]
        images = placed_images(input, model.config.vision.n_features) if model.config.vision else []
        if capture:
            if params.num_beams > 1:
                raise ConfigError(f"num_beams is {params.num_beams}; expected 1, as intermediate results are captured")
            capture = capture.resolve(model.config.decoder, len(tokens))
        n_asked = len(tokens) - 1 if params.prompt_logprobs else 0
        tokenizer = preprocessor.tokenizer
        ids = {tokenizer.eos_id, *model.config.eos_ids, *map(tokenizer.id_of, stops)}
        return Sequence(
            id=number,
            request=number,
            params=params,
            adapter=adapter,
            order=number + _LATER * priority,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            max_new_tokens=min(params.max_new_tokens, context - len(tokens)),
            stop_ids=frozenset(id for id in ids if id is not None),
            detokenizer=Detokenizer(tokenizer.decode, stops, after=None if params.strip else _last_text(tokens)),
            tokens=tokens,
            n_prompt=len(tokens),
            images=images,
            salt=salt,
            cache_salt=_cache_salt(adapter, model.config, len(tokens)),
            capture=capture,
            captured=Captured(
                images=[range(one.start, one.end) for one in images], images_only=bool(capture and capture.images_only)
            ),
            prompt_logprobs=[None] * n_asked,
            prompt_top_logprobs=[None] * n_asked,
            prepare_s=time.perf_counter() - started,
        )

    def _check_length(self, n_prompt: int, params: SamplingParams, context: int) -> None:
        """Raises ContextError if a prompt does not fit. context: maximum length of a request, in tokens."""
        if n_prompt > context or (n_prompt == context and params.max_new_tokens):
            by_cache = context == self.capacity
            limit = "the cache" if by_cache else "the model's context"
            raise ContextError(
                f"the prompt has {n_prompt} tokens, which leaves no room for a reply in {limit} of {context} tokens; "
                f"shorten the prompt{', or raise cache_memory= (--cache-memory)' if by_cache else ''}"
            )

    def _check_beams(self, n_prompt: int, params: SamplingParams, context: int) -> None:
        """Raises PromptError if the beams of a request may not fit into the cache together."""
        size, n_new = self.options.page_size, min(params.max_new_tokens, context - n_prompt)
        shares_prompt = self.options.prefix_cache and not params.prompt_logprobs  # also after preemption
        n_shared = n_prompt // size if shares_prompt else 0
        needed = n_shared + params.num_beams * (-(-(n_prompt - n_shared * size + n_new) // size) + 1)
        if params.num_beams > 1 and needed > self.n_pages:
            raise PromptError(
                f"{params.num_beams} beams of {params.max_new_tokens} tokens need {needed} pages of the cache, which "
                f"has {self.n_pages}; reduce num_beams= (--num-beams) or max_new_tokens= (--max-new-tokens)"
            )

    def variant(self, adapter: str | None) -> Variant:
        """Returns the model with an adapter, or the base for None. Raises ConfigError if there is none."""
        if adapter not in self.variants:
            names = ", ".join(name for name in self.variants if name is not None)
            available = names or "none; load with at least one adapter"
            raise ConfigError(f"unknown adapter {adapter!r}; available: {available}")
        return self.variants[adapter]


def _last_text(tokens: Rest[int]) -> list[int]:
    """Returns the ids at the end of a prompt that the text of a reply depends on, which may follow an image."""
    last = list(tokens[-_AFTER:])
    while IMAGE in last:
        del last[0]
    return last


_SEVERAL_IMAGES = (
    "the prompt contains several images; LLaVA models are trained with one image per conversation, so replies about "
    "several may be worse"
)


def split_request(request: Request) -> tuple[Messages, Rest[Picture] | None]:
    """Splits a request into (messages, images); images is None unless the request is a (raw prompt, images) pair."""
    if isinstance(request, tuple) and len(request) == 2 and isinstance(request[0], str):
        return request[0], request[1]
    return cast(Messages, request), None


def _cache_salt(adapter: str | None, config: LlavaConfig, n_prompt: int) -> bytes:
    """Returns what keys and values depend on besides tokens and pictures: the adapter, and with dynamic RoPE scaling
    the length of a long prompt."""
    scaling = config.decoder.rope_scaling
    is_scaled = scaling is not None and scaling.kind == "dynamic" and n_prompt > scaling.original_max_seq
    return repr((adapter, n_prompt if is_scaled else None)).encode()


def _check_belongs(input: ModelInput, tokens: Rest[int], config: LlavaConfig, preprocessor: Preprocessor) -> None:
    """Raises PromptError if a prepared input cannot be one for this model: its adapters may differ in both respects."""
    n, expected = tokens.count(IMAGE), preprocessor.n_image_tokens(input) if config.vision else 0
    if n == expected and max(tokens, default=0) < config.decoder.vocab_size:
        return
    found = f"{n} image tokens, where this model has {expected}" if n != expected else "ids beyond the vocabulary"
    raise PromptError(
        f"the input has {found}: it was prepared for another model or adapter; prepare it with the adapter= of the "
        "request"
    )
