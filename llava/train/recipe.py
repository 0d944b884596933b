"""A training recipe: a frozen dataclass with all settings of a run, read from a TOML file with the same keys."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from llava.config import Transparency
from llava.errors import ConfigError
from llava.preprocess.inputs import find_template
from llava.preprocess.labels import ImagePlace

RECIPES = Path(__file__).parent.parent / "recipes"  # shipped recipes, named by relative path without .toml
MODEL = "model"  # subfolder of OUTPUT_DIR for the trained model
RENAMED = {  # old key -> new key
    "rate": "lr",
    "projector_rate": "projector_lr",
    "vision_rate": "vision_lr",
    "batch": "global_batch_size",
    "micro_batch": "micro_batch_size",
    "clip": "max_grad_norm",
    "warmup": "warmup_ratio",
    "master": "param_dtype",
    "compute": "compute_dtype",
    "checkpointing": "gradient_checkpointing",
    "workers": "num_workers",
    "out": "output_dir",
    "keep": "keep_last",
}

Part = Literal["projector", "decoder", "vision", "rows"]  # rows: only the input embeddings of <im_start> and <im_end>


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one run. Paths refer to local folders or files; models can also be given as hub ids."""

    about: str = ""  # the published model that this recipe reproduces, and any original settings that are unknown

    # Starting point
    model: str  # a language model (Llama, MPT), or a LLaVA model to train further
    base: str | None = None  # base language model of `model`, if `model` is a delta, LoRA or projector
    vision_tower: str | None = None  # a CLIP model; None: the tower specified in the LLaVA checkpoint
    projector: str | None = None  # output folder of stage 1; None: use the projector in `model`, or a new projector
    projector_type: str = "mlp2x_gelu"  # type of a new projector: linear or mlpNx_gelu
    select_layer: int = -2  # vision tower layer whose hidden state is passed to the projector
    aspect: Literal["square", "pad", "anyres"] = "pad"
    pinpoints: tuple[tuple[int, int], ...] = ()  # canvas sizes for anyres, (width, height) in pixels
    start_end: bool = False  # wrap each image in <im_start> and <im_end>, adding both to the vocabulary if needed
    template: str = "vicuna_v1"
    image_place: ImagePlace = "front"  # image position: front of the turn or, before LLaVA 1.0, as written in the data

    # Data
    data: tuple[str, ...]  # files in LLaVA's JSON or JSONL format
    images: str | None = None  # folder, .zip or .tar that contains the images
    transparency: Transparency = "drop"  # or white or black: a background for transparent pixels; see `to_rgb`
    max_length: int = 2048  # maximum number of tokens per sample, including image tokens; longer samples are truncated

    # Trained parts
    train: tuple[Part, ...] = ("projector", "decoder")
    lora_rank: int = 0  # above 0: freeze the decoder's weight matrices and train LoRA adapters of this rank
    lora_alpha: float = 16.0  # adapter outputs are scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.05
    quantize_base: Literal["none", "nf4"] = "none"  # quantization of the frozen matrices that have adapters

    # Schedule
    epochs: float = 1.0
    max_steps: int = 0  # above 0: overrides epochs; the learning rate schedule ends at this step
    global_batch_size: int = 128  # samples per optimizer step, across all ranks
    micro_batch_size: int = 16  # samples per forward pass on one rank
    lr: float = 2e-5  # peak learning rate
    projector_lr: float = 0.0  # 0: same as lr
    vision_lr: float = 0.0  # 0: same as lr
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.03  # fraction of all steps
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    seed: int = 42
    order: Literal["shuffled", "by_modality_length"] = "shuffled"

    # Runtime
    packing: bool = True  # pack each micro-batch into one row without cross-sample attention; False: pad each sample
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # for trained weights; frozen weights use compute_dtype
    gradient_checkpointing: bool = True  # recompute each block's activations in the backward pass
    compile: bool = False
    pad_to: int = 128  # pad packed rows to a multiple of this to limit the number of compiled shapes
    num_workers: int | None = None  # data loading processes per rank; None: 4, or fewer on a machine with fewer CPUs
    max_skipped: float = 0.01  # stop the run if more than this fraction of samples is broken

    # Output
    output_dir: str = "runs/llava"
    # format of OUTPUT_DIR/model; auto: a LoRA or a projector if only these are trained, else llava
    export: Literal["auto", "llava", "llava-hf", "native"] = "auto"
    save_every: int = 500  # in steps; 0: save only at the end
    keep_last: int = 2  # number of most recent checkpoints to keep
    logs: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    def __post_init__(self) -> None:
        for name, valid, expected in (*self._finite_checks(), *self._range_checks()):
            if not valid:
                raise ConfigError(f"recipe: {name} is {getattr(self, name)!r}; expected {expected}")
        find_template(self.template)
        if self.lora_rank and "decoder" not in self.train:
            raise ConfigError(
                'recipe: lora_rank is set, but train does not include "decoder"; add "decoder", or set lora_rank=0'
            )
        if self.quantize_base != "none" and not self.lora_rank:
            raise ConfigError(
                "recipe: quantize_base requires lora_rank > 0, because 4-bit weights cannot be trained; set lora_rank, "
                'or set quantize_base="none"'
            )
        if "rows" in self.train and not self.start_end:
            raise ConfigError('recipe: train includes "rows", which requires start_end; set start_end=true')
        if self.aspect == "anyres" and not self.pinpoints:
            raise ConfigError(
                "recipe: aspect anyres requires pinpoints; set pinpoints to a list of [width, height] canvas sizes"
            )

    def _finite_checks(self) -> Iterable[tuple[str, bool, str]]:
        for field in fields(self):
            value = getattr(self, field.name)
            numbers = [n for n in (value if field.name == "betas" else [value]) if type(n) is float]
            yield field.name, all(map(math.isfinite, numbers)), "finite numbers"

    def _range_checks(self) -> Iterable[tuple[str, bool, str]]:
        """Returns a tuple (field name, whether its value is valid, description of valid values) for each check."""
        size = self.global_batch_size
        return (
            ("data", bool(self.data), "at least one file"),
            ("train", bool(self.train), "at least one part"),
            ("max_length", self.max_length > 1, "2 or more"),
            ("lora_rank", self.lora_rank >= 0, "0 or more"),
            ("lora_alpha", self.lora_alpha > 0, "a value above 0"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "0 or more and below 1"),
            ("epochs", self.epochs > 0, "a value above 0"),
            ("max_steps", self.max_steps >= 0, "0 or more"),
            ("micro_batch_size", self.micro_batch_size >= 1, "1 or more"),
            ("global_batch_size", size >= 1 and size % self.micro_batch_size == 0, "a multiple of micro_batch_size"),
            ("lr", self.lr > 0, "a value above 0"),
            ("projector_lr", self.projector_lr >= 0, "0 or more"),
            ("vision_lr", self.vision_lr >= 0, "0 or more"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "0 or more and below 1"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "two values of 0 or more and below 1"),
            ("eps", self.eps >= 0, "0 or more"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("max_grad_norm", self.max_grad_norm >= 0, "0 or more"),
            ("seed", 0 <= self.seed < 2**32, "0 or more and below 2^32"),
            ("pad_to", self.pad_to >= 1, "1 or more"),
            ("num_workers", self.num_workers is None or self.num_workers >= 0, "0 or more"),
            ("max_skipped", 0 <= self.max_skipped <= 1, "a value from 0 to 1"),
            ("save_every", self.save_every >= 0, "0 or more"),
            ("output_dir", bool(self.output_dir.strip()), "a folder"),
            ("keep_last", self.keep_last >= 1, "1 or more"),
        )


def find_recipe(name: str) -> Path:
    """Returns the path of a recipe file.

    name: path to a .toml file, or name of a shipped recipe such as llava-v1.5/finetune-lora.
    Raises ConfigError if the recipe does not exist.
    """
    file = Path(name)
    if file.suffix == ".toml":
        if file.is_file():
            return file
        raise ConfigError(f"{file}: no such recipe file")
    shipped = recipe_names()
    if name in shipped:
        return RECIPES / f"{name}.toml"
    near = get_close_matches(name, shipped, n=1)
    hint = f"the closest name is {near[0]}" if near else f"expected one of {', '.join(shipped)}"
    raise ConfigError(
        f"no shipped recipe is named {name!r}; {hint}. For your own recipe, pass the path to a .toml file"
    )


def recipe_names() -> list[str]:
    """Returns the names of the shipped recipes."""
    return sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.glob("*/*.toml"))


