"""Frozen dataclasses for the sizes and options of a LLaVA model. No value depends on a checkpoint's name or path."""

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from llava.errors import ConfigError

IMAGE = -200  # token id that stands for an image, or for each of its image tokens; not in the vocabulary
IGNORE = -100  # label of a token that is not a training target
IMAGE_PLACEHOLDER = "<image>"  # marks the position of an image in text
# names of image files end in one of these, in upper or lower case
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".jp2")

DType = Literal["float32", "bfloat16", "float16"]
ImageMode = Literal["original", "hf"]  # whose image processing to follow: LLaVA's original code or transformers
Transparency = Literal["drop", "white", "black"]  # ignore an image's transparency, or place it on a background


# Upper limits, so that broken configs are rejected before a model is built and products of sizes do not overflow.
_MAX_INT, _MAX_FLOAT, _MAX_LAYERS = 2**28, 1e30, 1000
_MAX_TILES = 256  # per canvas


def _check(config: Any, what: str, *, signed: tuple[str, ...] = ()) -> None:
    """Checks each field against its type. Numbers must be within the limits, and above 0 unless named in `signed`."""
    for spec in fields(config):
        value, found = getattr(config, spec.name), f"{what}: {spec.name} is {getattr(config, spec.name)!r:.60}"
        if spec.type is bool and not isinstance(value, bool):
            raise ConfigError(f"{found}; expected true or false")
        if get_origin(spec.type) is Literal and not (isinstance(value, str) and value in get_args(spec.type)):
            raise ConfigError(f"{found}; expected {' or '.join(get_args(spec.type))}")
        if spec.type in (int, float) or (spec.type in (int | None, float | None) and value is not None):
            _check_number(value, spec.type in (int, int | None), found, signed=spec.name in signed)


def _check_number(value: Any, whole: bool, found: str, *, signed: bool) -> None:
    types = int if whole else (int, float)
    largest = _MAX_INT if whole else _MAX_FLOAT
    limits = f"from -{largest} to {largest}" if signed else f"above 0, at most {largest}"
    is_number = isinstance(value, types) and not isinstance(value, bool)
    if not is_number or not (signed or value > 0) or not abs(value) <= largest:  # negated so that NaN also fails
        raise ConfigError(f"{found}; expected a {'whole ' * whole}number {limits}")


def _check_layers(n_layers: int, what: str) -> None:
    if n_layers > _MAX_LAYERS:
        raise ConfigError(f"{what}: {n_layers} layers; expected at most {_MAX_LAYERS}")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the CLIP image encoder (arXiv:2103.00020), and which of its hidden states LLaVA uses."""

    dim: int
    n_layers: int
    n_heads: int
    mlp_dim: int
    image_size: int  # pixels per side
    patch_size: int  # pixels per side
    eps: float = 1e-5
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    select_layer: int = -2  # index into transformers' hidden_states (0: input of block 0; -1: output of the last block)
    select_feature: Literal["patch", "cls_patch"] = "patch"  # patch: patch features; cls_patch: also the class token

    def __post_init__(self) -> None:
        _check(self, "vision", signed=("select_layer",))
        _check_layers(self.n_layers, "vision")
        if self.grid**2 > _MAX_INT:
            raise ConfigError(
                f"vision: image_size {self.image_size} results in {self.grid} patches per side; expected at most 16384"
            )
        if self.dim % self.n_heads:
            raise ConfigError(f"vision: dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if not 0 <= self.n_blocks <= self.n_layers:
            raise ConfigError(f"vision: select_layer {self.select_layer} is out of range for {self.n_layers} layers")

    @property
    def n_blocks(self) -> int:
        """Number of blocks to load and run; blocks after the selected layer are not needed."""
        return self.select_layer if self.select_layer >= 0 else self.n_layers + 1 + self.select_layer

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def n_features(self) -> int:
        """Number of feature vectors that LLaVA uses per view."""
        return self.grid**2 + (self.select_feature == "cls_patch")


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The projector: `depth` linear layers with exact GELU between them. Depth 0 is the identity."""

    in_dim: int
    out_dim: int
    depth: int

    def __post_init__(self) -> None:
        _check(self, "projector", signed=("depth",))
        if not 0 <= self.depth <= _MAX_LAYERS:
            raise ConfigError(f"projector: depth is {self.depth}; expected 0 to {_MAX_LAYERS}")
        if self.depth == 0 and self.in_dim != self.out_dim:
            raise ConfigError(
                f"projector: depth 0 is the identity, which cannot map width {self.in_dim} to {self.out_dim}"
            )

    @property
    def type(self) -> str:
        """The value of `mm_projector_type` in config.json: identity, linear or mlpNx_gelu."""
        return projector_type(self.depth)


