"""From a folder or hub id to a checkpoint that is understood: its config, and where each of our tensors lies."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.checkpoint import bases, keymap, lone, meta, settings
from llava.checkpoint.config import decoder_sizes, foreign_config, native_config, processor_of, projector_held
from llava.checkpoint.detect import FORMAT_KEY, Choice, Facts, Finding, Kind, choose_template, detect
from llava.checkpoint.files import PROJECTOR_FILE, locate, locate_file, meta_shards, open_weights, read_json, reading
from llava.checkpoint.onbase import ON_BASE, Base, Put, new_tokens, put_on
from llava.checkpoint.settings import ImageMode
from llava.checkpoint.source import Source, Stored
from llava.config import LlavaConfig
from llava.errors import CheckpointError, ConfigError
from llava.formats.tokenizer import has_tokenizer, load_tokenizer
from llava.model.llava import shapes
from llava.preprocess.tokenizer import Tokenizer

SUPPORTED: tuple[Kind, ...] = ("native", "merged", "llama", "mpt", "llava-hf", "meta")
_TABLES = {
    "native": keymap.NATIVE,
    "mpt": keymap.LLAVA_MPT,
    "llava-hf": keymap.LLAVA_HF,
    "meta": keymap.META,
}  # else keymap.LLAVA


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
    spare: dict[str, Source]  # known tensors that this model does not need, under our names
    unused: tuple[str, ...]  # names on disk that this model does not need, those of `spare` included
    tokenizer: Tokenizer
    tokenizer_folder: Path  # where its files lie: the base's, for folders that bring none
    new_tokens: Mapping[str, int]  # that the tokenizer has and those files do not
    vision_tower: str | None  # as config.json names it, or as it was given
    tower_folder: Path | None  # where the tower's config was read, and its weights if they are not inside
    tower_inside: bool  # the folder holds the tower's weights itself

    @property
    def rest_of_tower(self) -> dict[str, Source]:
        """What of the tower lies behind the layer that is read: other readers want it."""
        return {n: s for n, s in self.spare.items() if n.startswith("vision.") and self.config.vision}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Our names and tensors, one at a time, mapped where nothing has to be stacked."""
        for name, source in self.sources.items():
            yield name, source.read()


def look(path: str | Path, revision: str | None = None) -> Facts:
    """Config and headers of a folder or hub id, whatever it is. Raises CheckpointError."""
    if file := locate_file(path, revision=revision):
        return lone.look_at(file)
    folder = locate(path, revision=revision)
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is empty; expected config.json, weights and tokenizer files")
    config = folder / "config.json"
    known = ("config.json", "adapter_config.json", PROJECTOR_FILE)
    if not any((folder / name).is_file() for name in known) and not meta_shards(folder):
        raise CheckpointError(f"{config}: is missing; the folder is not a whole checkpoint")
    weights = open_weights(folder)
    if meta.is_meta(weights):
        return Facts(folder, meta.settings(folder, weights), weights)
    return Facts(folder, read_json(config) if config.is_file() else {}, weights)


