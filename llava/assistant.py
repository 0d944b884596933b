"""The front door for Python: `load()` joins a checkpoint, a preprocessor and an engine into an `Assistant`.

S places of a sequence   V vocabulary rows or views   N features a view   D width
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from llava.checkpoint.adapters import open_separately
from llava.checkpoint.load import Pool, build, resolve_device, resolve_dtype
from llava.checkpoint.open import open_checkpoint
from llava.config import LlavaConfig, LoadOptions
from llava.engine.engine import Answer, Engine
from llava.engine.sampling import Sampling
from llava.errors import ConfigError, PromptError
from llava.formats.format import Checkpoint
from llava.model.llava import Llava
from llava.preprocess.image import Picture
from llava.preprocess.inputs import Messages, ModelInput, Preprocessor
from llava.zoo.bases import advice

LLAVA_TINY = Path(__file__).parent / "weights" / "llava-tiny"  # a small LLaVA that knows drawn objects

Request = Messages | tuple[str, Sequence[Picture]]  # a conversation, a raw prompt, or one with its pictures


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int  # places of the prompt, pictures' included
    image_tokens: int  # those of them that pictures take
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds of one request; in a batch, of the batch it ran in."""

    prepare_s: float  # pictures opened and resized, text encoded
    first_token_s: float  # from there to the first token: vision tower and prefill
    decode_s: float  # from the first token to the last

    tokens_per_s: float | None  # while decoding; None for answers of one token


@dataclass(frozen=True)
class Reply:
    """A finished answer."""

    text: str
    token_ids: list[int]  # without the end token or a stop string's
    finish_reason: Literal["stop", "length"]
    usage: Usage
    timings: Timings
    logprobs: list[float] | None = None  # of each token, where asked for
    top_logprobs: list[dict[int, float]] | None = None


def load(
    path: str | Path | None = None,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    vision: bool = True,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantize: str | None = None,
    template: str | None = None,
    revision: str | None = None,
    force: bool = False,
    image_mode: Literal["original", "hf"] | None = None,
    exif: bool = False,
    legacy_strip: bool = False,
    merge: bool = True,
    adapters: Mapping[str, str | Path] | None = None,
) -> "Assistant":
    """Loads a checkpoint from a folder or the hub; without a path llava-tiny, which lies in this package.

    base: folder or hub id of the language model that a LoRA, a projector or a delta belongs to; they are put together
        on the way in.
    merge: False keeps a LoRA apart from its base, as the adapter "default".
    adapters: folders or hub ids of LoRAs or projectors by names of your choice, each to be put on the model at `path`;
        `Assistant.adapter` switches between them. The first is chosen at the start.
    vision_tower: CLIP's folder or hub id; its weights are read only where the checkpoint holds none.
    vision: False loads the language model alone, and touches no vision file.
    dtype: "auto" | "float32" | "bfloat16" | "float16"; auto is the checkpoint's own on a GPU, on a CPU bfloat16
        (float32 below 1 B parameters).
    device: "auto" | "cpu" | "cuda" | "cuda:N".
    template: conversation template, where the checkpoint's own is not wanted.
    force: load in spite of unknown tensors, NaN and Inf, and of a base that is not the one of a delta.
    image_mode: whose arithmetic for pictures, LLaVA's or transformers'; default: what the layout was made for.
    exif: turn pictures as their EXIF orientation says; the original does not.
    legacy_strip: white space beside <im_start> and the like is dropped, as when v0 and v1.1 were trained.

    Raises LlavaError: one line that says what was found, what was expected and what to do.
    """
    path = LLAVA_TINY if path is None else path
    if quantize is not None:
        raise ConfigError(f"quantize={quantize!r}: this version has no quantisation yet; leave it out")
    if image_mode not in (None, "original", "hf"):
        raise ConfigError(f"image_mode is {image_mode!r}; expected original or hf")
    target = resolve_device(device)
    options = LoadOptions(
        base=base,
        vision_tower=vision_tower,
        vision=vision,
        revision=revision,
        image_mode=image_mode,
        legacy_strip=legacy_strip,
        force=force,
    )
    separate = bool(adapters) or not merge
    checkpoints: dict[str | None, Checkpoint]
    with advice():
        if separate:
            checkpoints = open_separately(path, adapters or {}, options, merge=merge)
        else:
            checkpoints = {None: open_checkpoint(path, options)}
    compute = resolve_dtype(dtype, next(iter(checkpoints.values())), target)
    pool: Pool | None = {} if separate else None
    loaded = {
        name: Loaded(
            build(checkpoint, dtype=compute, device=target, force=force, pool=pool),
            Preprocessor(checkpoint.config, checkpoint.tokenizer, template=template, exif=exif),
        )
        for name, checkpoint in checkpoints.items()
    }
    return Assistant(*loaded[None], adapters={name: one for name, one in loaded.items() if name is not None})


