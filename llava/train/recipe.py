"""A recipe: all that decides a training run, as one frozen dataclass, read from TOML whose keys are its fields."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from llava.errors import ConfigError
from llava.preprocess.inputs import find_template
from llava.preprocess.labels import ImagePlace

RECIPES = Path(__file__).parent.parent / "recipes"  # those that are shipped; a name is a path below, without .toml

Part = Literal["projector", "decoder", "vision", "rows"]  # rows: input embeddings of <im_start> and <im_end> alone


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. Paths are a folder or file, models also hub ids."""

    about: str = ""  # which published model's stage this is, and what is not known of it

    # What it starts from
    model: str  # a language model (plain Llama, MPT) or a LLaVA to go on from
    base: str | None = None  # the language model under `model`, where that is a delta, LoRA or projector
    vision_tower: str | None = None  # CLIP; None: the one that the LLaVA names
    projector: str | None = None  # folder that stage 1 left; None: the LLaVA's own, or a new one
    projector_type: str = "mlp2x_gelu"  # of a new one: linear, mlpNx_gelu
    select_layer: int = -2  # of the tower, whose state is read
    aspect: Literal["square", "pad", "anyres"] = "pad"
    pinpoints: tuple[tuple[int, int], ...] = ()  # anyres: canvas sizes, (w, h)
    start_end: bool = False  # each picture between <im_start> and <im_end>, which are added to the vocabulary
    template: str = "vicuna_v1"
    image_place: ImagePlace = "front"  # in its turn; "as_written": where the data have it, as before LLaVA 1.0

    # What it learns from
    data: tuple[str, ...]  # LLaVA's JSON or JSONL
    images: str | None = None  # folder, zip or tar
    max_length: int = 2048  # places of a sample, pictures' included; the rest is cut off

    # What changes
    train: tuple[Part, ...] = ("projector", "decoder")
    lora_rank: int = 0  # above 0: the decoder's matrices stay as they are and get adapters of this rank
    lora_alpha: float = 16.0  # adapters count alpha / rank
    lora_dropout: float = 0.05
    quantize_base: Literal["none", "nf4"] = "none"  # of the matrices under the adapters

    # Schedule
    epochs: float = 1.0
    max_steps: int = 0  # above 0: stop there, and shape the schedule to it
    batch: int = 128  # samples a step, over all ranks
    micro_batch: int = 16  # samples a rank has in memory at once
    rate: float = 2e-5
    projector_rate: float = 0.0  # 0: as `rate`
    vision_rate: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.03  # share of all steps
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient; 0: none
    seed: int = 42
    order: Literal["shuffled", "by_modality_length"] = "shuffled"

    # How it runs
    packing: bool = True  # the samples of a micro-batch in one row, none sees another; False: rows padded on the right
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    master: Literal["float32", "bfloat16"] = "float32"  # the weights that learn; the others are kept as `compute`
    checkpointing: bool = True  # activations of a block are computed again instead of kept
    compile: bool = False
    pad_to: int = 128  # packed rows are filled up to a multiple of this, so that few shapes are compiled
    workers: int = 4  # processes that read, decode and resize, for each rank
    max_skipped: float = 0.01  # a larger share of broken samples stops the run

    # What it leaves
    out: str = "runs/llava"
    save_every: int = 500  # steps; 0: only at the end
    keep: int = 2  # newest resumable checkpoints
    logs: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not all(math.isfinite(n) for n in (value if field.name == "betas" else [value]) if type(n) is float):
                raise ConfigError(f"recipe: {field.name} is {value!r}; expected finite numbers")
        for name, good, wanted in (
            ("data", bool(self.data), "one file at least"),
            ("train", bool(self.train), "one part at least"),
            ("max_length", self.max_length > 1, "2 or more"),
            ("lora_rank", self.lora_rank >= 0, "0 or more"),
            ("lora_alpha", self.lora_alpha > 0, "above 0"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "from 0 to below 1"),
            ("epochs", self.epochs > 0, "above 0"),
            ("max_steps", self.max_steps >= 0, "0 or more"),
            ("micro_batch", self.micro_batch >= 1, "1 or more"),
            ("batch", self.batch >= 1 and self.batch % self.micro_batch == 0, "a multiple of micro_batch"),
            ("rate", self.rate > 0, "above 0"),
            ("projector_rate", self.projector_rate >= 0, "0 or more"),
            ("vision_rate", self.vision_rate >= 0, "0 or more"),
            ("warmup", 0 <= self.warmup < 1, "from 0 to below 1"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "two values from 0 to below 1"),
            ("eps", self.eps >= 0, "0 or more"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("clip", self.clip >= 0, "0 or more"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to below 2^32"),
            ("pad_to", self.pad_to >= 1, "1 or more"),
            ("workers", self.workers >= 0, "0 or more"),
            ("max_skipped", 0 <= self.max_skipped <= 1, "from 0 to 1"),
            ("save_every", self.save_every >= 0, "0 or more"),
            ("out", bool(self.out.strip()), "a folder"),
            ("keep", self.keep >= 1, "1 or more"),
        ):
            if not good:
                raise ConfigError(f"recipe: {name} is {getattr(self, name)!r}; expected {wanted}")
        find_template(self.template)
        if self.lora_rank and "decoder" not in self.train:
            raise ConfigError('recipe: lora_rank is set, but train has no "decoder" for the adapters to sit in')
        if self.quantize_base != "none" and not self.lora_rank:
            raise ConfigError("recipe: quantize_base needs lora_rank above 0: 4-bit weights cannot learn themselves")
        if "rows" in self.train and not self.start_end:
            raise ConfigError('recipe: train has "rows", but start_end is off: there are no such rows')
        if self.aspect == "anyres" and not self.pinpoints:
            raise ConfigError("recipe: aspect anyres needs pinpoints, the list of canvas sizes (w, h)")


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of a shipped one such as llava-v1.5/finetune-lora. Raises ConfigError."""
    file = Path(name)
    if file.suffix == ".toml":
        if file.is_file():
            return file
        raise ConfigError(f"{file}: no such recipe file")
    shipped = names()
    if name in shipped:
        return RECIPES / f"{name}.toml"
    near = get_close_matches(name, shipped, n=1, cutoff=0.3)
    hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(shipped)}"
    raise ConfigError(f"no recipe is named {name!r}; {hint}; a file of your own ends in .toml")


def names() -> list[str]:
    """Shipped recipes."""
    return sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.glob("*/*.toml"))


def read_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """A recipe with `key=value` changes; values as in TOML, bare words are strings. Raises ConfigError."""
    file = find_recipe(name)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can not be read ({error}); expected a TOML file in UTF-8") from None
    values = _toml(text, str(file))
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change}: expected key=value")
        values[key.strip()] = _value(value.strip())
    return recipe_from(values, str(file))


def recipe_from(values: Mapping[str, Any], where: str) -> Recipe:
    """Raises ConfigError: an unknown key (with the nearest known one), a missing one, a value of the wrong kind."""
    kinds = get_type_hints(Recipe)
    for key in values:
        if key not in kinds:
            near = get_close_matches(key, kinds, n=1, cutoff=0.0)
            raise ConfigError(f"{where}: there is no key {key!r} in a recipe; the nearest is {near[0]!r}")
    for field in fields(Recipe):
        if field.default is MISSING and field.name not in values:
            raise ConfigError(f"{where}: {field.name} is missing; give it in the file or with --set {field.name}=…")
    return Recipe(**{key: _fitted(value, kinds[key], f"{where}: {key}") for key, value in values.items()})


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """All fields."""
    return {field.name: getattr(recipe, field.name) for field in fields(Recipe)}


def to_json(recipe: Recipe) -> str:
    """What `changed` reads."""
    return json.dumps(to_dict(recipe), indent=1)


def changed(file: Path, recipe: Recipe) -> set[str]:
    """Keys in which a recipe that was written by `to_json` differs. Raises ConfigError."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: can not be read ({error}); remove the run's folder to start anew") from None
    now = json.loads(to_json(recipe))
    return {key for key in {*before, *now} if before.get(key) != now.get(key)}


def _toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: is no TOML ({error})") from None


def _value(text: str) -> Any:
    try:
        return _toml(f"value = {text}", "")["value"]
    except ConfigError:
        return text


def _fitted(value: Any, kind: Any, where: str) -> Any:
    """The value as the field holds it: lists become tuples, whole numbers may stand for others."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{where} is {value!r}; expected one of {', '.join(map(repr, get_args(kind)))}")
        return value
    if get_origin(kind) is tuple:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise ConfigError(f"{where} is {value!r}; expected a list")
        inner = get_args(kind)
        inner = inner[:1] * len(values) if inner[-1] is Ellipsis else inner
        if len(inner) != len(values):
            raise ConfigError(f"{where} is {value!r}; expected {len(inner)} values")
        return tuple(_fitted(item, one, where) for item, one in zip(values, inner, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    options = get_args(kind) or (kind,)
    if type(value) not in options:
        expected = " or ".join(option.__name__ for option in options if option is not type(None))
        raise ConfigError(f"{where} is {value!r}; expected {expected}")
    return value
