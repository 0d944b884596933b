"""What a checkpoint is, told from headers alone; and a scan of its values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava.checkpoint.detect import Facts, Kind, detect
from llava.checkpoint.files import locate, open_weights, read_json
from llava.checkpoint.load import SUPPORTED, Checkpoint, open_checkpoint, shapes, skeleton
from llava.config import LlavaConfig
from llava.errors import LlavaError

_INT4_GROUP = 128  # weights that share a scale


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `llava inspect` tells; `None` and empty where a checkpoint does not say."""

    kind: Kind
    evidence: list[str]
    base: str | None  # the language model that this folder needs beside it
    sizes: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    template_because: str = ""
    image_mode: str | None = None
    missing: list[str] = field(default_factory=list)  # tensors that should be there, by our names
    unused: list[str] = field(default_factory=list)  # tensors that are not needed, by their names on disk
    memory_bytes: dict[str, int] = field(default_factory=dict)  # of weights; bf16, int8, int4
    context: int | None = None  # tokens


def describe(path: str | Path, *, base: str | None = None, **options: Any) -> Description:
    """Reads config, tokenizer and headers. Options as for `open_checkpoint`. Raises CheckpointError, ConfigError."""
    folder = locate(path, revision=options.get("revision"))
    config = folder / "config.json"
    facts = Facts(folder, read_json(config) if config.is_file() else {}, open_weights(folder))
    finding = detect(facts)
    if finding.kind == "unknown" or (finding.kind in SUPPORTED and not facts.weights):
        open_checkpoint(folder)  # raises, saying what is missing
    if finding.kind not in SUPPORTED:
        return Description(
            kind=finding.kind,
            evidence=finding.evidence,
            base=base or _base(finding.kind, facts),
            sizes={"stored_values": sum(entry.n_values for entry in facts.weights.entries.values())},
        )
    checkpoint, remark = _open(folder, options)
    return Description(
        kind=finding.kind,
        evidence=[*finding.evidence, *remark],
        base=None,
        sizes=_sizes(checkpoint),
        template=checkpoint.template.template,
        template_because=checkpoint.template.because,
        image_mode=_image_mode(checkpoint),
        missing=[name for name in checkpoint.missing if not _comes_from_tower(name, checkpoint)],
        unused=list(checkpoint.unused),
        memory_bytes=memory_bytes(checkpoint.config),
        context=checkpoint.config.decoder.max_seq,
    )


def _open(folder: Path, options: Mapping[str, Any]) -> tuple[Checkpoint, list[str]]:
    """A tower that is out of reach is no reason to say nothing of the rest."""
    try:
        return open_checkpoint(folder, weights=False, force=True, **options), []
    except LlavaError as error:
        try:
            checkpoint = open_checkpoint(folder, weights=False, force=True, **{**options, "vision": False})
        except LlavaError:
            raise error from None
        return checkpoint, [f"without its vision part: {error}"]


def _comes_from_tower(name: str, checkpoint: Checkpoint) -> bool:
    return name.startswith("vision.") and "vision.cls" not in checkpoint.sources and checkpoint.tower is None


def _image_mode(checkpoint: Checkpoint) -> str | None:
    if checkpoint.config.image:
        return checkpoint.config.image.mode
    return "original" if checkpoint.kind == "merged" else None  # its tower is out of reach


def _base(kind: Kind, facts: Facts) -> str | None:
    if kind == "lora":
        adapter = read_json(facts.folder / "adapter_config.json")
        return adapter.get("base_model_name_or_path") or "the language model that it was trained from"
    if kind == "delta":
        return "the LLaMA that the difference was taken to"
    if kind == "projector":
        return facts.settings.get("_name_or_path") or "the language model that it was trained with"
    return None


def _sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    counts: dict[str, int] = {}
    for name, shape in shapes(config).items():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + torch.Size(shape).numel()
    values = config.to_dict()
    return {
        "parameters": sum(counts.values()),
        "parameters_by_part": counts,
        "dtype": config.dtype,
        "decoder": values["decoder"],
        "vision": values["vision"],
        "projector": values["projector"],
        "image": values["image"],
    }


def memory_bytes(config: LlavaConfig) -> dict[str, int]:
    """Weights in memory: all in bfloat16, or the decoder's matrices in 8 or 4 bits with 16-bit scales.

    int8 has a scale a row, int4 a scale and a zero point for each group of 128; table, norms and tower stay bfloat16.
    """
    matrices = {
        f"decoder.{name}.weight"
        for name, module in skeleton(config).decoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    sums = {"bf16": 0, "int8": 0, "int4": 0}
    for name, shape in shapes(config).items():
        n = torch.Size(shape).numel()
        small = name in matrices
        sums["bf16"] += 2 * n
        sums["int8"] += n + 2 * shape[0] if small else 2 * n
        sums["int4"] += n // 2 + 4 * (n // _INT4_GROUP) if small else 2 * n
    return sums


@dataclass
class Scan:
    """What is wrong with values, by names on disk."""

    nan: dict[str, int] = field(default_factory=dict)  # how many
    inf: dict[str, int] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)  # tensors without any other value

    @property
    def clean(self) -> bool:
        return not (self.nan or self.inf or self.zero)


def scan(path: str | Path, *, revision: str | None = None, progress: Callable[[int, int], None]) -> Scan:
    """Streams all values of a folder, whatever its kind."""
    weights = open_weights(locate(path, revision=revision))
    found = Scan()
    total, done = sum(entry.n_bytes for entry in weights.entries.values()), 0
    for name, entry in weights.entries.items():
        tensor = weights[name]
        done += entry.n_bytes
        progress(done, total)
        if not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)
        if tensor.is_floating_point() and not (low.isfinite() and high.isfinite()):
            if n := int(tensor.isnan().sum()):
                found.nan[name] = n
            if n := int(tensor.isinf().sum()):
                found.inf[name] = n
        elif low == 0 == high and tensor.is_floating_point():
            found.zero.append(name)
    return found
