"""Resolves a checkpoint in stages: detect → resolve_base → read_tokenizer → resolve_tensors → read_config → check.

Reads config, headers and tokenizer, but no weights.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llava.checkpoint.base_check import check_base_before_download
from llava.checkpoint.detect import choose_template, detect, read_files
from llava.config import LoadOptions
from llava.errors import CheckpointError, ConfigError
from llava.formats import FORMATS, clip
from llava.formats.base_model import (
    NoBaseError,
    check_base_format,
    check_heads,
    check_raw,
    check_vocabulary,
    warn_if_recorded_otherwise,
    wrong_base,
)
from llava.formats.format import Checkpoint, CheckpointFiles, Detection, Format, ReadConfig, Resolved
from llava.formats.multimodal import projector_in
from llava.formats.recorded_base import find_recorded_base
from llava.formats.tokenizer import has_tokenizer, load_tokenizer
from llava.model.llava import shapes
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.files import parsing
from llava.tensors.hub import absolute_if_local, locate
from llava.tensors.keymap import disk_names
from llava.tensors.lazy import LazyTensor

log = logging.getLogger(__name__)


def open_checkpoint(source: str | Path | CheckpointFiles, options: LoadOptions | None = None) -> Checkpoint:
    """Resolves a checkpoint given as a folder, a hub id, or files already read. Raises CheckpointError, ConfigError."""
    options = _with_absolute_tower(options or LoadOptions())
    if options.base is not None and not isinstance(source, CheckpointFiles):
        check_base_before_download(options.base, source, options.revision)
    files = source if isinstance(source, CheckpointFiles) else read_files(source, options.revision)
    detection = detect(files)
    format = FORMATS.get(detection.format)
    if format is None or not format.reads:
        raise _unsupported(files, detection)
    base = resolve_base(files, detection, format, options)
    tokenizer = read_tokenizer(files, format, base, options)
    resolved = resolve_tensors(files, format, base, tokenizer.tokenizer, options)
    read = read_config(files, format, base, resolved, options)
    checkpoint = _assemble(files, detection, base, tokenizer, resolved, read, options)
    check(checkpoint, base, files, resolved, options)
    return checkpoint


def _with_absolute_tower(options: LoadOptions) -> LoadOptions:
    """Makes a local tower path absolute, so that it remains valid when it is written to a converted checkpoint."""
    tower = options.vision_tower
    return replace(options, vision_tower=absolute_if_local(tower)) if tower else options


def _unsupported(files: CheckpointFiles, detection: Detection) -> CheckpointError:
    why = f"{files.path}: has format {detection.format} ({detection.evidence[0]}), which"
    if detection.format == "clip":
        return CheckpointError(
            f"{why} is only a vision tower; load a LLaVA model and set vision_tower= (--vision-tower) to this folder"
        )
    readable = ", ".join(name for name, format in FORMATS.items() if format.reads)
    return CheckpointError(f"{why} this version cannot load; expected one of {readable}")


# ------------------------------------------------------------------------------------------------------------ stages


def resolve_base(
    files: CheckpointFiles, detection: Detection, format: Format, options: LoadOptions
) -> Checkpoint | None:
    """Opens the language model that a LoRA, projector or delta belongs to. Returns None for a whole model.

    Raises ConfigError if `options.base` is set for a whole model, and BaseModelError if the base is missing or
    unsuitable.
    """
    if not format.needs_base:
        if options.base is not None:
            raise ConfigError(
                f"{files.path}: has format {detection.format} ({detection.evidence[0]}), which needs no base; "
                "omit base= (--base)"
            )
        return None
    found = read_files(base_source(files, detection, options))
    base_format = detect(found).format
    check_base_format(found, base_format, FORMATS.get(base_format), files, detection)
    base = open_checkpoint(found, LoadOptions(vision=False, legacy_strip=options.legacy_strip, force=options.force))
    warn_if_recorded_otherwise(files, detection.format, base, found)
    return base


def base_source(files: CheckpointFiles, detection: Detection, options: LoadOptions) -> Path:
    """Returns the folder of the base: the given one or, if none is given, the recorded one if it is on this machine.

    Raises BaseModelError if there is neither.
    """
    if options.base is not None:
        return locate(options.base, what="base")
    if (recorded := find_recorded_base(files, detection.format)) is None:
        raise NoBaseError(files, detection)
    log.warning(
        "%s: no base is given; uses the recorded base %s (%s = %s)",
        files.path,
        recorded.folder,
        recorded.where,
        recorded.name,
    )
    return recorded.folder


@dataclass(frozen=True)
class ReadTokenizer:
    """A tokenizer, the folder that contains its files, and the tokens that were added because those files lack them."""

    tokenizer: Tokenizer
    folder: Path
    new_tokens: dict[str, int]


def read_tokenizer(
    files: CheckpointFiles, format: Format, base: Checkpoint | None, options: LoadOptions
) -> ReadTokenizer:
    """Loads the tokenizer from the checkpoint or, if it has none, from the base. Adds the checkpoint's new tokens."""
    own = base is None or has_tokenizer(files.path)
    folder = format.tokenizer_folder(files) if own or base is None else base.tokenizer_folder
    fast = (FORMATS[base.format] if base else format).fast_tokenizer
    tokenizer = load_tokenizer(folder, legacy_strip=options.legacy_strip, fast=fast)
    if base and tokenizer.id_of("<im_start>") is None and (new := format.new_tokens(files, tokenizer.size)):
        return ReadTokenizer(load_tokenizer(folder, legacy_strip=options.legacy_strip, more=new), folder, new)
    return ReadTokenizer(tokenizer, folder, {})


