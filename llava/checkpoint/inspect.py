"""Describes a checkpoint without reading its weights, and scans weights for NaN, Inf and all-zero tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.checkpoint.consistency import check
from llava.checkpoint.detect import UNKNOWN, choose_template, detect, read_files
from llava.checkpoint.open import open_checkpoint, open_unchecked
from llava.config import LlavaConfig, LoadOptions
from llava.errors import LlavaError
from llava.formats import FORMATS
from llava.formats.format import TEMPLATE_KEY, Checkpoint, CheckpointFiles, Detection, Shapes, shapes_of
from llava.formats.recorded_base import recorded_names
from llava.formats.tokenizer import has_tokenizer, load_tokenizer
from llava.model.llava import shapes
from llava.tensors.files import ADAPTER_FILES, NON_LORA_FILE, PROJECTOR_FILE, Weights
from llava.tensors.hub import locate, locate_file
from llava.tensors.shards import open_weights
from llava.zoo import catalogue
from llava.zoo.bases import advice, needed_base
from llava.zoo.match import licence_of_base, match

_INT4_GROUP = 128  # number of weights that share a scale and a zero point


@dataclass(frozen=True, kw_only=True)
class Description:
    """The facts that `llava inspect` prints. Unknown values are None or empty."""

    kind: str  # the format
    evidence: list[str]
    base: str | None  # the base model that this checkpoint needs
    licences: list[str] = field(default_factory=list)  # licence notes for the language model
    sizes: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    template_because: str = ""
    image_mode: str | None = None
    missing: list[str] = field(default_factory=list)  # our names of expected tensors that are absent
    unused: list[str] = field(default_factory=list)  # on-disk names of tensors that are not needed
    memory_bytes: dict[str, int] = field(default_factory=dict)  # size of the weights by precision: bf16, int8, int4
    context: int | None = None  # context length in tokens


@advice()
def describe(source: str | Path, options: LoadOptions | None = None) -> Description:
    """Describes a checkpoint from its config, tokenizer and headers. Raises CheckpointError, ConfigError."""
    options = options or LoadOptions()
    files = read_files(source, options.revision)
    detection = detect(files)
    format = FORMATS.get(detection.format)
    if detection.format == UNKNOWN or (format and format.reads and not format.needs_base and not files.weights):
        open_checkpoint(files)  # raises an error that says what is missing
    if format is None or not format.reads or (format.needs_base and not options.base):
        return _describe_headers(files, detection)
    if not format.needs_base:
        options = replace(options, base=None)
    checkpoint, remarks = _open_leniently(files, replace(options, fetch_tower=False))
    config = checkpoint.config
    # if the vision part could not be resolved, its tensors are among the unused ones
    rest = {} if config.vision else shapes_of(checkpoint.unused)
    sizes = {**shapes(config), **rest}
    counted = {name for ours in rest for name in checkpoint.unused[ours].names}
    return Description(
        kind=detection.format,
        evidence=[*detection.evidence, *remarks],
        base=None,
        licences=licences(files, detection),
        sizes=_counts(sizes) | {"dtype": config.dtype, **_parts(config, sizes)},
        template=checkpoint.template.template,
        template_because=checkpoint.template.because,
        image_mode=config.image.mode if config.image else "original" if rest else None,
        missing=[name for name in checkpoint.missing if not _is_in_tower_folder(name, checkpoint)],
        unused=[name for name in checkpoint.unused_names if name not in counted],
        memory_bytes=memory_bytes(sizes),
        context=config.decoder.max_seq,
    )


def licences(files: CheckpointFiles, detection: Detection) -> list[str]:
    """Returns licence notes for the language model: from matching zoo entries, else from the base recorded in
    the files, else from zoo entries that differ only in sizes.
    """
    try:
        found = match(files, detection)
    except LlavaError:
        return []
    recorded = [(name, where) for name, where, _ in recorded_names(files, detection.format)]
    if detection.format in ("llama", "llava") and (own := files.config.get("_name_or_path")):
        recorded.append((str(own), "config.json: _name_or_path"))
    for name, where in () if found.candidates else recorded:
        if note := licence_of_base(name):
            return [f"{note} ({where} = {name})"]
    if not found.candidates and FORMATS[detection.format].needs_base and recorded:
        return [f"same as the base {recorded[0][0]}, which is not in the zoo"]
    notes: dict[str, list[str]] = {}
    for entry in found.family:
        notes.setdefault(catalogue.licence(entry.entry), []).append(entry.entry["id"])
    return [f"{note} (as {', '.join(ids)})" for note, ids in notes.items()]


def _describe_headers(files: CheckpointFiles, detection: Detection) -> Description:
    """Describes a checkpoint that cannot be loaded on its own, from its headers and config."""
    sizes = {name: header.shape for name, header in files.weights.headers.items()}
    for weights in _extra_weights(files.path):
        sizes |= {f"{header.file.stem}.{name}": header.shape for name, header in weights.headers.items()}
    config, name = files.config, detection.format
    context = config.get("max_position_embeddings") or config.get("max_sequence_length") or config.get("max_seq_len")
    tokenizer = load_tokenizer(files.path) if name == "delta" and has_tokenizer(files.path) else None
    undecided = name == "clip" or (name == "lora" and TEMPLATE_KEY not in config)
    choice = None if undecided else choose_template(name, config, None, None, tokenizer)
    return Description(
        kind=name,
        evidence=detection.evidence,
        base=needed_base(files, detection).describe(name) if FORMATS[name].needs_base else None,
        licences=licences(files, detection),
        sizes=_counts(sizes),
        template=choice.template if choice else None,
        template_because=f"{choice.because}; based only on config.json" if choice else "",
        image_mode="original",
        memory_bytes=memory_bytes(sizes),
        context=context,
    )


def _extra_weights(folder: Path) -> list[Weights]:
    """Opens the weight files that extend a base: LoRA, non-LoRA and projector weights."""
    names = (*ADAPTER_FILES, NON_LORA_FILE, PROJECTOR_FILE)
    return [Weights([folder / name]) for name in names if (folder / name).is_file()]


def _open_leniently(files: CheckpointFiles, options: LoadOptions) -> tuple[Checkpoint, list[str]]:
    """Opens a checkpoint and returns the faults that `open_checkpoint` would report as remarks.

    If the vision part cannot be resolved, retries without it.
    """
    try:
        opened, remarks = open_unchecked(files, options), []
    except LlavaError as error:
        options = replace(options, vision=False)
        try:
            opened, remarks = open_unchecked(files, options), [f"vision tower: {error}"]
        except LlavaError:
            raise error from None
    try:
        check(opened, options)
    except LlavaError as error:
        remarks.append(f"cannot be loaded: {error}")
    return opened.checkpoint, remarks


def _is_in_tower_folder(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a missing tensor belongs to a vision tower that is stored outside the checkpoint."""
    return name.startswith("vision.") and "vision.cls" not in checkpoint.tensors


