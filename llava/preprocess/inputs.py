"""Converts messages or a raw prompt, with their images, to a `ModelInput`, which contains everything the model needs.

S: sequence length, with each image expanded to one token per feature vector.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.config import IGNORE, IMAGE, IMAGE_PLACEHOLDER, LlavaConfig, TileGrid
from llava.errors import PromptError
from llava.preprocess.conversation import Span, Style, Template, Turn, render
from llava.preprocess.image import Picture, Size, Views, open_picture, to_views
from llava.preprocess.labels import ImagePlace, move_marks, training_spans
from llava.preprocess.templates import TEMPLATES
from llava.preprocess.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": …, "content": text or a list of {"type": "text" | "image", …}}
Messages = str | Sequence[Message]  # a raw prompt, or a conversation


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """The model's input for one conversation."""

    prompt: str  # the rendered text
    token_ids: list[int]  # as in the original code, with one IMAGE (-200) per image
    ids: Tensor  # int64 [S]: token ids, with IMAGE for each image token
    labels: Tensor  # int64 [S]: token ids of target tokens, IGNORE elsewhere
    pixels: Tensor | None = None  # float32 [views, 3, size, size], in the order of the images
    views: list[int] = field(default_factory=list)  # number of views of each image
    grids: list[TileGrid | None] = field(default_factory=list)  # tile arrangement of each image; see `Views`
    image_sizes: list[Size] = field(default_factory=list)  # (w, h) of each image in pixels; see `Views`
    stop: str | None = None  # string that ends a reply in this template; None for raw prompts and training


class _Turns(NamedTuple):
    turns: list[Turn]
    pictures: list[Picture]
    system: str | None


