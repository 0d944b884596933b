"""The Python API: `load()` combines a checkpoint, a preprocessor and an engine into an `Assistant`.

S sequence length   V vocabulary size   N features per view   D dim
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from llava.checkpoint.adapters import open_separately
from llava.checkpoint.consistency import warn_about_other_chat_template
from llava.checkpoint.load import Pool, build, resolve_device, resolve_dtype
from llava.checkpoint.open import open_checkpoint
from llava.config import EngineOptions, LlavaConfig, LoadOptions, PictureOptions, Transparency
from llava.engine.adapters import Variant
from llava.engine.capture import Capture
from llava.engine.engine import Engine
from llava.engine.input_processor import Request
from llava.engine.reply import Reply, Stream
from llava.engine.sampling_params import SamplingParams
from llava.errors import ConfigError, PromptError
from llava.explain.attention import Focus
from llava.explain.maps import AttentionMap, attention_map
from llava.formats.format import Checkpoint
from llava.model.llava import Llava
from llava.model.staging import on_device
from llava.preprocess.image import Picture
from llava.preprocess.inputs import Messages, ModelInput, Preprocessor
from llava.zoo.bases import advice

log = logging.getLogger(__name__)
LLAVA_TINY = Path(__file__).parent / "weights" / "llava-tiny"  # a small LLaVA model that recognises drawn objects


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
    ignore_tensors: Sequence[str] | None = None,
    image_mode: Literal["original", "hf"] | None = None,
    exif: bool = False,
    transparency: Transparency = "drop",
    legacy_strip: bool = False,
    merge: bool = True,
    adapters: Mapping[str, str | Path] | None = None,
    engine: EngineOptions | None = None,
) -> "Assistant":
    """Loads a checkpoint from a folder or the Hugging Face hub. Without `path`, loads the included llava-tiny.

    base: folder or hub id of the language model that a LoRA, projector or delta belongs to; the two are combined
        during loading.
    merge: False keeps a LoRA separate from its base, as the adapter named "default".
    adapters: {name: folder or hub id} of LoRAs or projectors to use with the model at `path`. The first one is active
        after loading; `Assistant.adapter` switches between them by name.
    vision_tower: folder or hub id of the CLIP model; its weights are read only if the checkpoint contains no
        tower weights.
    vision: False loads only the language model and opens no vision files.
    dtype: "auto" | "float32" | "bfloat16" | "float16"; "auto" selects the checkpoint's dtype on a GPU. On a
        CPU, it selects float32 for models with fewer than 1 B parameters and bfloat16 for larger models.
    device: "auto" | "cpu" | "cuda" | "cuda:N".
    quantize: must be None; this version does not support quantization.
    template: name of the conversation template to use instead of the checkpoint's own.
    revision: branch, tag or commit on the hub.
    force: load despite NaN or Inf values, or a mismatched base.
    ignore_tensors: on-disk names, or patterns with *, of tensors to leave out. The model then no longer computes what
        its files describe.
    image_mode: preprocess images as in the original LLaVA code ("original") or as in transformers ("hf"). None
        selects the mode that the checkpoint was made for.
    exif: rotate images according to their EXIF orientation, which the original LLaVA code ignores.
    transparency: what to do with transparent pixels: "drop" uses the colours stored under them, as the original LLaVA
        code does; "white" or "black" places images on a background of this colour.
    engine: how many requests run at the same time, how much memory their keys and values get, and the like.
    legacy_strip: strip white space around <im_start> and other added tokens, as LLaVA v0 and v1.1 did in training.

    Raises LlavaError.
    """
    path = LLAVA_TINY if path is None else path
    refuse_quantization(quantize)
    if image_mode not in (None, "original", "hf"):
        raise ConfigError(f"image_mode is {image_mode!r}; expected original or hf")
    pictures = PictureOptions(exif=exif, transparency=transparency)
    target = resolve_device(device)
    options = LoadOptions(
        base=base,
        vision_tower=vision_tower,
        vision=vision,
        revision=revision,
        image_mode=image_mode,
        legacy_strip=legacy_strip,
        force=force,
        ignore_tensors=tuple(ignore_tensors or ()),
    )
    separate = bool(adapters) or not merge
    checkpoints: dict[str | None, Checkpoint]
    with advice():
        if separate:
            checkpoints = open_separately(path, adapters or {}, options, merge=merge)
        else:
            checkpoints = {None: open_checkpoint(path, options)}
    if template is None:
        for checkpoint in checkpoints.values():
            warn_about_other_chat_template(checkpoint)
    compute = resolve_dtype(dtype, next(iter(checkpoints.values())), target)
    pool: Pool | None = {} if separate else None
    loaded = {
        name: Variant(
            build(checkpoint, dtype=compute, device=target, force=force, pool=pool),
            Preprocessor(checkpoint.config, checkpoint.tokenizer, template=template, pictures=pictures),
        )
        for name, checkpoint in checkpoints.items()
    }
    return Assistant(
        *loaded[None], adapters={name: one for name, one in loaded.items() if name is not None}, options=engine
    )


def refuse_quantization(quantize: str | None) -> None:
    """Raises ConfigError if quantization is asked for, which this version does not support."""
    if quantize is not None:
        raise ConfigError(f"quantize={quantize!r} (--quantize): this version does not support quantization; omit it")


class Assistant:
    """A model with its preprocessor and engine. The methods take messages, or a raw prompt (a str) and `images=`."""

    model: Llava
    preprocessor: Preprocessor
    active: str | None  # name of the active adapter

    def __init__(
        self,
        model: Llava,
        preprocessor: Preprocessor,
        *,
        adapters: Mapping[str, Variant] | None = None,
        options: EngineOptions | None = None,
    ):
        """adapters: variants of the model, by name; they share all unchanged weights with `model`."""
        named: Iterable[tuple[str | None, Variant]] = (adapters or {}).items()
        self._loaded = dict([*named, (None, Variant(model, preprocessor))])
        self.engine = Engine(self._loaded, options)
        self.adapter(next(iter(self._loaded)))

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters."""
        return [name for name in self._loaded if name is not None]

    def adapter(self, name: str | None) -> None:
        """Switches to an adapter and its template, tokenizer and projector, or to the base model if `name` is None.

        Nothing is loaded or copied, and streams that have already started are not affected. Raises ConfigError if
        there is no adapter with this name.
        """
        self.model, self.preprocessor = self.engine.inputs.variant(name)
        self.active = name

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
        """Returns the model input for the active adapter: prompt, ids and pixels. Raises PromptError, ImageError.

        Logs one warning for each image whose values or transparency were lost.
        """
        return self.engine.inputs.prepare(messages, images=images, template=template, adapter=self.active)

    def ask(self, image: Picture | Sequence[Picture] | None, question: str, **options: Any) -> str:
        """Answers a question about any number of images and returns the reply text. Options: see `generate`."""
        return self.generate(question_about(image, question), **options).text

    def generate(
        self,
        messages: Messages,
        *,
        images: Sequence[Picture] | None = None,
        template: str | None = None,
        **options: Any,
    ) -> Reply:
        """Generates a reply. Options: `SamplingParams` fields (max_new_tokens, temperature, top_p, seed, stop, …)."""
        stream = self.begin(messages, images=images, template=template, **options)
        for _ in stream:
            pass
        return stream.reply()

    def generate_batch(
        self, requests: Sequence[Request], *, template: str | None = None, batch_size: int | None = None, **options: Any
    ) -> list[Reply]:
        """Generates replies to many requests, in order. In float32, they match the replies of `generate`.

        batch_size: how many requests are prepared and run at the same time; default: as many as the engine allows.
        `template` does not apply to raw prompts. Other options: see `generate`.
        """
        params = SamplingParams.from_options(**options)
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected 1 or more")
        return self.engine.generate(requests, params, adapter=self.active, at_once=batch_size, template=template)

    def stream(
        self,
        messages: Messages,
        *,
        images: Sequence[Picture] | None = None,
        template: str | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yields pieces of the reply as soon as they are final; concatenated, they equal `generate(…).text`."""
        return self.begin(messages, images=images, template=template, **options)

    def begin(
        self,
        messages: Messages,
        *,
        images: Sequence[Picture] | None = None,
        template: str | None = None,
        **options: Any,
    ) -> Stream:
        """Like `stream`, but the returned iterator also has a `reply()` method that returns the reply so far."""
        params = SamplingParams.from_options(**options)
        started = time.perf_counter()
        input = self.prepare(messages, images=images, template=template)
        return self.engine.stream(input, params, adapter=self.active, prepare_s=time.perf_counter() - started)

    @torch.inference_mode()
    def logits(
        self, messages: Messages, *, images: Sequence[Picture] | None = None, template: str | None = None
    ) -> Tensor:
        """Returns next-token logits at every position of the prompt, [S, V] float32."""
        x = self._embedded(messages, images, template)
        return self.model.decoder.logits(self.model.decoder(x))[0]

    def hidden_states(
        self,
        messages: Messages,
        layers: Sequence[int],
        *,
        images: Sequence[Picture] | None = None,
        template: str | None = None,
    ) -> dict[int, Tensor]:
        """Returns {layer: hidden states [S, D]}, with layers numbered as in transformers: 0 is the input embeddings,
        including image embeddings; k is the output of block k; the last (-1) is the output of the final norm.

        Raises ConfigError if a layer does not exist.
        """
        n_states = self.config.decoder.n_layers + 1
        for layer in layers:
            if not -n_states <= layer < n_states:
                raise ConfigError(
                    f"layer {layer} does not exist: this model has layers 0 to {n_states - 1} (-1: the last)"
                )
        capture = Capture(hidden_states=tuple({layer % n_states for layer in layers}))
        input = self.prepare(messages, images=images, template=template)
        params = SamplingParams(max_new_tokens=0)
        stream = self.engine.stream(input, params, adapter=self.active, capture=capture)
        for _ in stream:
            pass
        states = stream.captured()
        return {layer: states.hidden_states(layer % n_states).to(self.device) for layer in layers}

    def attention_map(
        self,
        messages: Messages,
        *,
        images: Sequence[Picture] | None = None,
        template: str | None = None,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        rollout: bool = False,
        **options: Any,
    ) -> AttentionMap:
        """Generates a reply, and returns what each of its tokens looks at in the pictures. Options: see `generate`.

        layers, heads: blocks of the decoder and attention heads, from 0, whose mean is taken; default: all. rollout:
        follow the attention through these blocks instead (arXiv:2005.00928).

        Raises PromptError if there is no picture, and ConfigError if a block or head does not exist.
        """
        focus = Focus(layers=_tuple(layers), heads=_tuple(heads), rollout=rollout).resolved(self.config.decoder)
        params = SamplingParams.from_options(**options)
        input = self.prepare(messages, images=images, template=template)
        if input.pixels is None:
            raise PromptError("there is no picture to look at; pass one with the question")
        stream = self.engine.stream(input, params, adapter=self.active, capture=focus.capture())
        for _ in stream:
            pass
        tokenizer = self.preprocessor.tokenizer
        return attention_map(stream.reply(), stream.captured(), input, self.config, tokenizer, focus)

    @torch.inference_mode()
    def vision_features(self, pixels: Tensor) -> Tensor:
        """pixels [views, 3, size, size] -> features [views, N, D_vision] of the selected layer.

        The class token is included if the config selects it.
        """
        if self.model.vision is None:
            raise PromptError(f"this model has no vision tower {_WITHOUT_VISION}")
        with on_device(self.device):
            features: Tensor = self.model.vision(pixels.to(self.device, self.dtype))
        return features

    @torch.inference_mode()
    def project(self, features: Tensor) -> Tensor:
        """features [views, N, D_vision] -> [views, N, D]"""
        if self.model.projector is None:
            raise PromptError(f"this model has no projector {_WITHOUT_VISION}")
        projected: Tensor = self.model.projector(features.to(self.device, self.dtype))
        return projected

    @torch.inference_mode()
    def image_embeddings(
        self, messages: Messages, *, images: Sequence[Picture] | None = None, template: str | None = None
    ) -> list[Tensor]:
        """Returns one tensor [tokens, D] per image: all embeddings that represent the image in the input sequence."""
        return self._encode(self.prepare(messages, images=images, template=template))

    def _encode(self, input: ModelInput) -> list[Tensor]:
        if input.pixels is None:
            return []
        with on_device(self.device):
            return self.model.encode_images(input.pixels.to(self.device, self.dtype), input.views, input.grids)

    def _embedded(self, messages: Messages, images: Sequence[Picture] | None, template: str | None) -> Tensor:
        """Returns the embeddings [1, S, D] of the prompt, including its images."""
        input = self.prepare(messages, images=images, template=template)
        return self.model.embed(input.ids.to(self.device), self._encode(input))[None]


_WITHOUT_VISION = "(or was loaded without it)"


def _tuple(numbers: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(numbers)


def question_about(image: Picture | Sequence[Picture] | None, question: str) -> list[dict[str, Any]]:
    """Returns a conversation with one question about any number of images."""
    images = [] if image is None else list(image) if isinstance(image, list | tuple) else [cast(Picture, image)]
    parts: list[dict[str, Any]] = [{"type": "image", "image": one} for one in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
