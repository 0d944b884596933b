"""Sizes and options of a LLaVA, stated in full: nothing here has a meaning that depends on a name or a path."""

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from llava.errors import ConfigError

IMAGE = -200  # stands for a picture (or one place of a picture) among token ids; no vocabulary row has this number
IGNORE = -100  # label of a token that is not learnt
IMAGE_MARK = "<image>"  # a picture's place in text

DType = Literal["float32", "bfloat16", "float16"]
ImageMode = Literal["original", "hf"]  # whose image arithmetic is matched: the LLaVA code's or transformers'


# Beyond these a config is broken. They keep products of sizes countable, and a model of such sizes from being built.
_LARGEST_INT, _LARGEST_FLOAT, _MOST_LAYERS = 2**28, 1e30, 1000
_MOST_TILES = 256  # of one canvas


def _check(config: Any, what: str, *, signed: tuple[str, ...] = ()) -> None:
    """Fields hold what their types say; numbers are finite, of a sane size, and above 0 unless they are `signed`."""
    for spec in fields(config):
        value, words = getattr(config, spec.name), f"{what}: {spec.name} is {getattr(config, spec.name)!r:.60}"
        if spec.type is bool and not isinstance(value, bool):
            raise ConfigError(f"{words}; expected true or false")
        if get_origin(spec.type) is Literal and not (isinstance(value, str) and value in get_args(spec.type)):
            raise ConfigError(f"{words}; expected {' or '.join(get_args(spec.type))}")
        if spec.type in (int, float) or (spec.type in (int | None, float | None) and value is not None):
            _check_number(value, spec.type in (int, int | None), words, signed=spec.name in signed)


def _check_number(value: Any, whole: bool, words: str, *, signed: bool) -> None:
    kinds = int if whole else (int, float)
    largest = _LARGEST_INT if whole else _LARGEST_FLOAT
    if not isinstance(value, kinds) or isinstance(value, bool) or not (signed or value > 0):
        raise ConfigError(f"{words}; expected a {'whole ' * whole}number above 0")
    if not abs(value) <= largest:  # NaN is not, either
        raise ConfigError(f"{words}; expected at most {largest}")


def _check_layers(n_layers: int, what: str) -> None:
    if n_layers > _MOST_LAYERS:
        raise ConfigError(f"{what}: {n_layers} layers; expected at most {_MOST_LAYERS}")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the CLIP image encoder (arXiv:2103.00020) and which of its states LLaVA reads."""

    dim: int
    n_layers: int
    n_heads: int
    mlp_dim: int
    image_size: int  # pixels a side
    patch_size: int  # pixels a side
    eps: float = 1e-5
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    select_layer: int = -2  # counts as transformers' hidden_states: 0 before the first block, -1 after the last
    select_feature: Literal["patch", "cls_patch"] = "patch"  # without or with the class token

    def __post_init__(self) -> None:
        _check(self, "vision", signed=("select_layer",))
        _check_layers(self.n_layers, "vision")
        if self.grid**2 > _LARGEST_INT:
            raise ConfigError(
                f"vision: image_size {self.image_size} holds {self.grid} patches of {self.patch_size} a side"
            )
        if self.dim % self.n_heads:
            raise ConfigError(f"vision: dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if not 0 <= self.n_blocks <= self.n_layers:
            raise ConfigError(f"vision: select_layer {self.select_layer} is outside a tower of {self.n_layers} layers")

    @property
    def n_blocks(self) -> int:
        """Blocks that have to run: those behind the selected layer are neither computed nor loaded."""
        return self.select_layer if self.select_layer >= 0 else self.n_layers + 1 + self.select_layer

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def n_features(self) -> int:
        """Feature vectors that LLaVA reads from one view."""
        return self.grid**2 + (self.select_feature == "cls_patch")


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """From vision features to the decoder's width: `depth` linear layers with exact GELU between; 0 is identity."""

    in_dim: int
    out_dim: int
    depth: int

    def __post_init__(self) -> None:
        _check(self, "projector", signed=("depth",))
        if not 0 <= self.depth <= _MOST_LAYERS:
            raise ConfigError(f"projector: depth is {self.depth}; expected 0 to {_MOST_LAYERS}")
        if self.depth == 0 and self.in_dim != self.out_dim:
            raise ConfigError(f"projector: identity cannot turn width {self.in_dim} into {self.out_dim}")

    @property
    def type(self) -> str:
        """As `mm_projector_type` spells it: identity, linear or mlpNx_gelu."""
        return projector_type(self.depth)


def projector_type(depth: int) -> str:
    """The `mm_projector_type` of a projector with `depth` linear layers."""
    return {0: "identity", 1: "linear"}.get(depth, f"mlp{depth}x_gelu")


