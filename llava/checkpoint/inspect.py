"""What a checkpoint is, told from headers alone; and a scan of its values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.checkpoint import bases, zoo
from llava.checkpoint.detect import Facts, Finding, Kind, choose_template, detect
from llava.checkpoint.files import (
    ADAPTER_FILES,
    PROJECTOR_FILE,
    TRAINED_BESIDE,
    Weights,
    locate,
    locate_file,
    open_weights,
    reading,
)
from llava.checkpoint.identify import identify, licence_of_base
from llava.checkpoint.onbase import ON_BASE
from llava.checkpoint.open import SUPPORTED, Checkpoint, look, open_checkpoint
from llava.checkpoint.settings import Shapes
from llava.checkpoint.traits import recorded_names
from llava.config import LlavaConfig
from llava.errors import LlavaError
from llava.formats.tokenizer import has_tokenizer, load_tokenizer
from llava.model.llava import shapes

_INT4_GROUP = 128  # weights that share a scale


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `llava inspect` tells; `None` and empty where a checkpoint does not say."""

    kind: Kind
    evidence: list[str]
    base: str | None  # the language model that this folder needs beside it
    licences: list[str] = field(default_factory=list)  # of the language model, as noted in rows of the zoo that fit
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
    facts = look(path, options.get("revision"))
    with reading(facts.folder / "config.json"):
        finding = detect(facts)
    if finding.kind == "unknown" or (finding.kind in SUPPORTED and not facts.weights):
        open_checkpoint(facts)  # raises, saying what is missing
    if finding.kind not in SUPPORTED and not (base and finding.kind in ON_BASE):
        return _recognised(facts, finding)
    checkpoint, remark = _open(facts, options | ({"base": base} if finding.kind in ON_BASE else {}))
    config = checkpoint.config
    # of a vision part that could not be described, what lies in the checkpoint itself
    rest = {} if config.vision else {name: source.shape for name, source in checkpoint.spare.items()}
    sizes = shapes(config) | rest
    kept = {name for ours in rest for name in checkpoint.spare[ours].names}
    return Description(
        kind=finding.kind,
        evidence=[*finding.evidence, *remark],
        base=None,
        licences=licences(facts, finding),
        sizes=_counts(sizes) | {"dtype": config.dtype, **_parts(config, sizes)},
        template=checkpoint.template.template,
        template_because=checkpoint.template.because,
        image_mode=config.image.mode if config.image else "original" if rest else None,
        missing=[name for name in checkpoint.missing if not _comes_from_tower(name, checkpoint)],
        unused=[name for name in checkpoint.unused if name not in kept],
        memory_bytes=memory_bytes(sizes),
        context=config.decoder.max_seq,
    )


def licences(facts: Facts, finding: Finding) -> list[str]:
    """Notes on the language model's licence: of the rows that the folder is, else of the base that its files name, else
    of the rows from which sizes alone tell it apart.
    """
    try:
        found = identify(facts, finding)
    except LlavaError:
        return []
    recorded = [*recorded_names(facts, finding.kind)]
    if finding.kind in ("llama", "merged") and (own := facts.settings.get("_name_or_path")):
        recorded.append((str(own), "config.json: _name_or_path"))
    for name, where in () if found.candidates else recorded:
        if note := licence_of_base(name):
            return [f"{note} ({where} = {name})"]
    if not found.candidates and finding.kind in ON_BASE and recorded:
        return [f"that of its base, {recorded[0][0]}, which the zoo does not know"]
    rows = found.family
    notes: dict[str, list[str]] = {}
    for match in rows:
        notes.setdefault(zoo.licence(match.entry), []).append(match.entry["id"])
    return [f"{note} (as {', '.join(ids)})" for note, ids in notes.items()]


def _recognised(facts: Facts, finding: Finding) -> Description:
    """Of a folder that does not load by itself, or not yet, what its headers and config show."""
    sizes = {name: entry.shape for name, entry in facts.weights.entries.items()}
    for weights in _beside(facts.folder):
        sizes |= {f"{entry.file.stem}.{name}": entry.shape for name, entry in weights.entries.items()}
    config = facts.settings
    context = config.get("max_position_embeddings") or config.get("max_sequence_length") or config.get("max_seq_len")
    tokenizer = load_tokenizer(facts.folder) if finding.kind == "delta" and has_tokenizer(facts.folder) else None
    choice = None if finding.kind in ("clip", "lora") else choose_template(finding.kind, config, None, None, tokenizer)
    return Description(
        kind=finding.kind,
        evidence=finding.evidence,
        base=bases.words(finding.kind, bases.needed_base(facts, finding)) if finding.kind in ON_BASE else None,
        licences=licences(facts, finding),
        sizes=_counts(sizes),
        template=choice.template if choice else None,
        template_because=f"{choice.because}, as far as config.json tells" if choice else "",
        image_mode="hf" if finding.kind == "llava-hf" else "original",
        memory_bytes=memory_bytes(sizes),
        context=context,
    )