def read_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `key=value` changes. Values that are not TOML become strings. Raises ConfigError."""
    file = find_recipe(name)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); expected a TOML file in UTF-8") from None
    values = _parse_toml(text, str(file))
    for change in changes:
        key, equals, value = (word.strip() for word in change.partition("="))
        if not equals:
            raise ConfigError(f"--set {change}: expected key=value")
        check_renamed([key], f"--set {change}")
        values[key] = _parse_value(value)
    return recipe_from(values, str(file))


def recipe_from(values: Mapping[str, Any], where: str) -> Recipe:
    """Builds a recipe from a mapping of values. `where` identifies their source in error messages.

    Raises ConfigError for an unknown, renamed or missing key, or a value of the wrong type. For an unknown key, the
    message suggests the closest known key.
    """
    types = get_type_hints(Recipe)
    check_renamed(values, where)
    for key in values:
        if key not in types:
            near = get_close_matches(key, types, n=1)
            hint = f"the closest key is {near[0]!r}" if near else f"expected one of {', '.join(types)}"
            raise ConfigError(f"{where}: unknown recipe key {key!r}; {hint}")
    for field in fields(Recipe):
        if field.default is MISSING and field.name not in values:
            raise ConfigError(f"{where}: {field.name} is missing; set it in the file or with --set {field.name}=…")
    return Recipe(**{key: _convert(value, types[key], f"{where}: {key}") for key, value in values.items()})


def check_renamed(keys: Iterable[str], where: str) -> None:
    """Raises ConfigError with the new name if a key has been renamed."""
    if old := [key for key in keys if key in RENAMED]:
        raise ConfigError(f"{where}: `{old[0]}` is now called `{RENAMED[old[0]]}`")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns all settings as a dict."""
    return {field.name: getattr(recipe, field.name) for field in fields(Recipe)}


