"""Folders that are no model by themselves: a LoRA, a projector, a delta. Put on their base as they are read."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from llava.checkpoint import keymap
from llava.checkpoint.detect import Facts, Kind
from llava.checkpoint.files import ADAPTER_FILES, PROJECTOR_FILE, TRAINED_BESIDE, Weights, read_json, reading
from llava.checkpoint.keymap import Rule
from llava.checkpoint.source import Cut, Mean, Rows, Source, Stored
from llava.checkpoint.sums import Adapted, Adapter, Summed
from llava.errors import CheckpointError
from llava.preprocess.tokenizer import Tokenizer

ON_BASE: tuple[Kind, ...] = ("delta", "lora", "projector")
LENGTHENED = ("decoder.embed.weight", "decoder.head.weight")  # by new tokens


class Base(NamedTuple):
    """What a folder is put on."""

    folder: Path
    sources: Mapping[str, Source]  # all that it holds, by our names
    rules: tuple[Rule, ...]  # names on disk of a LLaVA with this language model


class Put(NamedTuple):
    """A model put together."""

    sources: dict[str, Source]
    unused: tuple[str, ...]  # names on disk that are known and not needed
    unknown: dict[str, Path]  # names on disk that no rule knows, and their files
    start_end: bool = False  # rows of <im_start> and <im_end> came with it


def put_on(kind: Kind, facts: Facts, base: Base, tokenizer: Tokenizer) -> Put:
    """`tokenizer`: of the result. Raises CheckpointError where folder and base can not belong together."""
    if kind == "lora":
        return _lora(facts.folder, base)
    if kind == "projector":
        return _projector(_projector_file(facts.folder), base, tokenizer)
    return _delta(facts.weights, base)


def new_tokens(kind: Kind, facts: Facts, first: int) -> dict[str, int]:
    """Tokens around a picture and their ids, for a tokenizer of ids below `first`, where rows of them were trained."""
    if kind == "projector":
        trained = set(_TABLES) & set(_after_projector(Weights([_projector_file(facts.folder)])))
        return {name: first + i for i, name in enumerate(_AROUND if trained else ())}
    extra = facts.folder / TRAINED_BESIDE
    if kind == "lora" and facts.settings.get("mm_use_im_start_end") and extra.is_file():
        weights = Weights([extra])
        rows = [weights.entries[name].shape[0] for name in weights if name.endswith(_TABLES)]
        names = {2: _AROUND, 3: ("<im_patch>", *_AROUND)}.get(max(rows, default=0) - first, ())
        return {name: first + i for i, name in enumerate(names)}
    return {}


_AROUND = ("<im_start>", "<im_end>")
_TABLES = ("embed_tokens.weight", "wte.weight")


# ---------------------------------------------------------------------------------------------------- LoRA


def _lora(folder: Path, base: Base) -> Put:
    """PEFT's adapter is added to the base's matrices; what was trained besides takes the place of the base's own."""
    extra = folder / TRAINED_BESIDE
    plain = _taken(Weights([extra] if extra.is_file() else []), _unwrapped, base.rules)
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: holds no {' or '.join(ADAPTER_FILES)}; fetch the LoRA again")
    pairs, saved = _pairs(Weights([file]), base.rules)
    sources = {**base.sources, **plain.sources, **saved.sources}
    scale = _scale(folder / "adapter_config.json")
    adapters: dict[str, list[Adapter]] = {}
    for name, pair in pairs.items():
        ours, adapter = _adapter(name, pair, scale, sources, base, file)
        adapters.setdefault(ours, []).append(adapter)
    sources |= {ours: Adapted(sources[ours], parts) for ours, parts in adapters.items()}
    return Put(sources, plain.unused + saved.unused, plain.unknown | saved.unknown)