def resolve_tensors(
    files: CheckpointFiles, format: Format, base: Checkpoint | None, tokenizer: Tokenizer, options: LoadOptions
) -> Resolved:
    """Maps our tensor names to their sources in the checkpoint and its base.

    Raises CheckpointError if there are no weights, or if there are unknown tensors and `options.force` is false.
    """
    if not format.needs_base and not files.weights:
        raise CheckpointError(f"{files.path}: has no weights; expected model*.safetensors or pytorch_model*.bin")
    resolved = format.resolve(files, base, tokenizer)
    if resolved.unknown and not options.force:
        raise clip.unknown_tensors(resolved.unknown)
    return resolved


def read_config(
    files: CheckpointFiles, format: Format, base: Checkpoint | None, resolved: Resolved, options: LoadOptions
) -> ReadConfig:
    """Reads the model's config, completed with values from the tensors and the base."""
    with parsing(files.config_file if files.config or not base else base.path / "config.json"):
        read = format.read_config(files, resolved.tensors, base, options)
    config = read.config
    if resolved.start_end:
        config = replace(config, start_end=True)
    if base and not has_tokenizer(files.path):
        config = replace(config, eos_ids=config.eos_ids or base.config.eos_ids)
    return read._replace(config=config)


def _assemble(
    files: CheckpointFiles,
    detection: Detection,
    base: Checkpoint | None,
    tokenizer: ReadTokenizer,
    resolved: Resolved,
    read: ReadConfig,
    options: LoadOptions,
) -> Checkpoint:
    config = read.config
    projector = config.projector or projector_in(resolved.tensors, config.decoder)
    with parsing(read.source / "config.json"):
        template = choose_template(detection.format, read.source_config, config.decoder, projector, tokenizer.tokenizer)
    inside = "vision.cls" in resolved.tensors
    given_tower = None if options.vision_tower is None else str(options.vision_tower)
    available = dict(resolved.tensors)
    if read.tower_folder and not inside:
        available = clip.read_tower(read.tower_folder, needed=options.fetch_tower) | available
    expected = shapes(config)
    unused = {ours: tensor for ours, tensor in available.items() if ours not in expected}
    names = (*resolved.dropped, *resolved.unknown, *(name for tensor in unused.values() for name in tensor.names))
    return Checkpoint(
        path=files.path,
        format=detection.format,
        evidence=detection.evidence,
        template=template,
        config=replace(config, template=template.template),
        source_config=read.source_config,
        tensors={ours: available[ours] for ours in expected if ours in available},
        missing=tuple(ours for ours in expected if ours not in available),
        unused=unused,
        unused_names=names,
        tokenizer=tokenizer.tokenizer,
        tokenizer_folder=tokenizer.folder,
        new_tokens=tokenizer.new_tokens,
        vision_tower=read.source_config.get("mm_vision_tower") or given_tower,
        tower_folder=read.tower_folder,
        tower_inside=inside,
        tower_beside=bool(
            read.tower_folder and given_tower is None and read.tower_folder == clip.own_tower(read.source)
        ),
    )


