"""Converts messages or a raw prompt, with their images, to a `ModelInput`, which contains everything the model needs.

S: sequence length, with each image expanded to one token per feature vector.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from llava.config import IGNORE, IMAGE, IMAGE_PLACEHOLDER, LlavaConfig, PictureOptions, TileGrid
from llava.errors import ContextError, PromptError, counted
from llava.preprocess import placeholders
from llava.preprocess.conversation import Span, Style, Template, Turn, render
from llava.preprocess.image import Picture, Preprocessed, preprocess
from llava.preprocess.labels import ImagePlace, move_marks, training_spans
from llava.preprocess.literal import LiteralTokenizer
from llava.preprocess.messages import Message, read_messages
from llava.preprocess.raster import PictureMemory, Size
from llava.preprocess.templates import TEMPLATES
from llava.preprocess.tokenizer import Tokenizer

Messages = str | Sequence[Message]  # a raw prompt, or a conversation
# Stands for a placeholder while the tokenizer's own placeholder token must not be produced. U+FDD0 is not a character.
_STAND_IN = "\ufdd0image\ufdd0"


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """The model's input for one conversation."""

    prompt: str  # the rendered text, with literal placeholders in their escaped form
    token_ids: list[int]  # as in the original code, with one IMAGE (-200) per image
    ids: Tensor  # int64 [S]: token ids, with IMAGE for each image token
    labels: Tensor  # int64 [S]: token ids of target tokens, IGNORE elsewhere
    pixels: Tensor | None = None  # float32 [views, 3, size, size], in the order of the images
    views: list[int] = field(default_factory=list)  # number of views of each image
    grids: list[TileGrid | None] = field(default_factory=list)  # tile arrangement of each image; see `Views`
    image_sizes: list[Size] = field(default_factory=list)  # (w, h) of each image in pixels; see `Views`
    stop: str | None = None  # string that ends a reply in this template; None for raw prompts and training
    losses: list[str] = field(default_factory=list)  # what reading the images lost; see `RgbPicture`

    @cached_property
    def digests(self) -> list[bytes]:
        """SHA-256 of the pixels and the tile grid of each image, on which the features of the image depend."""
        if self.pixels is None:
            return []
        digests = []
        for pixels, grid in zip(self.pixels.split(self.views), self.grids, strict=True):
            digest = hashlib.sha256(repr((grid, tuple(pixels.shape))).encode())
            digest.update(pixels.contiguous().numpy().data)
            digests.append(digest.digest())
        return digests