def open_checkpoint(
    path: str | Path | Facts,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    vision: bool = True,
    revision: str | None = None,
    image_mode: ImageMode | None = None,
    legacy_strip: bool = False,
    lenient: bool = False,
    fetch_tower: bool = True,
) -> Checkpoint:
    """Reads config, headers and tokenizer; no weights.

    `base`: the language model that a LoRA, a projector or a delta is put on, any folder or hub id that loads by itself.
    `lenient`: tensors that no rule knows are left out instead of refused, and a base that is not the one of a delta is
    warned of. `fetch_tower`: False for looking only, see `find_tower`. Raises CheckpointError, ConfigError.
    """
    facts = path if isinstance(path, Facts) else look(path, revision)
    folder, vision_tower = facts.folder, _lasting(vision_tower) if vision_tower else None
    with reading(folder / "config.json"):
        finding = detect(facts)
        if finding.kind == "llava-hf":
            processor = processor_of(folder)
            image_mode = image_mode or settings.mode_of(facts.settings, processor)
            facts = facts._replace(settings=settings.flat(facts.settings, processor, str(folder)))
    if finding.kind not in (*SUPPORTED, *ON_BASE):
        raise _unsupported(folder, finding)
    if finding.kind in SUPPORTED and not facts.weights:
        raise CheckpointError(f"{folder}: holds no weights; expected model*.safetensors or pytorch_model*.bin")
    under = _open_base(base, facts, finding, legacy_strip=legacy_strip, lenient=lenient)
    described = facts if facts.settings or not under else look(under.folder)  # a LoRA of peft alone has no config.json
    if bare := folder.is_file() and not facts.settings:
        described = facts._replace(settings=lone.seen(facts, vision_tower))
    tokenizer, files, more = _tokenizer(facts, finding.kind, under, legacy_strip)
    put = _on_base(facts, finding.kind, under, tokenizer) if under else _alone(facts, finding.kind)
    if put.unknown and not lenient:
        raise _unknown(put.unknown)
    held = put.sources
    with reading(described.folder / "config.json"):
        if FORMAT_KEY in described.settings:
            config, tower = native_config(described, vision, image_mode), None
        else:
            sizes = under.config.decoder if under and bare else None
            family = under.config.decoder.kind if under else finding.kind
            decoder = decoder_sizes(described, family, held, sizes)
            config, tower = foreign_config(described, decoder, held, vision, vision_tower, image_mode, fetch_tower)
        projector = config.projector or projector_held(held, config)
        kind = "native" if FORMAT_KEY in described.settings else finding.kind
        choice = choose_template(kind, described.settings, config.decoder, projector, tokenizer)
    if put.start_end:
        config = replace(config, start_end=True)
    if under and not has_tokenizer(folder):
        config = replace(config, eos_ids=config.eos_ids or under.config.eos_ids)
    config = replace(config, template=choice.template)
    _refuse_contradiction(config, described.folder, len(held), tokenizer)
    wanted = shapes(config)
    if under:
        _check_base(under, facts, finding, config, held, wanted, lenient)
    every = _of_tower(tower, needed=fetch_tower) | held if tower and "vision.cls" not in held else held
    spare = {ours: source for ours, source in every.items() if ours not in wanted}
    _refuse_half_a_model(spare, config, lenient)
    return Checkpoint(
        folder=folder,
        kind=finding.kind,
        evidence=finding.evidence,
        template=choice,
        config=config,
        sources={ours: every[ours] for ours in wanted if ours in every},
        missing=tuple(ours for ours in wanted if ours not in every),
        spare=spare,
        unused=(*put.unused, *put.unknown, *(name for source in spare.values() for name in source.names)),
        tokenizer=tokenizer,
        tokenizer_folder=files,
        new_tokens=more,
        vision_tower=described.settings.get("mm_vision_tower") or vision_tower,
        tower_folder=tower,
        tower_inside="vision.cls" in held,
    )


def _lasting(place: str | Path) -> str:
    """A hub id, or a folder under a name that holds wherever one stands."""
    return str(Path(place).expanduser().absolute()) if Path(place).expanduser().is_dir() else str(place)


def _unsupported(folder: Path, finding: Finding) -> CheckpointError:
    why = f"{folder}: {finding.kind} ({finding.evidence[0]})"
    if finding.kind == "clip":
        return CheckpointError(f"{why}: a vision tower alone; name it with vision_tower= beside a LLaVA")
    return CheckpointError(f"{why}: this version loads merged LLaVA, plain Llama or MPT and native folders only")


def _unknown(files: Mapping[str, Path]) -> CheckpointError:
    names = list(files)
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return CheckpointError(
        f"{files[names[0]]}: tensors that no LLaVA of this layout has: {', '.join(names[:3])}{rest}; "
        "pass force=True (--force) to leave them out"
    )


def _alone(facts: Facts, kind: Kind) -> Put:
    """A folder that is a model by itself."""
    if kind == "meta":
        return meta.put(facts.folder, facts.weights)
    planned = keymap.plan(facts.weights, _TABLES.get(kind, keymap.LLAVA))
    held: dict[str, Source] = {
        ours: Stored(weights=facts.weights, names=names) for ours, names in planned.sources.items()
    }
    return Put(held, planned.dropped, {name: facts.weights.entries[name].file for name in planned.unknown})


def _open_base(base: str | Path | None, facts: Facts, finding: Finding, **options: Any) -> Checkpoint | None:
    """The language model that this folder is put on; None for a folder that is a model by itself."""
    if finding.kind not in ON_BASE:
        if base is not None:
            raise ConfigError(f"{facts.folder}: {finding.kind} ({finding.evidence[0]}): needs no base; leave base= out")
        return None
    if base is None:
        raise bases.missing_base(facts, finding)
    found = look(locate(base, what="base"))
    with reading(found.folder / "config.json"):
        kind = detect(found).kind
    bases.check_kind(found, kind, kind in SUPPORTED, facts, finding)
    if finding.kind != "delta":
        bases.warn_of_other_name(facts, finding.kind, found)
    return open_checkpoint(found, vision=False, **options)


