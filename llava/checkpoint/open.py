"""Resolves a checkpoint in stages: detect → resolve_base → read_tokenizer → resolve_tensors → read_config → check.

Reads config, headers and tokenizer, but no weights.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from llava.checkpoint.base_check import check_base_before_download
from llava.checkpoint.consistency import Opened, check, check_not_wrapped
from llava.checkpoint.detect import UNKNOWN, choose_template, detect, no_weights, read_files
from llava.config import LlavaConfig, LoadOptions
from llava.errors import CheckpointError, ConfigError, counted
from llava.formats import FORMATS, clip
from llava.formats.base_model import (
    NoBaseError,
    check_base_format,
    warn_if_recorded_otherwise,
)
from llava.formats.format import Checkpoint, CheckpointFiles, Detection, Format, ReadConfig, Resolved
from llava.formats.multimodal import projector_in
from llava.formats.quantized import check_floating, check_not_quantized
from llava.formats.recorded_base import find_recorded_base
from llava.formats.tokenizer import has_tokenizer, load_tokenizer
from llava.model.llava import shapes
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.files import parsing
from llava.tensors.hub import absolute_if_local, locate
from llava.tensors.lazy import LazyTensor, same_values

log = logging.getLogger(__name__)


def open_checkpoint(source: str | Path | CheckpointFiles, options: LoadOptions | None = None) -> Checkpoint:
    """Resolves a checkpoint given as a folder, a hub id, or files already read. Raises CheckpointError, ConfigError."""
    options = options or LoadOptions()
    opened = open_unchecked(source, options)
    check(opened, options)
    return opened.checkpoint


def open_unchecked(source: str | Path | CheckpointFiles, options: LoadOptions) -> Opened:
    """Like `open_checkpoint`, but does not check that config, tensors, tokenizer and base belong together."""
    options = _with_absolute_tower(options)
    if options.base is not None and not isinstance(source, CheckpointFiles):
        check_base_before_download(options.base, source, options.revision)
    files = source if isinstance(source, CheckpointFiles) else read_files(source, options.revision)
    detection = detect(files)
    format = FORMATS.get(detection.format)
    if format is None:
        check_not_wrapped(files)
    if format is None or not format.reads:
        raise _unsupported(files, detection)
    check_not_quantized(files)
    if not format.needs_base:
        check_not_wrapped(files)
    base = resolve_base(files, detection, format, options)
    tokenizer = read_tokenizer(files, format, base, options)
    resolved = resolve_tensors(files, format, base, tokenizer.tokenizer, options)
    read = read_config(files, format, base, resolved, options)
    checkpoint = _assemble(files, detection, base, tokenizer, resolved, read, options)
    return Opened(checkpoint, files, base, resolved)


def _with_absolute_tower(options: LoadOptions) -> LoadOptions:
    """Makes a local tower path absolute, so that it remains valid when it is written to a converted checkpoint."""
    tower = options.vision_tower
    return replace(options, vision_tower=absolute_if_local(tower)) if tower else options


def _unsupported(files: CheckpointFiles, detection: Detection) -> CheckpointError:
    if detection.format == UNKNOWN and not files.weights:
        return no_weights(files.path)
    if detection.format == UNKNOWN:
        return CheckpointError(
            f"{files.path}: has no tensors of a known format; the first is {next(iter(files.weights))}; a Llama has "
            "model.embed_tokens.weight; if model. is missing, save the model together with its language model head"
        )
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
    """Maps our tensor names to their sources in the checkpoint and its base, without `options.ignore_tensors`.

    Raises CheckpointError if there are no weights, or if they are quantized.
    """
    if not format.needs_base and not files.weights:
        raise no_weights(files.path)
    resolved = format.resolve(files, base, tokenizer)
    if options.ignore_tensors:
        resolved = _without(resolved, options.ignore_tensors, files.path)
    check_floating(resolved.tensors)
    return resolved


def _without(resolved: Resolved, patterns: tuple[str, ...], path: Path) -> Resolved:
    """Leaves out the tensors whose on-disk names match one of `patterns`, and logs a warning that names them."""
    on_disk = {name: {ours} for ours, tensor in resolved.tensors.items() for name in tensor.names}
    left_out = {
        pattern: {name for name in (*on_disk, *resolved.unknown) if fnmatchcase(name, pattern)} for pattern in patterns
    }
    if unmatched := [pattern for pattern, names in left_out.items() if not names]:
        raise ConfigError(f"ignore_tensors: {path} contains no tensor that matches {unmatched[0]!r}")
    names = sorted(set().union(*left_out.values()))
    log.warning(
        "%s: %s ignored as requested: %s; the model no longer computes what its files describe",
        path, counted(len(names), "tensor"), clip.some(names),
    )  # fmt: skip
    ours = set().union(*(on_disk.get(name, set()) for name in names))
    return resolved._replace(
        tensors={name: tensor for name, tensor in resolved.tensors.items() if name not in ours},
        unknown={name: file for name, file in resolved.unknown.items() if name not in names},
        dropped=(*resolved.dropped, *names),
    )


def read_config(
    files: CheckpointFiles, format: Format, base: Checkpoint | None, resolved: Resolved, options: LoadOptions
) -> ReadConfig:
    """Reads the model's config, completed with values from the tensors and the base."""
    with parsing(files.config_file if files.config or not base else base.path / "config.json"):
        read = format.read_config(files, resolved.tensors, base, options)
    config = _untied_if_stored(read.config, resolved.tensors)
    if resolved.start_end:
        config = replace(config, start_end=True)
    if base and not has_tokenizer(files.path):
        config = replace(config, eos_ids=config.eos_ids or base.config.eos_ids)
    return read._replace(config=config)


def _untied_if_stored(config: LlavaConfig, tensors: Mapping[str, LazyTensor]) -> LlavaConfig:
    """Returns the config of an untied decoder if the files contain a head that differs from the embedding table.

    Transformers 5 decides in the same way; earlier versions ignore the head.
    """
    head, embed = tensors.get("decoder.head.weight"), tensors.get("decoder.embed.weight")
    if not config.decoder.tied or head is None or embed is None or same_values(head, embed):
        return config
    if config.decoder.kind == "mpt":
        raise CheckpointError(
            f"{head.where}: differs from the embedding table, which is the head of every MPT model; "
            f"pass ignore_tensors= (--ignore-tensors {head.names[0]}) to use the table"
        )
    log.warning("%s: differs from the embedding table, so it is used, although tie_word_embeddings is true", head.where)
    return replace(config, decoder=replace(config.decoder, tied=False))


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