class Preprocessor:
    """Prepares inputs for one model, with its tokenizer, template and image settings."""

    def __init__(
        self,
        config: LlavaConfig,
        tokenizer: Tokenizer,
        *,
        template: str | None = None,
        pictures: PictureOptions | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.template = template or config.template
        self.pictures = pictures or PictureOptions()
        if template:
            find_template(template)

    def prepare(
        self,
        messages: Messages,
        *,
        images: Sequence[Picture] | None = None,
        template: str | None = None,
        memory: PictureMemory | None = None,
        literal: bool = False,
    ) -> ModelInput:
        """Prepares a conversation, or a raw prompt with one entry of `images` for each image placeholder.

        memory: where images that it accepts are resized; Pillow resizes the others. The pixels are the same.
        literal: placeholders and special tokens in the text are ordinary text, so that whoever wrote it controls
            nothing else. A raw prompt then has no images.

        Raises PromptError if the messages, placeholders, template or length is invalid, ImageError for invalid images.
        """
        stop, mark = None, self._literal.mark if literal else _unchanged
        if isinstance(messages, str):
            spans, pictures = [Span(placeholders.literal(messages) if literal else messages)], list(images or ())
            _check_marks(spans[0].text, len(pictures))
        elif images is not None:
            raise PromptError("images= is only for raw prompts; in a conversation, put the images into the messages")
        else:
            chosen = self._chosen(template)
            enclosing = (mark("<im_start>"), mark("<im_end>")) if self.config.start_end else None
            turns, pictures, system = read_messages(messages, enclosing=enclosing, literal=literal)
            spans, stop = render(chosen.with_texts(mark), turns, system), chosen.stop
        return self._assemble(spans, self._read(pictures, memory), stop, literal=literal)

    def prepare_ids(self, ids: Sequence[int]) -> ModelInput:
        """Prepares a prompt of token ids, taken as they are, without images. Raises PromptError."""
        vocab_size = self.config.decoder.vocab_size
        if wrong := [id for id in ids if not 0 <= id < vocab_size]:
            raise PromptError(f"the prompt contains the token id {wrong[0]}; expected ids from 0 to {vocab_size - 1}")
        self._check_ids(ids, "prompt")
        return ModelInput(
            prompt=self.tokenizer.decode(ids, skip_special=False),
            token_ids=list(ids),
            ids=torch.tensor(ids),
            labels=torch.full((len(ids),), IGNORE),
        )

    def prepare_training(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Picture],
        *,
        system: str | None = None,
        place: ImagePlace = "front",
        max_length: int,
    ) -> ModelInput:
        """Prepares the input and labels of a training sample, truncated to `max_length` text and image tokens in total.

        system: replaces the system message of the template. Raises PromptError if roles or placeholders are invalid or
        no targets remain, ContextError if the whole sample is longer than the model's context, and ImageError for
        invalid images.
        """
        template = self._chosen(None)
        marks = sum(placeholders.count(turn.text or "") for turn in turns)
        if marks != len(pictures):
            raise PromptError(
                f"the sample has {_counts(marks, len(pictures))}; expected one placeholder per image{_HINT}"
            )
        tagged = template.tagged and template.style is not Style.PLAIN
        moved = move_marks(turns, place, start_end=self.config.start_end, tagged=tagged)
        spans = training_spans(template, moved, system)
        whole = self._assemble(spans, self._read(pictures), None, limit=max_length)
        if bool((whole.labels == IGNORE).all()):
            raise PromptError(f"the first {max_length} tokens of the sample contain no answer to train on")
        return whole

    def _chosen(self, template: str | None) -> Template:
        name = template or self.template
        if name is None:
            raise PromptError(
                "this checkpoint does not specify a conversation template: set template= (--template) to one of "
                f"{_names()}"
            )
        return find_template(name)

    def _read(self, pictures: Sequence[Picture], memory: PictureMemory | None = None) -> list[Preprocessed]:
        if pictures and (self.config.vision is None or self.config.image is None):
            raise PromptError("this model has no vision tower (or was loaded without it): leave the images out")
        vision, image = self.config.vision, self.config.image
        return [preprocess(one, image, vision.grid, self.pictures, memory) for one in pictures if vision and image]

    def n_image_tokens(self, input: ModelInput) -> int:
        """Returns the number of image tokens of an input, including those cut off by `max_length`."""
        return sum(self._n_image_tokens(n, grid) for n, grid in zip(input.views, input.grids, strict=True))

    def _n_image_tokens(self, n_views: int, grid: TileGrid | None) -> int:
        assert self.config.vision
        n = self.config.vision.n_features
        return n + grid.n_tokens if grid else n * n_views

    def _assemble(
        self,
        spans: list[Span],
        images: list[Preprocessed],
        stop: str | None,
        limit: int | None = None,
        *,
        literal: bool = False,
    ) -> ModelInput:
        """Builds the input, truncated to `limit` tokens. Raises ContextError if the whole exceeds the context."""
        prompt = "".join(span.text for span in spans)
        tokens = list(self._tokens(prompt, spans, literal))
        pictures = [image.views for image in images]
        if (n := sum(id == IMAGE for id, _ in tokens)) != len(pictures):
            raise PromptError(
                f"the tokenizer found {counted(n, f'{IMAGE_PLACEHOLDER} placeholder')} in a prompt with "
                f"{counted(len(pictures), 'image')}; expected one placeholder per image"
            )
        image_tokens = iter([self._n_image_tokens(len(views.pixels), views.grid) for views in pictures])
        ids: list[int] = []
        labels: list[int] = []
        for id, is_target in tokens:
            n = next(image_tokens) if id == IMAGE else 1
            ids += [id] * n
            labels += [id if is_target else IGNORE] * n
        self._check_ids(ids, "prompt" if limit is None else "sample")
        return ModelInput(
            prompt=self._literal.unmark(prompt) if literal else prompt,
            token_ids=[id for id, _ in tokens],
            ids=torch.tensor(ids[:limit]),
            labels=torch.tensor(labels[:limit]),
            pixels=torch.cat([views.pixels for views in pictures]) if pictures else None,
            views=[len(views.pixels) for views in pictures],
            grids=[views.grid for views in pictures],
            image_sizes=[views.size for views in pictures],
            stop=stop,
            losses=[loss for image in images for loss in image.losses],
        )

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        """Raises PromptError if `ids` is empty or has an id without an embedding, ContextError if it is too long."""
        if not ids:
            raise PromptError(f"the {what} is empty: add some text")
        if (highest := max(ids)) >= self.config.decoder.vocab_size:
            text = self.tokenizer.decode([highest], skip_special=False)
            raise PromptError(
                f"the {what} contains {text!r} (token id {highest}), but the model has only "
                f"{self.config.decoder.vocab_size} embeddings: remove this text"
            )
        if len(ids) > (context := self.config.decoder.max_seq):
            raise ContextError(
                f"the {what} has {len(ids)} tokens, which exceeds the model's context of {context}: shorten the {what}"
            )

    def _tokens(self, prompt: str, spans: list[Span], literal: bool) -> Iterator[tuple[int, bool]]:
        """Yields each token id of the prompt, and whether it is a target.

        As in the original code, the text is split at the image placeholders, and each stretch is encoded separately.
        In "hf" mode, as in transformers, the prompt is encoded as a whole if the tokenizer has a placeholder token.
        """
        try:
            targets = b"".join(bytes([span.target]) * len(span.text.encode()) for span in spans)  # one flag per byte
            stretches = placeholders.split(prompt, targets)
        except UnicodeEncodeError:
            raise PromptError("the prompt is not valid UTF-8 text") from None
        if self.tokenizer.bos_id is not None:
            yield self.tokenizer.bos_id, False
        tokenizer, mark = self.tokenizer, IMAGE_PLACEHOLDER
        own_mark = tokenizer.id_of(mark)
        if literal:
            tokenizer, mark = self._literal.tokenizer, self._literal.mark(IMAGE_PLACEHOLDER)
        elif own_mark is not None and placeholders.has_literal(prompt):
            tokenizer, mark = self._unmarked_tokenizer, _STAND_IN
        if own_mark is not None and self.config.image is not None and self.config.image.mode == "hf":
            stretches = [_join(stretches, mark)]
        for i, (text, flags) in enumerate(stretches):
            if i:
                yield IMAGE, False
            for id, start, end in tokenizer.encode_tokens(text):
                if id == own_mark:
                    yield IMAGE, False
                else:
                    yield id, any(flags[start : max(end, start + 1)])

    @cached_property
    def _unmarked_tokenizer(self) -> Tokenizer:
        """The tokenizer that encodes a literal placeholder as ordinary text."""
        return self.tokenizer.with_renamed({IMAGE_PLACEHOLDER: _STAND_IN})

    @cached_property
    def _literal(self) -> LiteralTokenizer:
        """The tokenizer that encodes all special tokens in the text of clients as ordinary text."""
        return LiteralTokenizer(self.tokenizer)


def _unchanged(text: str) -> str:
    return text


def _join(stretches: Sequence[placeholders.Stretch], mark: str) -> placeholders.Stretch:
    """Joins the stretches again, with a placeholder token between them."""
    text, flags = zip(*stretches, strict=True)
    return placeholders.Stretch(mark.join(text), bytes(len(mark.encode())).join(flags))


def find_template(name: str) -> Template:
    """Returns the template called `name`. If it does not exist, raises PromptError with a list of all names."""
    if name not in TEMPLATES:
        raise PromptError(f"unknown template {name!r}; choose one of {_names()}")
    return TEMPLATES[name]


def _names() -> str:
    return ", ".join(TEMPLATES)


_HINT = f"; escape it as \\{IMAGE_PLACEHOLDER} where it is literal text"


def _counts(n_marks: int, n_pictures: int) -> str:
    return f"{counted(n_marks, f'{IMAGE_PLACEHOLDER} placeholder')} and {counted(n_pictures, 'image')}"


def _check_marks(prompt: str, n_pictures: int) -> None:
    if (marks := placeholders.count(prompt)) != n_pictures:
        raise PromptError(f"the prompt has {_counts(marks, n_pictures)}: write one placeholder for each image{_HINT}")