def projector_type(depth: int) -> str:
    """Returns the `mm_projector_type` of a projector with `depth` linear layers."""
    return {0: "identity", 1: "linear"}.get(depth, f"mlp{depth}x_gelu")


def projector_depth(type: str) -> int:
    """Returns the number of linear layers for an `mm_projector_type`. Raises ConfigError for an unknown type."""
    if match := re.fullmatch(r"mlp(\d+)x_gelu", type):
        return int(match[1])
    if type not in ("identity", "linear"):
        raise ConfigError(f"config.json: mm_projector_type is {type!r}; expected linear, mlpNx_gelu or identity")
    return int(type == "linear")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary positions are scaled to extend the context length. `kind` is named as in Hugging Face configs."""

    kind: Literal["linear", "dynamic", "llama3"]
    factor: float
    original_max_seq: int  # context length in tokens before scaling
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only

    def __post_init__(self) -> None:
        _check(self, "rope scaling")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of the language model. For Llama 2, see arXiv:2307.09288; for MPT, see the model's config.json."""

    kind: Literal["llama", "mpt"]
    n_layers: int
    dim: int  # width of the residual stream
    n_heads: int
    n_kv_heads: int  # fewer than n_heads: grouped-query attention
    head_dim: int
    mlp_dim: int
    vocab_size: int  # rows of the embedding table, which may differ from the tokenizer's length
    max_seq: int  # context length in tokens, including image tokens
    eps: float
    rope_theta: float | None = 10000.0  # required for llama; None for mpt, which uses ALiBi
    rope_scaling: RopeScaling | None = None  # llama only
    alibi_bias_max: float | None = None  # required for mpt: the smallest ALiBi slope is 2^-alibi_bias_max
    clip_qkv: float | None = None  # mpt only: clamp q, k and v to [-clip_qkv, clip_qkv]; None: no clamping
    tied: bool = False  # the head and the embedding table share one weight
    sliding_window: int | None = None  # llama only (Mistral): number of tokens that a query attends to, itself included

    def __post_init__(self) -> None:
        _check(self, "decoder")
        _check_layers(self.n_layers, "decoder")
        if self.n_heads * self.head_dim > _MAX_INT:
            raise ConfigError(f"decoder: n_heads {self.n_heads} x head_dim {self.head_dim} exceeds {_MAX_INT}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"decoder: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        for kind, names in _POSITIONS.items():
            if (getattr(self, names[0]) is not None) != (kind == self.kind):
                raise ConfigError(
                    f"decoder: {self.kind} {'does not use' if kind != self.kind else 'requires'} {names[0]}"
                )
            for name in names[1:]:
                if kind != self.kind and getattr(self, name) is not None:
                    raise ConfigError(f"decoder: {self.kind} does not use {name}")
        if self.kind == "llama" and self.head_dim % 2:
            raise ConfigError(f"decoder: head_dim is {self.head_dim}; rotary positions require an even number")
        if self.kind == "mpt" and self.n_kv_heads != self.n_heads:
            raise ConfigError(
                f"decoder: n_kv_heads is {self.n_kv_heads}; mpt requires it to equal n_heads ({self.n_heads})"
            )

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Number of rows of q, k and v in the concatenated matrix `attn.qkv`."""
        kv = self.n_kv_heads * self.head_dim
        return self.n_heads * self.head_dim, kv, kv


# kind -> required field, optional fields
_POSITIONS = {"llama": ("rope_theta", "rope_scaling", "sliding_window"), "mpt": ("alibi_bias_max", "clip_qkv")}


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Settings for turning an image into views of `size` x `size` pixels."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    aspect: Literal["square", "pad", "anyres"]  # square: centre crop; pad: pad to a square; anyres: base view and tiles
    mode: ImageMode = "original"
    pinpoints: tuple[tuple[int, int], ...] = ()  # anyres: available canvas sizes, (w, h) in pixels
    merge: Literal["flat", "spatial", "spatial_unpad"] = "flat"  # anyres: how the tiles are joined

    def __post_init__(self) -> None:
        _check(self, "image")
        if len(self.mean) != 3 or not all(0 <= value <= 1 for value in self.mean):
            raise ConfigError(f"image: mean is {self.mean!r:.60}; expected three numbers from 0 to 1")
        if len(self.std) != 3 or not all(0 < value <= _MAX_FLOAT for value in self.std):
            raise ConfigError(f"image: std is {self.std!r:.60}; expected three numbers above 0")
        if self.aspect == "anyres" and not self.pinpoints:
            raise ConfigError("image: image_grid_pinpoints is empty; anyres requires at least one canvas size")
        for w, h in self.pinpoints if self.aspect == "anyres" else ():
            whole = w > 0 and h > 0 and w % self.size == 0 == h % self.size
            if not whole or w * h > _MAX_TILES * self.size**2:
                expected = f"a canvas of 1 to {_MAX_TILES} whole tiles with sides of {self.size} pixels"
                raise ConfigError(f"image: image_grid_pinpoints contains {w!r} x {h!r}; expected {expected}")


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """The tile grid of an anyres image and the range of patch rows and columns that remain after padding is removed."""

    rows: int  # tiles from top to bottom
    cols: int  # tiles from left to right
    top: int  # first patch row to keep
    bottom: int  # end of the patch rows to keep (exclusive)
    left: int
    right: int
    newline: bool  # append a learned vector to each row of patches

    @property
    def n_tokens(self) -> int:
        """Number of tokens for the tiles, excluding the base view."""
        return (self.bottom - self.top) * (self.right - self.left + self.newline)


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """All settings needed to build the model and prepare its inputs."""

    decoder: DecoderConfig
    vision: VisionConfig | None = None  # None: language model only
    projector: ProjectorConfig | None = None
    image: ImageConfig | None = None
    start_end: bool = False  # enclose each image in <im_start> and <im_end>
    template: str | None = None  # conversation template; None: the caller must choose one
    eos_ids: tuple[int, ...] = field(default=())  # token ids that end a reply, in addition to the tokenizer's eos id
    dtype: DType = "float16"  # dtype of the stored weights
    padding_side: Literal["left", "right"] = "right"  # padding side of training batches; recorded, but not used
    trained_seq: int | None = None  # maximum training length in tokens; only the original code truncates prompts to it

    def __post_init__(self) -> None:
        _check(self, "config")
        if not all(isinstance(id, int) for id in self.eos_ids) or not isinstance(self.template, str | None):
            raise ConfigError(
                f"config: eos_ids is {self.eos_ids!r:.60}, template is {self.template!r:.60}; "
                "expected whole numbers and a template name"
            )
        if (self.vision is None) != (self.projector is None) or (self.vision is None) != (self.image is None):
            raise ConfigError("config: only some of vision, projector and image are set; expected all three or none")
        if self.image and self.vision and self.image.size != self.vision.image_size:
            raise ConfigError(
                f"image: size is {self.image.size} pixels; expected the size of the vision tower, "
                f"{self.vision.image_size} pixels"
            )
        if self.image and self.vision and self.image.aspect == "anyres" and self.vision.select_feature != "patch":
            raise ConfigError("image: mm_vision_select_feature is cls_patch; anyres requires patch")
        if self.projector and self.vision and self.projector.in_dim != self.vision.dim:
            raise ConfigError(
                f"projector: expects features of width {self.projector.in_dim}, but the vision tower has width "
                f"{self.vision.dim}; set vision_tower= (--vision-tower) to the tower used to train the projector"
            )
        if self.projector and self.projector.out_dim != self.decoder.dim:
            raise ConfigError(
                f"projector: output width is {self.projector.out_dim}; expected the decoder width, {self.decoder.dim}"
            )

    @property
    def newline(self) -> bool:
        """Whether a learned vector is appended to each row of patches of an anyres image."""
        return self.image is not None and self.image.aspect == "anyres" and self.image.merge == "spatial_unpad"

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as a dict that can be stored as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LlavaConfig":
        """Creates a config from the output of `to_dict`. Raises ConfigError on unknown or missing keys."""
        if not isinstance(values.get("decoder"), dict):
            raise ConfigError(f"config: decoder is {values.get('decoder')!r:.60}; expected an object with its sizes")
        decoder = dict(values["decoder"])
        decoder["rope_scaling"] = _optional(RopeScaling, "rope_scaling", decoder.get("rope_scaling") or None)
        image = values.get("image")
        if image:  # JSON stores tuples as lists
            image = {key: tuple(value) if isinstance(value, list) else value for key, value in image.items()}
            image["pinpoints"] = tuple((w, h) for w, h in image.get("pinpoints", ()))
        nested = {
            "decoder": _build(DecoderConfig, "decoder", decoder),
            "vision": _optional(VisionConfig, "vision", values.get("vision")),
            "projector": _optional(ProjectorConfig, "projector", values.get("projector")),
            "image": _optional(ImageConfig, "image", image),
            "eos_ids": tuple(values.get("eos_ids", ())),
        }
        return _build(cls, "config", values | nested)


def _build(cls: Any, what: str, values: dict[str, Any]) -> Any:
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{what}: unknown keys {', '.join(unknown)}; expected keys: {', '.join(sorted(known))}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{what}: {str(error).split('__init__() ')[-1]}") from None


def _optional(cls: Any, what: str, values: dict[str, Any] | None) -> Any:
    return None if values is None else _build(cls, what, values)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options for opening a checkpoint. Those that `llava.load` also accepts are documented there."""

    base: str | Path | None = None  # base language model of a LoRA, projector or delta
    vision_tower: str | Path | None = None  # overrides the vision tower specified in config.json
    vision: bool = True  # False: open only the language model
    revision: str | None = None  # branch, tag or commit of the checkpoint on the hub
    image_mode: ImageMode | None = None  # None: the image mode of the checkpoint
    legacy_strip: bool = False  # strip white space around added tokens, as in the training of LLaVA v0 and v1.1
    force: bool = False  # only warn about NaN, Inf or a mismatched base
    ignore_tensors: tuple[str, ...] = ()  # on-disk names, or patterns with *, of tensors to leave out
    fetch_tower: bool = True  # False: do not download published towers; use their known sizes


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How image files are read."""

    exif: bool = False  # apply the EXIF orientation; the original LLaVA code ignores it
    transparency: Transparency = "drop"  # drop: ignore transparency, as in the original code

    def __post_init__(self) -> None:
        _check(self, "images")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the engine runs requests. The replies do not depend on them, apart from rounding."""

    max_batch: int = 64  # requests that run at the same time; others wait
    # memory for keys and values: bytes, a size such as "8GiB", or a fraction of the free memory such as 0.9;
    # None: as much as `max_batch` requests of full length need, but at most half of the free memory
    cache_memory: int | float | str | None = None
    page_size: int = 16  # tokens per page of the cache
    chunk_tokens: int | None = None  # tokens computed in a step; None: 512 on a CPU, 8192 on a GPU
    prefix_cache: bool = True  # reuse the keys and values of earlier requests that start in the same way
    batch_invariant: bool = False  # compute exactly the same logits whatever other requests run; slower
    graphs: bool = True  # capture decoding steps and the vision tower as CUDA graphs; False: run eagerly

    def __post_init__(self) -> None:
        for name in ("max_batch", "page_size", "chunk_tokens"):
            value = getattr(self, name)
            if name == "chunk_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"engine: {name} is {value!r}; expected a whole number of at least 1")
        for name in ("prefix_cache", "batch_invariant", "graphs"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"engine: {name} is {getattr(self, name)!r}; expected True or False")
        self.cache_bytes(0)

    def cache_bytes(self, free: int) -> int | None:
        """Returns the bytes for keys and values if `free` bytes are free, or None if `cache_memory` is not set."""
        value = self.cache_memory
        if value is None:
            return None
        if isinstance(value, str):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", value.strip())
            if match and match[2]:
                base = 1024 if "i" in match[2] else 1000
                return int(float(match[1]) * base ** ("BKMGT".index(match[2][0]) if match[2] != "B" else 0))
            value = (float(match[1]) if "." in match[1] else int(match[1])) if match else value
        if isinstance(value, float) and 0 < value <= 1:
            return int(value * free)
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            return value
        raise ConfigError(
            f"engine: cache_memory is {self.cache_memory!r}; expected a number of bytes, a size such as 8GiB, or a "
            "fraction of the free memory such as 0.9"
        )