def _pairs(weights: Weights, rules: tuple[Rule, ...]) -> tuple[dict[str, dict[str, Source]], Put]:
    """A and B by the name of the matrix that they are added to; and tensors that PEFT saved whole (modules_to_save)."""
    pairs: dict[str, dict[str, Source]] = {}
    whole: dict[str, str] = {}
    for plain, name in _unwrapped(weights).items():
        if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", plain):
            pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = _whole(weights, name)
        else:
            whole[re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", plain)] = name
    return pairs, _taken(weights, lambda _: whole, rules)


def _scale(file: Path) -> Callable[[str, int], float]:
    """The factor of B @ A by name and rank. Raises CheckpointError for kinds of LoRA that this is not."""
    config = read_json(file)
    for key in ("fan_in_fan_out", "use_dora", "layer_replication", "lora_bias", "use_qalora"):
        if config.get(key):
            raise CheckpointError(f"{file}: {key} is {config[key]!r}, which is not supported; merge it with peft first")
    if str(start := config.get("init_lora_weights")).lower().startswith(_CHANGE_THE_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}: it belongs to a base that its own start changed; save it with "
            "peft's path_initial_model_for_weight_conversion, or merge it with peft"
        )
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise CheckpointError(f"{file}: peft_type is {kind!r}; expected LORA")
    with reading(file):
        usual, rooted = float(config["lora_alpha"]), bool(config.get("use_rslora"))
        own = {str(key): float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()}
    for key in own:
        try:
            re.compile(_named(key))
        except re.error as error:
            raise CheckpointError(f"{file}: alpha_pattern: {key!r} is no pattern ({error}); fetch it again") from None

    def scale(name: str, r: int) -> float:
        module = name.removesuffix(".weight")
        alpha = next((own[key] for key in own if re.fullmatch(_named(key), module)), usual)
        return alpha / (r**0.5 if rooted else r)

    return scale


_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of peft's init_lora_weights


def _named(key: str) -> str:
    """A key of alpha_pattern: the end of a module's name."""
    return rf"(.*\.)?({key})"


def _adapter(
    name: str,
    pair: dict[str, Source],
    scale: Callable[[str, int], float],
    under: Mapping[str, Source],
    base: Base,
    file: Path,
) -> tuple[str, Adapter]:
    """One pair, and our tensor that it belongs to."""
    if missing := {"A", "B"} - set(pair):
        raise CheckpointError(f"{file}: has no lora_{missing.pop()} for {name}; fetch the LoRA again")
    place, a, b = keymap.place(name, base.rules), pair["A"], pair["B"]
    if place is None or place.ours not in under:
        raise CheckpointError(f"{file}: adapts {name}, which {base.folder} does not hold; give the LoRA's own base")
    held = under[place.ours].shape
    if not len(held) == len(a.shape) == len(b.shape) == 2:
        raise CheckpointError(f"{file}: adapts {name}, which is no matrix; only matrices take a LoRA here")
    rows, columns = held
    # q, k and v lie under each other; k and v are of one height, which q exceeds where heads share them
    first = rows - (place.of - place.part) * b.shape[0] if place.part else 0
    high = place.of * b.shape[0] <= rows if place.part else b.shape[0] <= rows <= place.of * b.shape[0]
    if a.shape[1] != columns or a.shape[0] != b.shape[1] or not high:
        raise CheckpointError(
            f"{file}: adapts {name} by {b.shape[0]} x {a.shape[1]} values, {base.folder} holds it in {rows} x {columns}"
            f"{' with its neighbours' * (place.of > 1)}: not the base that this LoRA was trained from"
        )
    return place.ours, Adapter(first, a, b, scale(name, a.shape[0]))


def _unwrapped(names: Weights) -> dict[str, str]:
    """Names without what PEFT's and DeepSpeed's wrappers put in front, and with it."""
    return {re.sub(_WRAPPERS, "", name): name for name in names}


_WRAPPERS = r"^(?:(?:base_model|module|_forward_module)\.|model\.(?=(?:model|module|transformer|lm_head)\.))+"


# ----------------------------------------------------------------------------------------------- projector


def _projector(file: Path, base: Base, tokenizer: Tokenizer) -> Put:
    """The projector beside its language model, and rows of <im_start> and <im_end> where they were trained."""
    put = _taken(Weights([file]), _after_projector, _BESIDE)
    rows = put.sources.pop("decoder.embed.weight", None)
    sources = {**base.sources, **put.sources}
    if rows is not None:
        sources |= _with_tokens(rows, base, tokenizer, file)
    return put._replace(sources=sources, start_end=rows is not None)


def _projector_file(folder: Path) -> Path:
    return folder if folder.is_file() else folder / PROJECTOR_FILE