class Preprocessor:
    """Prepares inputs for one model, with its tokenizer, template and image settings."""

    def __init__(self, config: LlavaConfig, tokenizer: Tokenizer, *, template: str | None = None, exif: bool = False):
        self.config = config
        self.tokenizer = tokenizer
        self.template = template or config.template
        self.exif = exif
        if template:
            find_template(template)

    def prepare(
        self, messages: Messages, *, images: Sequence[Picture] | None = None, template: str | None = None
    ) -> ModelInput:
        """Prepares a conversation, or a raw prompt with one entry of `images` for each image placeholder.

        Raises PromptError if the messages, placeholders, template or length is invalid, ImageError for invalid images.
        """
        stop = None
        if isinstance(messages, str):
            spans, pictures = [Span(messages)], list(images or ())
            _count_marks("the prompt", messages, len(pictures))
        elif images is not None:
            raise PromptError("images= is only for raw prompts; in a conversation, put the images into the messages")
        else:
            chosen = self._chosen(template)
            turns, pictures, system = self._read(messages)
            spans, stop = render(chosen, turns, system), chosen.stop
        return self._assemble(spans, [self._views(picture) for picture in pictures], stop)

    def prepare_training(
        self, turns: Sequence[Turn], pictures: Sequence[Picture], *, place: ImagePlace = "front", max_length: int
    ) -> ModelInput:
        """Prepares the input and labels of a training sample, truncated to `max_length` text and image tokens in total.

        Raises PromptError if roles or placeholders are invalid or no targets remain, and ImageError for invalid images.
        """
        template = self._chosen(None)
        marks = sum((turn.text or "").count(IMAGE_PLACEHOLDER) for turn in turns)
        if marks != len(pictures):
            raise PromptError(
                f"the sample has {marks} {IMAGE_PLACEHOLDER} placeholder(s) and {len(pictures)} image(s); "
                "expected one placeholder per image"
            )
        tagged = template.tagged and template.style is not Style.PLAIN
        spans = training_spans(template, move_marks(turns, place, start_end=self.config.start_end, tagged=tagged))
        whole = self._assemble(spans, [self._views(picture) for picture in pictures], None, limit=max_length)
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

    def _read(self, messages: Sequence[Message]) -> _Turns:
        """Converts messages to turns with image placeholders. Adds an empty assistant turn after a final user turn."""
        turns: list[Turn] = []
        pictures: list[Picture] = []
        system = None
        for i, message in enumerate(messages):
            where = f"message {i + 1}"
            role, text, own = _parse(message, where)
            marked = self._marked(text, len(own), role, where)
            if role == "system":
                if i:
                    raise PromptError(f"{where} is a system message; only the first message can be a system message")
                system = marked
                continue
            turns.append(Turn("user" if role == "user" else "assistant", marked))
            pictures += own
        if not turns:
            raise PromptError("the conversation has no user message: add at least one")
        if turns[-1].role == "user":
            turns.append(Turn("assistant", None))
        return _Turns(turns, pictures, system)

    def _marked(self, text: str, n_pictures: int, role: str, where: str) -> str:
        if n_pictures and role != "user":
            raise PromptError(
                f"{where} is from the {role} and contains an image; only user messages can contain images"
            )
        if IMAGE_PLACEHOLDER not in text:
            text = f"{IMAGE_PLACEHOLDER}\n" * n_pictures + text
        _count_marks(where, text, n_pictures, ", or none at all to put the images first")
        return (
            text.replace(IMAGE_PLACEHOLDER, f"<im_start>{IMAGE_PLACEHOLDER}<im_end>") if self.config.start_end else text
        )

    def _views(self, picture: Picture) -> Views:
        if self.config.vision is None or self.config.image is None:
            raise PromptError("this model has no vision tower (or was loaded without it): leave the images out")
        return to_views(open_picture(picture, exif=self.exif), self.config.image, self.config.vision.grid)

    def n_image_tokens(self, input: ModelInput) -> int:
        """Returns the number of image tokens of an input, including those cut off by `max_length`."""
        return sum(self._n_image_tokens(n, grid) for n, grid in zip(input.views, input.grids, strict=True))

    def _n_image_tokens(self, n_views: int, grid: TileGrid | None) -> int:
        assert self.config.vision
        n = self.config.vision.n_features
        return n + grid.n_tokens if grid else n * n_views

    def _assemble(
        self, spans: list[Span], pictures: list[Views], stop: str | None, limit: int | None = None
    ) -> ModelInput:
        """Builds the input, truncated to `limit` tokens. If `limit` is None, raises PromptError for overlong inputs."""
        prompt = "".join(span.text for span in spans)
        tokens = list(self._tokens(prompt, spans))
        if (n := sum(id == IMAGE for id, _ in tokens)) != len(pictures):
            raise PromptError(
                f"the tokenizer found {n} {IMAGE_PLACEHOLDER} placeholder(s) in a prompt with "
                f"{len(pictures)} image(s); expected one placeholder per image"
            )
        image_tokens = iter([self._n_image_tokens(len(views.pixels), views.grid) for views in pictures])
        ids: list[int] = []
        labels: list[int] = []
        for id, is_target in tokens:
            n = next(image_tokens) if id == IMAGE else 1
            ids += [id] * n
            labels += [id if is_target else IGNORE] * n
        self._check_ids(ids, self.config.decoder.max_seq if limit is None else None)
        return ModelInput(
            prompt=prompt,
            token_ids=[id for id, _ in tokens],
            ids=torch.tensor(ids[:limit]),
            labels=torch.tensor(labels[:limit]),
            pixels=torch.cat([views.pixels for views in pictures]) if pictures else None,
            views=[len(views.pixels) for views in pictures],
            grids=[views.grid for views in pictures],
            image_sizes=[views.size for views in pictures],
            stop=stop,
        )

    def _check_ids(self, ids: Sequence[int], context: int | None) -> None:
        """Raises PromptError if `ids` is empty, is longer than `context`, or contains an id without an embedding."""
        if not ids:
            raise PromptError("the prompt is empty: add some text")
        if (highest := max(ids)) >= self.config.decoder.vocab_size:
            text = self.tokenizer.decode([highest], skip_special=False)
            raise PromptError(
                f"the prompt contains {text!r} (token id {highest}), but the model has only "
                f"{self.config.decoder.vocab_size} embeddings: remove this text"
            )
        if context is not None and len(ids) > context:
            raise PromptError(
                f"the prompt has {len(ids)} tokens, which exceeds the model's context of {context}: shorten the prompt"
            )

    def _tokens(self, prompt: str, spans: list[Span]) -> Iterator[tuple[int, bool]]:
        """Yields each token id of the prompt, and whether it is a target.

        As in the original code, the text is split at the image placeholders, and each stretch is encoded separately.
        In "hf" mode, as in transformers, the prompt is encoded as a whole if the tokenizer has a placeholder token.
        """
        try:
            targets = b"".join(bytes([span.target]) * len(span.text.encode()) for span in spans)  # one flag per byte
        except UnicodeEncodeError:
            raise PromptError("the prompt is not valid UTF-8 text") from None
        if self.tokenizer.bos_id is not None:
            yield self.tokenizer.bos_id, False
        whole = self.config.image is not None and self.config.image.mode == "hf"
        own_mark = self.tokenizer.id_of(IMAGE_PLACEHOLDER) if whole else None
        offset = 0  # start of the stretch, in bytes
        for i, stretch in enumerate(prompt.split(IMAGE_PLACEHOLDER) if own_mark is None else [prompt]):
            if i:
                yield IMAGE, False
            for id, start, end in self.tokenizer.encode_tokens(stretch):
                if id == own_mark:
                    yield IMAGE, False
                else:
                    yield id, any(targets[offset + start : offset + max(end, start + 1)])
            offset += len(stretch.encode()) + len(IMAGE_PLACEHOLDER)


def find_template(name: str) -> Template:
    """Returns the template called `name`. If it does not exist, raises PromptError with a list of all names."""
    if name not in TEMPLATES:
        raise PromptError(f"unknown template {name!r}; choose one of {_names()}")
    return TEMPLATES[name]


def _names() -> str:
    return ", ".join(TEMPLATES)


def _parse(message: Message, where: str) -> tuple[str, str, list[Picture]]:
    """Returns the role, text and images of one message. Raises PromptError if the message is malformed."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise PromptError(f"{where}: found {message!r:.60}; expected a dictionary with role and content")
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise PromptError(f"{where}: role is {role!r}; expected system, user or assistant")
    if isinstance(content, str):
        return role, content, []
    texts: list[str] = []
    pictures: list[Picture] = []
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image") or kind not in part:
            raise PromptError(f'{where}: content contains {part!r:.60}; expected {{"type": "text" | "image", …}}')
        if kind == "text":
            if not isinstance(part["text"], str):
                raise PromptError(f"{where}: text is {part['text']!r:.60}; expected a string")
            texts.append(part["text"])
        else:
            pictures.append(part["image"])
    return role, "\n".join(texts), pictures


def _count_marks(where: str, text: str, n_pictures: int, advice: str = "") -> None:
    if (marks := text.count(IMAGE_PLACEHOLDER)) != n_pictures:
        raise PromptError(
            f"{where} has {marks} {IMAGE_PLACEHOLDER} placeholder(s) and {n_pictures} image(s): "
            f"write one placeholder for each image{advice}"
        )
