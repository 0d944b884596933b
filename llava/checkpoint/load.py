"""From a folder or hub id to a checkpoint that is understood, and from there to a model with its weights."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.checkpoint import keymap, settings, zoo
from llava.checkpoint.detect import FORMAT_KEY, NATIVE_FORMAT, Choice, Facts, Kind, choose_template, detect
from llava.checkpoint.files import Weights, locate, open_weights, read_json
from llava.checkpoint.settings import ImageMode, Shapes
from llava.config import LlavaConfig, ProjectorConfig
from llava.errors import CheckpointError, ConfigError, LlavaError
from llava.model.llava import Llava
from llava.preprocess.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

SUPPORTED: tuple[Kind, ...] = ("native", "merged", "llama")
_NEEDS_BASE: tuple[Kind, ...] = ("delta", "lora", "projector")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one of our tensors comes from: names on disk, stacked by rows, in one set of files."""

    weights: Weights
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [self.weights.entries[name].shape for name in self.names]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]

    @property
    def n_bytes(self) -> int:
        return sum(self.weights.entries[name].n_bytes for name in self.names)

    @property
    def where(self) -> str:
        """For messages: file and tensor."""
        return f"{self.weights.entries[self.names[0]].file}: {', '.join(self.names)}"

    def read(self) -> Tensor:
        return keymap.read(self.weights, self.names)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder that is understood: the model's config, and for each of our tensors where it lies."""

    folder: Path
    kind: Kind
    evidence: list[str]
    template: Choice
    config: LlavaConfig
    sources: dict[str, Source]
    missing: tuple[str, ...]  # our names that no file holds
    unused: tuple[str, ...]  # names on disk that this model does not need
    tokenizer: Tokenizer
    tower: Path | None = None  # the CLIP folder that was read

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Our names and tensors, one at a time, mapped where nothing has to be stacked."""
        for name, source in self.sources.items():
            yield name, source.read()


def open_checkpoint(
    path: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    vision: bool = True,
    revision: str | None = None,
    image_mode: ImageMode | None = None,
    legacy_strip: bool = False,
    force: bool = False,
    weights: bool = True,
) -> Checkpoint:
    """Reads config, headers and tokenizer; no weights. `force` leaves unknown tensors out instead of refusing them.

    `weights` False: for looking only; a vision tower that is out of reach is then described from what is published.
    Raises CheckpointError, ConfigError.
    """
    folder = locate(path, revision=revision)
    facts = Facts(folder, _config_json(folder), open_weights(folder))
    finding = detect(facts)
    if finding.kind not in SUPPORTED:
        raise _unsupported(folder, finding.kind, finding.evidence, base)
    if not facts.weights:
        raise CheckpointError(f"{folder}: holds no weights; expected model*.safetensors or pytorch_model*.bin")
    rules = keymap.NATIVE if finding.kind == "native" else keymap.LLAVA
    planned = keymap.plan(facts.weights, rules, str(folder), lenient=force)
    sources = {ours: Source(weights=facts.weights, names=names) for ours, names in planned.sources.items()}
    tokenizer = load_tokenizer(folder, legacy_strip=legacy_strip)
    if finding.kind == "native":
        config, tower = _native_config(facts), None
        config = config if vision else replace(config, vision=None, projector=None, image=None, newline=False)
        if config.image and image_mode:
            config = replace(config, image=replace(config.image, mode=image_mode))
    else:
        config, tower = _foreign_config(facts, sources, vision, vision_tower, image_mode, weights)
    choice = choose_template(
        finding.kind, facts.settings, config.decoder, config.projector or _linear(sources, config), tokenizer
    )
    config = replace(config, template=choice.template)
    if tower and config.vision and "vision.cls" not in sources:
        sources |= _tower_sources(tower, weights)
    wanted = shapes(config)
    used = {name: sources[name] for name in wanted if name in sources}
    leftover = [name for ours, source in sources.items() if ours not in wanted for name in source.names]
    return Checkpoint(
        folder=folder,
        kind=finding.kind,
        evidence=finding.evidence,
        template=choice,
        config=config,
        sources=used,
        missing=tuple(name for name in wanted if name not in used),
        unused=(*planned.dropped, *leftover),
        tokenizer=tokenizer,
        tower=tower,
    )


def _config_json(folder: Path) -> dict[str, Any]:
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is empty; expected config.json, weights and tokenizer files")
    known = ("config.json", "adapter_config.json", "mm_projector.bin")
    if not any((folder / name).is_file() for name in known):
        raise CheckpointError(f"{folder / 'config.json'}: is missing; the folder is not a whole checkpoint")
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _unsupported(folder: Path, kind: Kind, evidence: list[str], base: str | Path | None) -> LlavaError:
    why = f"{folder}: {kind} ({evidence[0]})"
    if kind in _NEEDS_BASE:
        needs = "" if base else "; such a folder needs base="
        return CheckpointError(f"{why}: this version does not load these yet{needs}")
    if kind == "clip":
        return CheckpointError(f"{why}: a vision tower alone; name it with vision_tower= beside a LLaVA")
    return CheckpointError(f"{why}: this version loads merged LLaVA, plain Llama and native folders only")


def _foreign_config(
    facts: Facts,
    sources: Mapping[str, Source],
    vision: bool,
    vision_tower: str | Path | None,
    image_mode: ImageMode | None,
    weights: bool,
) -> tuple[LlavaConfig, Path | None]:
    where = str(facts.folder / "config.json")
    found = {name: source.shape for name, source in sources.items()}
    decoder = settings.decoder_config(facts.settings, found, where)
    generation = facts.folder / "generation_config.json"
    config = LlavaConfig(
        decoder=decoder,
        start_end=bool(facts.settings.get("mm_use_im_start_end", False)),
        eos_ids=settings.end_ids(facts.folder, read_json(generation) if generation.is_file() else {}),
        dtype=_stored_dtype(facts, sources),
    )
    tower = vision_tower or facts.settings.get("mm_vision_tower")
    if not vision or not facts.settings.get("mm_vision_tower"):
        if vision and "projector.0.weight" in sources:
            raise CheckpointError(f"{where}: names no mm_vision_tower though a projector is there; pass vision=False")
        return config, None
    folder, clip, processor = _tower(str(tower), found, weights, facts.settings)
    seen = settings.vision_config(clip, facts.settings, found, str(folder or tower))
    projector = settings.projector_config(facts.settings, seen, decoder)
    return replace(
        config,
        vision=seen,
        projector=projector,
        image=settings.image_config(processor, facts.settings, seen, image_mode or "original"),
        newline="newline" in sources,
    ), folder


def _native_config(facts: Facts) -> LlavaConfig:
    where = facts.folder / "config.json"
    if (found := facts.settings[FORMAT_KEY]) != NATIVE_FORMAT:
        raise CheckpointError(
            f"{where}: {FORMAT_KEY} is {found!r}, this version reads {NATIVE_FORMAT!r}; upgrade llava"
        )
    try:
        return LlavaConfig.from_dict({key: value for key, value in facts.settings.items() if key != FORMAT_KEY})
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: is not a whole native config ({error})") from None


def _stored_dtype(facts: Facts, sources: Mapping[str, Source]) -> Any:
    norm = sources.get("decoder.norm.weight")
    seen = str(norm.weights.entries[norm.names[0]].dtype).removeprefix("torch.") if norm else "float16"
    return settings.stored_dtype({"dtype": seen}, settings.stored_dtype(facts.settings))


def _tower(
    name: str, found: Shapes, weights: bool, llava: Mapping[str, Any]
) -> tuple[Path | None, dict[str, Any], dict[str, Any]]:
    """Folder, config.json and preprocessor_config.json of the CLIP tower."""
    held = "vision.cls" in found
    known = None if weights or held else zoo.CLIP_CONFIGS.get(name)  # for a look, the published sizes will do
    if known and not Path(name).is_dir():
        return None, known, {}
    try:
        folder = locate(name, weights=weights and not held, what="vision tower")
        processor = folder / "preprocessor_config.json"
        return folder, read_json(folder / "config.json"), read_json(processor) if processor.is_file() else {}
    except CheckpointError as error:
        if held and (sizes := settings.tower_from_shapes(found)):
            return None, sizes, {}
        heads = "; the shards hold the tower, but only its config tells the number of heads" if held else ""
        raise CheckpointError(f"{error}{heads}: name a CLIP folder with vision_tower= (--vision-tower)") from None


def _tower_sources(folder: Path, needed: bool) -> dict[str, Source]:
    weights = open_weights(folder)
    if not weights and needed:
        raise CheckpointError(f"{folder}: the vision tower's folder holds no weights; name another with vision_tower=")
    planned = keymap.plan(weights, keymap.CLIP, str(folder))
    return {ours: Source(weights=weights, names=names) for ours, names in planned.sources.items()}


def _linear(sources: Mapping[str, Source], config: LlavaConfig) -> ProjectorConfig | None:
    """For the template's sake, the projector of a checkpoint that is opened without vision."""
    weights = [source for name, source in sources.items() if name.startswith("projector.") and name.endswith("weight")]
    if not weights:
        return None
    return ProjectorConfig(in_dim=weights[0].shape[1], out_dim=config.decoder.dim, depth=len(weights))