def _with_tokens(rows: Source, base: Base, tokenizer: Tokenizer, file: Path) -> dict[str, Source]:
    """The table with the last two of `rows` in the two tokens' places; a head that is too short goes on with means."""
    start, end = tokenizer.id_of("<im_start>"), tokenizer.id_of("<im_end>")
    if start is None or end != start + 1:
        raise CheckpointError(
            f"{file}: holds rows of <im_start> and <im_end>, which the tokenizer does not have as its last two; "
            "put the tokenizer files of that training into the folder"
        )
    embed = base.sources["decoder.embed.weight"]
    if len(rows.shape) != 2 or rows.shape[0] < len(_AROUND) or rows.shape[1:] != embed.shape[1:]:
        raise CheckpointError(
            f"{file}: holds rows of tokens in shape {list(rows.shape)}, {base.folder} has a table of "
            f"{list(embed.shape)}: not the base that they were trained with"
        )
    made: dict[str, Source] = {}
    for name in LENGTHENED:
        if (table := base.sources.get(name)) is None:
            continue  # a tied head
        if table.shape != embed.shape:
            raise CheckpointError(f"{table.where}: has shape {list(table.shape)}, {embed.where} {list(embed.shape)}")
        if (more := end + 1 - table.shape[0]) > 0:
            table = Rows(table, Mean(table, more), table.shape[0])
        made[name] = table
    made["decoder.embed.weight"] = Rows(
        made["decoder.embed.weight"], Cut(rows, rows.shape[0] - 2, rows.shape[0]), start
    )
    return made


_BESIDE = (
    *keymap.VISION,
    Rule("embed_tokens.weight", "decoder.embed.weight"),
    Rule("wte.weight", "decoder.embed.weight"),  # MPT's
)


def _after_projector(names: Iterable[str]) -> dict[str, str]:
    """Prefixes differ from file to file; what follows `mm_projector.` does not."""
    return {re.sub(r"^.*?(mm_projector\.|embed_tokens\.|wte\.|image_newline)", r"\1", name): name for name in names}


# --------------------------------------------------------------------------------------------------- delta


def _delta(weights: Weights, base: Base) -> Put:
    """Differences are added in the delta's type; what the base has not, rows of new tokens too, stands for itself."""
    put = _taken(weights, _as_they_are, base.rules)
    decoder = {ours for ours in (*put.sources, *base.sources) if ours.startswith("decoder.")}
    for ours in sorted(decoder):
        delta, own = put.sources.get(ours), base.sources.get(ours)
        if delta is None or own is None or not fits(ours, delta, own):
            wanted, found = (list(source.shape) if source else "none" for source in (delta, own))
            raise CheckpointError(
                f"{base.folder}: holds {ours} in shape {found}, the delta is one of shape {wanted}: "
                "not the base that it was taken to"
            )
        put.sources[ours] = Summed(delta, own, delta.dtype)
    return put


def fits(ours: str, longer: Source, base: Source) -> bool:
    """Of one shape, but that new tokens lengthen a table."""
    rows, own = longer.shape[:1], base.shape[:1]  # empty for a single number
    same_rows = rows == own or (ours in LENGTHENED and rows > own)
    return same_rows and longer.shape[1:] == base.shape[1:]


def _as_they_are(names: Weights) -> dict[str, str]:
    return {name: name for name in names}


# ----------------------------------------------------------------------------------------------------- all


def _taken(weights: Weights, renamed: Callable[[Weights], dict[str, str]], rules: tuple[Rule, ...]) -> Put:
    """Tensors of a file under our names."""
    given = renamed(weights)
    planned = keymap.plan(given, rules)
    sources: dict[str, Source] = {}
    for ours, names in planned.sources.items():
        for name in names:
            _whole(weights, given[name])
        sources[ours] = Stored(weights=weights, names=tuple(given[name] for name in names))
    unknown = {given[name]: weights.entries[given[name]].file for name in planned.unknown}
    return Put(sources, tuple(given[name] for name in planned.dropped), unknown)


def _whole(weights: Weights, name: str) -> Source:
    """A tensor that holds values: training with ZeRO-3 may leave empty ones behind."""
    entry = weights.entries[name]
    if not entry.n_values:
        raise CheckpointError(
            f"{entry.file}: {name} is empty, as ZeRO-3 leaves it where it was not gathered; save the training again"
        )
    return Stored(weights=weights, names=(name,))