def _beside(folder: Path) -> list[Weights]:
    """Files that hold what is put on a base."""
    names = (*ADAPTER_FILES, TRAINED_BESIDE, PROJECTOR_FILE)
    return [Weights([folder / name]) for name in names if (folder / name).is_file()]


def _open(facts: Facts, options: Mapping[str, Any]) -> tuple[Checkpoint, list[str]]:
    """A tower that is out of reach is no reason to say nothing of the rest."""
    options = {"fetch_tower": False, "lenient": True, **options}
    try:
        return open_checkpoint(facts, **options), []
    except LlavaError as error:
        try:
            return open_checkpoint(facts, **{**options, "vision": False}), [f"vision tower: {error}"]
        except LlavaError:
            raise error from None


def _comes_from_tower(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor that was not seen lies in the tower's own folder, which was not looked for."""
    return name.startswith("vision.") and "vision.cls" not in checkpoint.sources


def _counts(sizes: Shapes) -> dict[str, Any]:
    """Values in all and by the first word of their names."""
    parts: dict[str, int] = {}
    for name, shape in sizes.items():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + torch.Size(shape).numel()
    return {"parameters": sum(parts.values()), "parameters_by_part": parts}


def _parts(config: LlavaConfig, sizes: Shapes) -> dict[str, Any]:
    values = config.to_dict()
    layers = [shape for name, shape in sizes.items() if name.startswith("projector.") and name.endswith(".weight")]
    held = {"in_dim": layers[0][1], "out_dim": layers[-1][0], "depth": len(layers)} if layers else None
    parts = ("decoder", "vision", "image")
    return {**{part: values[part] for part in parts}, "projector": values["projector"] or held}


def memory_bytes(sizes: Shapes) -> dict[str, int]:
    """Weights in memory: all in bfloat16, or the decoder's matrices in 8 or 4 bits with 16-bit scales.

    int8 has a scale a row, int4 a scale and a zero point for each group of 128; table, norms, projector and tower stay
    bfloat16.
    """
    sums = {"bf16": 0, "int8": 0, "int4": 0}
    for name, shape in sizes.items():
        n = torch.Size(shape).numel()
        small = len(shape) == 2 and not any(word in name for word in _KEPT_IN_16_BITS)
        sums["bf16"] += 2 * n
        sums["int8"] += n + 2 * shape[0] if small else 2 * n
        sums["int4"] += n // 2 + 4 * (n // _INT4_GROUP) if small else 2 * n
    return sums


_KEPT_IN_16_BITS = ("vision", "projector", "embed", "wte")


@dataclass
class Scan:
    """What is wrong with values, by names on disk."""

    nan: dict[str, int] = field(default_factory=dict)  # how many
    inf: dict[str, int] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)  # tensors without any other value


def scan(path: str | Path, *, revision: str | None = None, progress: Callable[[int, int], None]) -> Scan:
    """Streams all values of a folder, whatever its kind."""
    if file := locate_file(path, revision=revision):
        files = [Weights([file])]
    else:
        folder = locate(path, revision=revision)
        files = [open_weights(folder), *_beside(folder)]
    found = Scan()
    total, done = sum(entry.n_bytes for weights in files for entry in weights.entries.values()), 0
    for weights in files:
        for name, entry in weights.entries.items():
            _look_at(weights[name], name, found)
            done += entry.n_bytes
            progress(done, total)
    return found


def _look_at(tensor: Tensor, name: str, found: Scan) -> None:
    if not tensor.numel() or not tensor.is_floating_point():
        return
    low, high = torch.aminmax(tensor)
    if low.isfinite() and high.isfinite():
        if low == 0 == high:
            found.zero.append(name)
        return
    if n := int(tensor.isnan().sum()):
        found.nan[name] = n
    if n := int(tensor.isinf().sum()):
        found.inf[name] = n