def projector_depth(type: str) -> int:
    """The inverse of `projector_type`. Raises ConfigError."""
    if match := re.fullmatch(r"mlp(\d+)x_gelu", type):
        return int(match[1])
    if type not in ("identity", "linear"):
        raise ConfigError(f"config.json: mm_projector_type is {type!r}; expected linear, mlpNx_gelu or identity")
    return int(type == "linear")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary positions are stretched beyond the trained context. Names as in Hugging Face configs."""

    kind: Literal["linear", "dynamic", "llama3"]
    factor: float
    original_max_seq: int  # tokens, before stretching
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only

    def __post_init__(self) -> None:
        _check(self, "rope scaling")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of the language model. Llama 2: arXiv:2307.09288; MPT: the model's own config.json."""

    kind: Literal["llama", "mpt"]
    n_layers: int
    dim: int  # width of the residual stream
    n_heads: int
    n_kv_heads: int  # fewer than n_heads: grouped-query attention
    head_dim: int
    mlp_dim: int
    vocab_size: int  # rows stored, which may differ from the tokenizer's length
    max_seq: int  # longest context, in tokens, image tokens included
    eps: float
    rope_theta: float | None = 10000.0  # llama; None: no rotary positions
    rope_scaling: RopeScaling | None = None  # llama
    alibi_bias_max: float | None = None  # mpt: the last of a power of two of heads has the slope 2^-this
    clip_qkv: float | None = None  # mpt: queries, keys and values are cut to ± this; None: they are not
    tied: bool = False  # the head is the embedding table

    def __post_init__(self) -> None:
        _check(self, "decoder")
        _check_layers(self.n_layers, "decoder")
        if self.n_heads * self.head_dim > _LARGEST_INT:
            raise ConfigError(f"decoder: {self.n_heads} heads of {self.head_dim} values are more than a model can have")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"decoder: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        for kind, names in _POSITIONS.items():
            if (getattr(self, names[0]) is not None) != (kind == self.kind):
                raise ConfigError(f"decoder: {self.kind} {'has no' if kind != self.kind else 'needs'} {names[0]}")
            if kind != self.kind and getattr(self, names[1]) is not None:
                raise ConfigError(f"decoder: {self.kind} has no {names[1]}")
        if self.kind == "llama" and self.head_dim % 2:
            raise ConfigError(f"decoder: head_dim {self.head_dim} is odd, rotary positions need pairs")
        if self.kind == "mpt" and self.n_kv_heads != self.n_heads:
            raise ConfigError(f"decoder: n_kv_heads is {self.n_kv_heads}; mpt has as many as n_heads, {self.n_heads}")

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the concatenated matrix `attn.qkv`."""
        kv = self.n_kv_heads * self.head_dim
        return self.n_heads * self.head_dim, kv, kv


_POSITIONS = {"llama": ("rope_theta", "rope_scaling"), "mpt": ("alibi_bias_max", "clip_qkv")}  # the first is a must


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How a picture becomes views of `size` x `size` pixels."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    aspect: Literal["square", "pad", "anyres"]  # centre crop, pad to a square, or base view and tiles
    mode: ImageMode = "original"
    pinpoints: tuple[tuple[int, int], ...] = ()  # anyres: canvas sizes to choose from, (w, h)
    merge: Literal["flat", "spatial", "spatial_unpad"] = "flat"  # anyres: how tiles are put together

    def __post_init__(self) -> None:
        _check(self, "image")
        if len(self.mean) != 3 or not all(0 <= value <= 1 for value in self.mean):
            raise ConfigError(f"image: mean is {self.mean!r:.60}; expected three numbers from 0 to 1")
        if len(self.std) != 3 or not all(0 < value <= _LARGEST_FLOAT for value in self.std):
            raise ConfigError(f"image: std is {self.std!r:.60}; expected three numbers above 0")
        if self.aspect == "anyres" and not self.pinpoints:
            raise ConfigError("image: anyres needs image_grid_pinpoints, the list of canvas sizes")
        for w, h in self.pinpoints if self.aspect == "anyres" else ():
            whole = w > 0 and h > 0 and w % self.size == 0 == h % self.size
            if not whole or w * h > _MOST_TILES * self.size**2:
                wanted = f"1 to {_MOST_TILES} tiles of {self.size} pixels"
                raise ConfigError(f"image: image_grid_pinpoints has {w!r} x {h!r}; expected {wanted}")


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """Which rows and columns of the patches of an anyres picture's tiles are kept; the rest is padding."""

    rows: int  # tiles from top to bottom
    cols: int  # tiles from left to right
    top: int  # first patch row kept
    bottom: int  # first patch row no longer kept
    left: int
    right: int
    newline: bool  # a learned vector closes each row of patches

    @property
    def n_tokens(self) -> int:
        """Places that the tiles take, the base view not counted."""
        return (self.bottom - self.top) * (self.right - self.left + self.newline)


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """All that is needed to build the model and to prepare its input."""

    decoder: DecoderConfig
    vision: VisionConfig | None = None  # None: a plain language model
    projector: ProjectorConfig | None = None
    image: ImageConfig | None = None
    start_end: bool = False  # each picture stands between <im_start> and <im_end>
    template: str | None = None  # conversation template, None: messages need one named by the caller
    eos_ids: tuple[int, ...] = field(default=())  # ids that end an answer, besides the tokenizer's own
    dtype: DType = "float16"  # of the weights as stored
    padding_side: Literal["left", "right"] = "right"  # of training batches; a fact that no answer depends on
    trained_seq: int | None = None  # longest input in training, tokens; the original cuts longer ones off, we do not

    def __post_init__(self) -> None:
        _check(self, "config")
        if not all(isinstance(id, int) for id in self.eos_ids) or not isinstance(self.template, str | None):
            raise ConfigError(
                f"config: eos_ids is {self.eos_ids!r:.60}, template {self.template!r:.60}; expected ids, a name"
            )
        if (self.vision is None) != (self.projector is None) or (self.vision is None) != (self.image is None):
            raise ConfigError("config: vision, projector and image options come together or not at all")
        if self.image and self.vision and self.image.size != self.vision.image_size:
            raise ConfigError(
                f"image: pictures are cropped to {self.image.size} pixels, the tower takes {self.vision.image_size}"
            )
        if self.image and self.vision and self.image.aspect == "anyres" and self.vision.select_feature != "patch":
            raise ConfigError("image: anyres puts tiles together by patches; mm_vision_select_feature must be patch")
        if self.projector and self.vision and self.projector.in_dim != self.vision.dim:
            raise ConfigError(
                f"projector: takes features of width {self.projector.in_dim}, this vision tower gives "
                f"{self.vision.dim}; name the tower it was trained with: vision_tower= (--vision-tower)"
            )
        if self.projector and self.projector.out_dim != self.decoder.dim:
            raise ConfigError(f"projector: width {self.projector.out_dim} does not fit decoder dim {self.decoder.dim}")

    @property
    def newline(self) -> bool:
        """Whether a learned vector closes each row of an anyres picture."""
        return self.image is not None and self.image.aspect == "anyres" and self.image.merge == "spatial_unpad"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LlavaConfig":
        """The inverse of `to_dict`. Raises ConfigError on unknown or missing keys."""
        values = dict(values)
        decoder = dict(values.pop("decoder"))
        scaling = decoder.pop("rope_scaling", None)
        image = values.pop("image", None)
        if image:
            image = {k: tuple(v) if isinstance(v, list) else v for k, v in image.items()}
            image["pinpoints"] = tuple((w, h) for w, h in image.get("pinpoints", ()))
        return _build(
            cls,
            "config",
            values
            | {
                "decoder": _build(
                    DecoderConfig,
                    "decoder",
                    decoder | {"rope_scaling": scaling and _build(RopeScaling, "rope_scaling", scaling)},
                ),
                "vision": _optional(VisionConfig, "vision", values.get("vision")),
                "projector": _optional(ProjectorConfig, "projector", values.get("projector")),
                "image": _optional(ImageConfig, "image", image),
                "eos_ids": tuple(values.get("eos_ids", ())),
            },
        )


def _build(cls: Any, what: str, values: dict[str, Any]) -> Any:
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{what}: unknown keys {', '.join(unknown)}; this version knows {', '.join(sorted(known))}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{what}: {str(error).split('__init__() ')[-1]}") from None


def _optional(cls: Any, what: str, values: dict[str, Any] | None) -> Any:
    return None if values is None else _build(cls, what, values)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a checkpoint is opened. `llava.load` documents the options that it passes on."""

    base: str | Path | None = None  # the language model that a LoRA, projector or delta belongs to
    vision_tower: str | Path | None = None  # instead of the one that config.json names
    vision: bool = True  # False: the language model only
    revision: str | None = None  # of the checkpoint on the hub
    image_mode: ImageMode | None = None  # None: the mode that the format was made for
    legacy_strip: bool = False  # added tokens absorb the white space around them, as when v0 and v1.1 were trained
    force: bool = False  # leave out unknown tensors, and warn about NaN, Inf and a doubtful base, instead of refusing
    fetch_tower: bool = True  # False, for inspection: do not ask the hub for a tower whose sizes are published