def _counts(sizes: Shapes) -> dict[str, Any]:
    """Returns the number of parameters, in total and by the first component of the tensor names."""
    parts: dict[str, int] = {}
    for name, shape in sizes.items():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + torch.Size(shape).numel()
    return {"parameters": sum(parts.values()), "parameters_by_part": parts}


def _parts(config: LlavaConfig, sizes: Shapes) -> dict[str, Any]:
    values = config.to_dict()
    layers = [shape for name, shape in sizes.items() if name.startswith("projector.") and name.endswith(".weight")]
    shown = {"in_dim": layers[0][1], "out_dim": layers[-1][0], "depth": len(layers)} if layers else None
    parts = ("decoder", "vision", "image")
    return {**{part: values[part] for part in parts}, "projector": values["projector"] or shown}


def memory_bytes(sizes: Shapes) -> dict[str, int]:
    """Returns the size of the weights in bytes: all in bfloat16, or with the decoder matrices in int8 or int4.

    int8 adds a 16-bit scale per row; int4 adds a 16-bit scale and a 16-bit zero point per 128 weights. The embeddings,
    norms, projector and tower stay in bfloat16.
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
    """Suspicious values, by on-disk tensor name."""

    nan: dict[str, int] = field(default_factory=dict)  # number of NaN values per tensor
    inf: dict[str, int] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)  # tensors that are all zero


def scan(source: str | Path, *, revision: str | None = None, progress: Callable[[int, int], None]) -> Scan:
    """Scans all values of a checkpoint in any format, one tensor at a time."""
    if file := locate_file(source, revision=revision):
        files = [Weights([file])]
    else:
        folder = locate(source, revision=revision)
        files = [open_weights(folder), *_extra_weights(folder)]
    found = Scan()
    total, done = sum(header.n_bytes for weights in files for header in weights.headers.values()), 0
    for weights in files:
        for name, header in weights.headers.items():
            _scan_tensor(weights[name], name, found)
            done += header.n_bytes
            progress(done, total)
    return found


def _scan_tensor(tensor: Tensor, name: str, found: Scan) -> None:
    if not tensor.numel() or not tensor.is_floating_point():
        return
    if tensor.itemsize == 1:  # torch has no minimum of 8-bit floats
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)
    if low.isfinite() and high.isfinite():
        if low == 0 == high:
            found.zero.append(name)
        return
    if n := int(tensor.isnan().sum()):
        found.nan[name] = n
    if n := int(tensor.isinf().sum()):
        found.inf[name] = n