def to_json(recipe: Recipe) -> str:
    """Returns all settings as a JSON object, the format that `changed_keys` reads."""
    return json.dumps(to_dict(recipe), indent=1)


def changed_keys(file: Path, recipe: Recipe) -> set[str]:
    """Returns the keys whose values differ between `recipe` and the recipe saved in `file`. Raises ConfigError."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); remove the run folder to start over") from None
    try:
        check_renamed(saved, str(file))
    except ConfigError as error:
        raise ConfigError(f"{error}, so this older run cannot be resumed; set output_dir=… to a new folder") from None
    current = json.loads(to_json(recipe))
    saved = json.loads(json.dumps(_DEFAULTS)) | saved  # a run of an earlier version has no value for newer keys
    return {key for key in {*saved, *current} if saved.get(key) != current.get(key)}


_DEFAULTS = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}


def _parse_toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML ({error})") from None


def _parse_value(text: str) -> Any:
    try:
        return _parse_toml(f"value = {text}", "")["value"]
    except ConfigError:
        return text


def _convert(value: Any, expected: Any, where: str) -> Any:
    """Checks a value against a field's type. Converts lists to tuples, and ints to floats for float fields."""
    if get_origin(expected) is Literal:
        if value not in get_args(expected):
            raise ConfigError(f"{where} is {value!r}; expected one of {', '.join(map(repr, get_args(expected)))}")
        return value
    if get_origin(expected) is tuple:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise ConfigError(f"{where} is {value!r}; expected a list")
        inner = get_args(expected)
        inner = inner[:1] * len(values) if inner[-1] is Ellipsis else inner
        if len(inner) != len(values):
            raise ConfigError(f"{where} is {value!r}; expected {len(inner)} values")
        return tuple(_convert(item, one, where) for item, one in zip(values, inner, strict=True))
    if expected is float and type(value) is int:
        return float(value)
    options = get_args(expected) or (expected,)
    if type(value) not in options:
        names = " or ".join(option.__name__ for option in options if option is not type(None))
        raise ConfigError(f"{where} is {value!r}; expected {names}")
    return value
