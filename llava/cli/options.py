"""Options shared by several commands."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from llava.errors import ConfigError

if TYPE_CHECKING:
    from llava.config import EngineOptions

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="folder or hub id of a checkpoint; default: the included llava-tiny"),
]
Checkpoint = Annotated[str, typer.Argument(metavar="M", help="folder or hub id of a checkpoint")]
Base = Annotated[
    str | None, typer.Option("--base", help="folder or hub id of the base model of a delta, LoRA or projector")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=M", help="LoRA or projector to use with --model; repeatable"),
]
VisionTower = Annotated[str | None, typer.Option("--vision-tower", help="folder or hub id of the CLIP vision tower")]
Template = Annotated[str | None, typer.Option("--template", help="name of a conversation template")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N")]
Quantize = Annotated[str | None, typer.Option("--quantize", help="not supported by this version")]
Revision = Annotated[str | None, typer.Option("--revision", help="branch, tag or commit on the hub")]
Force = Annotated[bool, typer.Option("--force", help="continue despite NaN, Inf or a mismatched base")]
IgnoreTensors = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-tensors", metavar="NAME", help="leave out tensors, by on-disk name or pattern with *; repeatable"
    ),
]
ImageMode = Annotated[str | None, typer.Option("--image-mode", help="image preprocessing: original or hf")]
Exif = Annotated[bool, typer.Option("--exif", help="rotate images according to their EXIF orientation")]
Transparency = Annotated[
    str,
    typer.Option(
        "--transparency", help="transparent pixels: drop (as the original does), or a background: white or black"
    ),
]
LegacyStrip = Annotated[
    bool, typer.Option("--legacy-strip", help="strip white space around added tokens, as v0 and v1.1 did in training")
]
BatchInvariant = Annotated[
    bool,
    typer.Option("--batch-invariant", help="compute exactly the same logits alone and beside other requests; slower"),
]
MaxBatch = Annotated[int, typer.Option("--max-batch", help="requests that run at the same time; others wait")]
CacheMemory = Annotated[
    str | None,
    typer.Option("--cache-memory", help="memory for keys and values: a size such as 8GiB, or a share of what is free"),
]
Graphs = Annotated[
    bool,
    typer.Option("--graphs/--no-graphs", help="capture decoding steps and the vision tower as CUDA graphs on a GPU"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="maximum length of the reply, in tokens")]
Temperature = Annotated[
    float, typer.Option("--temperature", help="sampling temperature; 0 always selects the most likely token")
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="sample from the most likely tokens whose probabilities sum to this value"),
]
TopK = Annotated[int | None, typer.Option("--top-k", help="number of most likely tokens to sample from")]
MinP = Annotated[
    float | None, typer.Option("--min-p", help="minimum probability, as a fraction of the highest probability")
]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", help="values above 1 reduce repetition")]
NumBeams = Annotated[
    int, typer.Option("--num-beams", help="above 1: beam search with this many beams, which needs temperature 0")
]
Seed = Annotated[int | None, typer.Option("--seed", help="random seed, for reproducible replies")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="string that ends the reply; repeatable")]


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions:
    """Options for all commands that load a language model, with the same names as the parameters of `llava.load`."""

    dtype: DType = "auto"
    device: Device = "auto"
    quantize: Quantize = None
    revision: Revision = None
    force: Force = False
    ignore_tensors: IgnoreTensors = None
    legacy_strip: LegacyStrip = False


@dataclass(frozen=True, kw_only=True)
class ModelOptions(LanguageModelOptions):
    """The same for commands that take messages and pictures."""

    vision_tower: VisionTower = None
    template: Template = None
    image_mode: ImageMode = None
    exif: Exif = False
    transparency: Transparency = "drop"


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """Options for all commands that generate text, with the same names as the fields of `EngineOptions`."""

    batch_invariant: BatchInvariant = False
    max_batch: MaxBatch = 64
    cache_memory: CacheMemory = None
    graphs: Graphs = True

    def options(self) -> "EngineOptions":
        """Returns the engine's options. Raises ConfigError, with the name of the command-line option."""
        from llava.config import EngineOptions

        try:
            return EngineOptions(**vars(self))
        except ConfigError as error:
            name, _, rest = str(error).removeprefix("engine: ").partition(" ")
            raise ConfigError(f"--{name.replace('_', '-')} {rest}") from None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options for all commands that generate text, with the same names as the options of `Assistant.generate`."""

    max_new_tokens: MaxNewTokens = 512
    temperature: Temperature = 0.0
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    repetition_penalty: RepetitionPenalty = 1.0
    num_beams: NumBeams = 1
    seed: Seed = None
    stop: Stop = None

    def check(self) -> None:
        """Raises ConfigError, with the name of the command-line option, if a value is invalid."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens is {self.max_new_tokens}; expected 1 or more")
        from llava.engine.sampling_params import SamplingParams

        try:
            SamplingParams.from_options(**vars(self))
        except ConfigError as error:
            name, _, rest = str(error).partition(" ")
            raise ConfigError(f"--{name.replace('_', '-')} {rest}") from None


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingOptions):
    """`SamplingOptions` with the default temperature for chats."""

    temperature: Temperature = 0.2


def model_name(model: str | None) -> str:
    """Returns the name of a model for people: the hub id, the last component of the folder, or llava-tiny."""
    from llava.assistant import LLAVA_TINY

    if model is None:
        return LLAVA_TINY.name
    return Path(model).resolve().name if Path(model).exists() else model


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Lets a command take a group of options as one parameter, annotated with a dataclass such as `ModelOptions`.

    Typer expects one parameter per option, so the returned function has the fields of the dataclass as parameters.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            options += inspect.signature(groups[parameter.name]).parameters.values()
        else:
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def run(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **made)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run