def _tokenizer(
    facts: Facts, kind: Kind, under: Checkpoint | None, legacy_strip: bool
) -> tuple[Tokenizer, Path, dict[str, int]]:
    """The folder's own or its base's; where its files lie; the tokens that LLaVA adds and those files do not have."""
    files = facts.folder if under is None or has_tokenizer(facts.folder) else under.tokenizer_folder
    files = meta.tokenizer_folder(facts.folder) if kind == "meta" else files
    tokenizer = load_tokenizer(files, legacy_strip=legacy_strip, fast=kind == "llava-hf")
    if under and tokenizer.id_of("<im_start>") is None and (more := new_tokens(kind, facts, tokenizer.size)):
        return load_tokenizer(files, legacy_strip=legacy_strip, more=more), files, more
    return tokenizer, files, {}


def _on_base(facts: Facts, kind: Kind, under: Checkpoint, tokenizer: Tokenizer) -> Put:
    rules = keymap.LLAVA_MPT if under.config.decoder.kind == "mpt" else keymap.LLAVA
    return put_on(kind, facts, Base(under.folder, {**under.spare, **under.sources}, rules), tokenizer)


def _check_base(
    under: Checkpoint,
    facts: Facts,
    finding: Finding,
    config: LlavaConfig,
    held: Mapping[str, Source],
    wanted: Mapping[str, tuple[int, ...]],
    lenient: bool,
) -> None:
    """The base has the sizes that the folder's own config asks for. Raises CheckpointError."""
    kind, wrong = finding.kind, f"not the base of this {finding.kind}"
    for ours in sorted({*held, *wanted}):
        has, asked = held[ours].shape if ours in held else None, wanted.get(ours)
        if ours.startswith("decoder.") and has != asked and ours != "decoder.head.weight":
            raise CheckpointError(
                f"{under.folder}: {ours} has shape {_sizes(has)}, {facts.folder} asks for {_sizes(asked)}: {wrong}, "
                f"which is {bases.words(kind, bases.needed_base(facts, finding))}"
            )
    bases.check_heads(under.config.decoder, config.decoder, under.folder, f"{facts.folder} asks for", wrong)
    if kind == "delta":
        own = under.folder / "config.json"
        recorded = read_json(own) if own.is_file() else {}
        bases.check_raw(under.folder, under.kind, under.config.decoder, config.decoder, recorded, lenient)
    else:
        rows = under.config.decoder.vocab_size, config.decoder.vocab_size
        bases.check_vocabulary(*rows, facts, f"{under.folder}: {wrong}", lenient)


def _refuse_contradiction(config: LlavaConfig, described: Path, n_held: int, tokenizer: Tokenizer) -> None:
    """config.json, weights and tokenizer can be of one model."""
    if config.vision and config.start_end and tokenizer.id_of("<im_start>") is None:
        raise CheckpointError(
            f"{described}: mm_use_im_start_end is on, but the tokenizer has no <im_start>; add its files"
        )
    if config.decoder.n_layers > n_held > 0:
        raise CheckpointError(
            f"{described / 'config.json'}: asks for {config.decoder.n_layers} layers, the files hold {n_held} tensors: "
            "config.json and weights are of different models"
        )


def _sizes(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else " x ".join(map(str, shape))


def _refuse_half_a_model(spare: Mapping[str, Source], config: LlavaConfig, lenient: bool) -> None:
    """A decoder's tensors are all needed, but for the head of a tied one."""
    for ours, source in spare.items():
        if ours.startswith("decoder.") and not lenient and not (config.decoder.tied and ours == "decoder.head.weight"):
            raise CheckpointError(
                f"{source.where}: has no place in a decoder of {config.decoder.n_layers} layers: "
                "config.json and weights are of different models"
            )


def _of_tower(folder: Path, needed: bool) -> dict[str, Source]:
    """The tensors of a CLIP folder."""
    weights = open_weights(folder)
    if not weights and needed:
        raise CheckpointError(f"{folder}: the vision tower's folder holds no weights; name another with vision_tower=")
    planned = keymap.plan(weights, keymap.CLIP)
    if planned.unknown:
        raise _unknown({name: weights.entries[name].file for name in planned.unknown})
    return {ours: Stored(weights=weights, names=names) for ours, names in planned.sources.items()}


def check_headers(checkpoint: Checkpoint) -> None:
    """Every tensor is there and has the shape that the config asks for. Raises CheckpointError."""
    if checkpoint.missing:
        n, first = len(checkpoint.missing), checkpoint.missing[0]
        table = (*_TABLES.get(checkpoint.kind, keymap.LLAVA), *keymap.CLIP)
        names = keymap.disk_names(first, table)
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