# ------------------------------------------------------------------------------------------------------------ checks


def check(
    checkpoint: Checkpoint, base: Checkpoint | None, files: CheckpointFiles, resolved: Resolved, options: LoadOptions
) -> None:
    """Checks that the config, tensors, tokenizer and base belong to the same model. Raises CheckpointError."""
    _check_consistent(checkpoint, len(resolved.tensors))
    if base:
        _check_base(checkpoint, base, files, resolved.tensors, options.force)
    _check_depth(checkpoint, options.force)


def _check_consistent(checkpoint: Checkpoint, n_found: int) -> None:
    config, where = checkpoint.config, checkpoint.path / "config.json"
    if config.vision and config.start_end and checkpoint.tokenizer.id_of("<im_start>") is None:
        raise CheckpointError(
            f"{checkpoint.path}: mm_use_im_start_end is true, but the tokenizer has no <im_start>; put "
            "the tokenizer files from the training run into this folder"
        )
    if config.decoder.n_layers > n_found > 0:
        raise CheckpointError(
            f"{where}: specifies {config.decoder.n_layers} layers, but the files contain only {n_found} tensors; "
            "config.json and the weights belong to different models"
        )


def _check_base(
    checkpoint: Checkpoint,
    base: Checkpoint,
    files: CheckpointFiles,
    found: Mapping[str, LazyTensor],
    force: bool,
) -> None:
    """Checks that the base has the sizes that the LoRA, projector or delta requires."""
    detection = Detection(checkpoint.format, checkpoint.evidence)
    expected, wrong = shapes(checkpoint.config), f"not the base of this {checkpoint.format}"
    for ours in sorted({*found, *expected}):
        has, asked = found[ours].shape if ours in found else None, expected.get(ours)
        if ours.startswith("decoder.") and has != asked and ours != "decoder.head.weight":
            found_and_asked = f"{ours} has shape {_sizes(has)}, but {files.path} needs {_sizes(asked)}"
            raise wrong_base(base.path, found_and_asked, files, detection)
    check_heads(base.config.decoder, checkpoint.config.decoder, base.path, f"{files.path} needs", wrong)
    if checkpoint.format == "delta":
        check_raw(base, checkpoint.config.decoder, force)
    else:
        check_vocabulary(base, checkpoint.config.decoder.vocab_size, files, f"{base.path}: {wrong}", force)


def _sizes(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else " x ".join(map(str, shape))


def _check_depth(checkpoint: Checkpoint, force: bool) -> None:
    """Checks that the model uses every decoder tensor in the checkpoint, except the head of a tied decoder."""
    decoder = checkpoint.config.decoder
    for ours, tensor in checkpoint.unused.items():
        tied_head = decoder.tied and ours == "decoder.head.weight"
        if ours.startswith("decoder.") and not force and not tied_head:
            raise CheckpointError(
                f"{tensor.where}: does not belong to a decoder with {decoder.n_layers} layers; "
                "config.json and the weights belong to different models"
            )


def check_headers(checkpoint: Checkpoint) -> None:
    """Checks that every tensor exists and has the shape that the config requires. Raises CheckpointError."""
    if checkpoint.missing:
        n, first = len(checkpoint.missing), checkpoint.missing[0]
        names = disk_names(first, (*FORMATS[checkpoint.format].rules(checkpoint.config), *clip.RULES))
        which = f"{names[0]} is missing" if n == 1 else f"{n} tensors are missing (the first is {names[0]})"
        raise CheckpointError(f"{checkpoint.path}: {which}; download the checkpoint again")
    expected = shapes(checkpoint.config)
    for name, tensor in checkpoint.tensors.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{tensor.where}: has shape {list(tensor.shape)}, but the config requires {list(expected[name])}; "
                "config.json and the weights belong to different models"
            )