class Loaded(NamedTuple):
    """A model and what prepares its input."""

    model: Llava
    preprocessor: Preprocessor


class Assistant:
    """A loaded model that answers. Every method takes messages or a raw prompt (a str, with `images=`)."""

    model: Llava
    preprocessor: Preprocessor
    engine: Engine
    active: str | None  # the adapter that answers

    def __init__(
        self,
        model: Llava,
        preprocessor: Preprocessor,
        *,
        compile: bool = False,
        adapters: Mapping[str, Loaded] | None = None,
    ):
        """adapters: the same model with other weights; those that it does not change are the same tensors."""
        named: Iterable[tuple[str | None, Loaded]] = (adapters or {}).items()
        self._loaded = dict([*named, (None, Loaded(model, preprocessor))])
        self._engines = {
            name: Engine(one.model, one.preprocessor.tokenizer, compile=compile) for name, one in self._loaded.items()
        }
        self.adapter(next(iter(self._loaded)))

    @property
    def adapters(self) -> list[str]:
        """Names that `adapter` takes, besides None."""
        return [name for name in self._loaded if name is not None]

    def adapter(self, name: str | None) -> None:
        """From now on this adapter answers, with its own template, tokenizer and projector; None: the base alone.

        Nothing is loaded or copied; a stream that has begun goes on as it is. Raises ConfigError.
        """
        if name not in self._loaded:
            there = ", ".join(self.adapters) or "none; load with adapters= or merge=False"
            raise ConfigError(f"no adapter is named {name!r}; there are {there}")
        self.active, self.engine = name, self._engines[name]
        self.model, self.preprocessor = self._loaded[name]

    @property
    def config(self) -> LlavaConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def prepare(
        self, messages: Messages, *, images: Sequence[Picture] | None = None, template: str | None = None
    ) -> ModelInput:
        """What the model will see: prompt, ids, pixels. Raises PromptError, ImageError."""
        return self.preprocessor.prepare(messages, images=images, template=template)

    def ask(self, image: Picture | Sequence[Picture] | None, question: str, **options: Any) -> str:
        """The answer to one question about a picture, several, or none; options as for `generate`."""
        return self.generate(question_about(image, question), **options).text

    def generate(
        self,
        messages: Messages,
        *,
        images: Sequence[Picture] | None = None,
        template: str | None = None,
        **options: Any,
    ) -> Reply:
        """One answer. Options: the fields of `Sampling` (max_new_tokens, temperature, top_p, seed, stop, …)."""
        (reply,) = self._replies([(messages, images)], template, sampling(**options))
        return reply

    def generate_batch(
        self, requests: Sequence[Request], *, template: str | None = None, batch_size: int = 32, **options: Any
    ) -> list[Reply]:
        """Answers to many requests, `batch_size` of them side by side; in float32 each equals what it would be alone.

        Raw prompts take no template.
        """
        chosen = sampling(**options)
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected 1 or more")
        pairs = [_pair(item) for item in requests]
        replies: list[Reply] = []
        for i in range(0, len(pairs), batch_size):
            replies += self._replies(pairs[i : i + batch_size], template, chosen)
        return replies

    def stream(
        self,
        messages: Messages,
        *,
        images: Sequence[Picture] | None = None,
        template: str | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Pieces of the answer as they become certain; joined they equal `generate(…).text`."""
        return self.begin(messages, images=images, template=template, **options)

    def begin(
        self,
        messages: Messages,
        *,
        images: Sequence[Picture] | None = None,
        template: str | None = None,
        **options: Any,
    ) -> "Stream":
        """As `stream`; the iterator's `reply()` gives what is known of the answer, finished or not."""
        return Stream(self, self._request(messages, images, template), sampling(**options))

    def _request(
        self, messages: Messages, images: Sequence[Picture] | None, template: str | None
    ) -> tuple[ModelInput, float]:
        started = time.perf_counter()
        return self.prepare(messages, images=images, template=template), time.perf_counter() - started

    def _replies(
        self, requests: Sequence[tuple[Messages, Sequence[Picture] | None]], template: str | None, options: Sampling
    ) -> list[Reply]:
        prepared = [self._request(messages, images, template) for messages, images in requests]
        answers = [self.engine.start(input, options) for input, _ in prepared]
        for _ in self.engine.run(answers, options):
            pass
        return [reply(answer, seconds, options) for answer, (_, seconds) in zip(answers, prepared, strict=True)]

    @torch.inference_mode()
    def logits(
        self, messages: Messages, *, images: Sequence[Picture] | None = None, template: str | None = None
    ) -> Tensor:
        """[S, V] float32, for each place of the prompt what comes next."""
        x, pos = self._embedded(messages, images, template)
        return self.model.decoder.logits(self.model.decoder(x, pos))[0]

    @torch.inference_mode()
    def hidden_states(
        self,
        messages: Messages,
        layers: Sequence[int],
        *,
        images: Sequence[Picture] | None = None,
        template: str | None = None,
    ) -> dict[int, Tensor]:
        """{layer: [S, D]}, counted as transformers does: 0 the embeddings with the pictures put in, k after block k,
        -1 (the last) after the final norm.

        Raises ConfigError for a layer that is not there.
        """
        n_states = self.config.decoder.n_layers + 1
        for layer in layers:
            if not -n_states <= layer < n_states:
                raise ConfigError(f"layer {layer} is not there: this model has 0 to {n_states - 1}, or -1 for the last")
        wanted = {layer % n_states for layer in layers}
        x, pos = self._embedded(messages, images, template)
        states = {0: x[0]}
        after_blocks = list(wanted - {0, n_states - 1})
        for i, state in enumerate(self.model.decoder.states(x, pos), start=1):
            if i in after_blocks:
                states[i] = state[0]
            last = state
        states[n_states - 1] = last[0]  # the norm takes the place of the last block's own output
        return {layer: states[layer % n_states] for layer in layers}

    @torch.inference_mode()
    def vision_features(self, pixels: Tensor) -> Tensor:
        """pixels [views, 3, S, S] -> [views, N, D_vision]: the selected layer, the class token as configured."""
        if self.model.vision is None:
            raise PromptError("this model has no vision part (or was loaded with vision=False)")
        features: Tensor = self.model.vision(pixels.to(self.device, self.dtype))
        return features

    @torch.inference_mode()
    def project(self, features: Tensor) -> Tensor:
        """features [views, N, D_vision] -> [views, N, D]"""
        if self.model.projector is None:
            raise PromptError("this model has no projector (or was loaded with vision=False)")
        projected: Tensor = self.model.projector(features.to(self.device, self.dtype))
        return projected

    @torch.inference_mode()
    def image_embeddings(
        self, messages: Messages, *, images: Sequence[Picture] | None = None, template: str | None = None
    ) -> list[Tensor]:
        """What stands for each picture in the sequence, [tokens, D]; tiles packed."""
        return self.engine.encode([self.prepare(messages, images=images, template=template)])

    def _embedded(
        self, messages: Messages, images: Sequence[Picture] | None, template: str | None
    ) -> tuple[Tensor, Tensor]:
        x = self.engine.embed([self.prepare(messages, images=images, template=template)])
        return x, torch.arange(x.shape[1], device=x.device)


class Stream(Iterator[str]):
    """An answer on its way."""

    def __init__(self, assistant: Assistant, request: tuple[ModelInput, float], options: Sampling):
        input, self._prepare_s = request
        self._options = options
        self._answer = assistant.engine.start(input, options)
        self._pieces = (piece for _, piece in assistant.engine.run([self._answer], options) if piece)

    def __next__(self) -> str:
        return next(self._pieces)

    def reply(self) -> Reply:
        """The answer so far; finish_reason is "stop" for one that was given up."""
        return reply(self._answer, self._prepare_s, self._options)


def _pair(request: Request) -> tuple[Messages, Sequence[Picture] | None]:
    """A raw prompt with pictures is a pair of a str and a list; anything else stands for itself."""
    if isinstance(request, tuple) and len(request) == 2 and isinstance(request[0], str):
        return request[0], request[1]
    return cast(Messages, request), None


def question_about(image: Picture | Sequence[Picture] | None, question: str) -> Messages:
    """The conversation of one question about a picture, several, or none."""
    pictures = [] if image is None else list(image) if isinstance(image, list | tuple) else [cast(Picture, image)]
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def sampling(*, stop: str | Sequence[str] | None = None, **options: Any) -> Sampling:
    """Options of a request as a caller gives them. Raises ConfigError."""
    try:
        return Sampling(stop=(stop,) if isinstance(stop, str) else tuple(stop or ()), **options)
    except TypeError as error:
        raise ConfigError(f"sampling options: {str(error).split('__init__() ')[-1]}") from None


def reply(answer: Answer, prepare_s: float, options: Sampling) -> Reply:
    """What a finished row has to say."""
    n_text = len(answer.input.token_ids) - len(answer.input.views)
    decode_s = answer.ended - answer.first_token
    steps = answer.n_written - 1
    return Reply(
        text=answer.text.text,
        token_ids=list(answer.text.ids),
        finish_reason=answer.finish_reason or "stop",
        usage=Usage(answer.n_prompt, answer.n_prompt - n_text, len(answer.text.ids)),
        timings=Timings(
            prepare_s, answer.first_token - answer.started, decode_s, steps / decode_s if steps > 0 < decode_s else None
        ),
        logprobs=answer.logprobs if options.logprobs else None,
        top_logprobs=answer.top_logprobs if options.logprobs else None,
    )