def skeleton(config: LlavaConfig) -> Llava:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Llava(config)


def shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Our tensor names and shapes of a model; a tied head counts once."""
    state = skeleton(config).state_dict()
    return {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if not (config.decoder.tied and name == "decoder.head.weight")
    }


def build(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, force: bool = False) -> Llava:
    """The model with its weights. Weights that have the right type and place already stay mapped from their file.

    Raises CheckpointError: a tensor is missing, has another shape, or holds NaN or Inf (`force`: a warning).
    """
    if checkpoint.missing:
        n, first = len(checkpoint.missing), checkpoint.missing[0]
        names = keymap.disk_names(
            first, keymap.NATIVE if checkpoint.kind == "native" else (*keymap.LLAVA, *keymap.CLIP)
        )
        raise CheckpointError(
            f"{checkpoint.folder}: {n} tensors are missing, the first is {names[0]}; fetch the checkpoint again"
        )
    model = skeleton(checkpoint.config)
    expected = shapes(checkpoint.config)
    state = {}
    for name, source in checkpoint.sources.items():
        if source.shape != expected[name]:
            raise CheckpointError(
                f"{source.where}: has shape {list(source.shape)}, the config asks for {list(expected[name])}: "
                "config.json and weights are of different models"
            )
        tensor = source.read()
        check_finite(tensor, source.where, force)
        state[name] = tensor.to(device, dtype)
    if checkpoint.config.decoder.tied:
        state["decoder.head.weight"] = state["decoder.embed.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if checkpoint.config.decoder.tied:
        model.decoder.head.weight = model.decoder.embed.weight
    return model.requires_grad_(False).eval()


def check_headers(checkpoint: Checkpoint) -> None:
    """Every tensor is there and has the shape that the config asks for. Raises CheckpointError."""
    if checkpoint.missing:
        n, first = len(checkpoint.missing), checkpoint.missing[0]
        names = keymap.disk_names(
            first, keymap.NATIVE if checkpoint.kind == "native" else (*keymap.LLAVA, *keymap.CLIP)
        )
        raise CheckpointError(
            f"{checkpoint.folder}: {n} tensors are missing, the first is {names[0]}; fetch the checkpoint again"
        )
    expected = shapes(checkpoint.config)
    for name, source in checkpoint.sources.items():
        if source.shape != expected[name]:
            raise CheckpointError(
                f"{source.where}: has shape {list(source.shape)}, the config asks for {list(expected[name])}: "
                "config.json and weights are of different models"
            )


def check_finite(tensor: Tensor, where: str, force: bool = False) -> None:
    """Refuses NaN and Inf. The smallest and the largest value show them, in one pass and without a copy."""
    if not tensor.numel() or not tensor.is_floating_point():
        return
    low, high = torch.aminmax(tensor)
    if low.isfinite() and high.isfinite():
        return
    bad = int((~tensor.isfinite()).sum())
    if not force:
        raise CheckpointError(
            f"{where}: {bad} of {tensor.numel()} values are NaN or Inf; fetch it again, or force=True"
        )
    log.warning("%s: %d values are NaN or Inf", where, bad)


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the first GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is not known; expected auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r} is not there: this machine shows {torch.cuda.device_count()} GPUs")
    return chosen


def resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own type on a GPU; on a CPU bfloat16, or float32 below 1 B parameters."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, torch.dtype):
        if dtype not in known.values():
            raise ConfigError(f"dtype {dtype} is not supported; expected one of {', '.join(known)}")
        return dtype
    if dtype == "auto":
        if device.type != "cpu":
            return known[checkpoint.config.dtype]
        return torch.float32 if n_parameters(checkpoint.config) < 1e9 else torch.bfloat16
    if dtype not in known:
        raise ConfigError(f"dtype {dtype!r} is not known; expected auto, {', '.join(known)}")
    return known[dtype]


def n_parameters(config: LlavaConfig) -> int:
    """Weights of the model as it is built."""
    return sum(torch.Size(shape).numel() for shape in shapes(config).values())
