"""Which rows of the zoo a folder is: what its files say against what the rows say."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llava.checkpoint import zoo
from llava.checkpoint.detect import Facts, Finding, detect
from llava.checkpoint.files import reading
from llava.checkpoint.traits import SIZES, Traits, recorded_name, traits_of
from llava.checkpoint.zoo import Entry


class _Sizes(NamedTuple):
    width: int
    layers: int
    kv_heads: int


_SIZES = {  # of the zoo's language models, by architecture and size
    ("llama", "7b"): _Sizes(4096, 32, 32),
    ("llama", "13b"): _Sizes(5120, 40, 40),
    ("llama", "34b"): _Sizes(7168, 60, 8),  # Yi
    ("mistral", "7b"): _Sizes(4096, 32, 8),
    ("mpt", "7b"): _Sizes(4096, 32, 32),
}
_NUMBERS = {"positions": "max_position_embeddings", "eps": "rms_norm_eps", "vocabulary": "vocab_size"}


@dataclass(frozen=True)
class Match:
    """A row beside a folder: the lines in which they agree, and what differs, in words."""

    entry: Entry
    agrees: list[str]
    differs: dict[str, str]

    @property
    def same_family(self) -> bool:
        """Whether sizes alone differ."""
        return set(self.differs) <= set(SIZES)


@dataclass(frozen=True)
class Identity:
    """What was seen of a folder and the rows that it can be, the likeliest first; none: the nearest ones."""

    traits: Traits
    candidates: list[Match]
    nearest: list[Match]

    @property
    def family(self) -> list[Match]:
        """The candidates; else nearest rows from which sizes alone tell the folder apart, as of a scaled-down one."""
        return self.candidates or [match for match in self.nearest if match.same_family]


def identify(facts: Facts, finding: Finding | None = None) -> Identity:
    """Compares a folder with every row. Raises CheckpointError where its files can not be read."""
    with reading(Path(facts.folder) / "config.json"):
        found = traits_of(facts, finding or detect(facts))
    matches = [_compare(found, entry) for entry in zoo.entries()]
    exact = [match for match in matches if not match.differs]
    exact.sort(key=lambda match: -len(match.agrees))
    alike = [match for match in matches if "format" not in match.differs] or matches
    best = min(map(_distance, alike))
    return Identity(found, exact, [] if exact else [match for match in alike if _distance(match) == best])


def _distance(match: Match) -> tuple[int, int]:
    return len(match.differs), -len(match.agrees)


def _compare(found: Traits, entry: Entry) -> Match:
    agrees, differs = [], {}
    for name, wanted in row_traits(entry).items():
        if (trait := found.get(name)) is None:
            continue
        equal = _equal(name, trait.value, wanted)
        if equal:
            agrees.append(trait.seen)
        elif equal is not None:
            differs[name] = f"{trait.seen}; the row has {_shown(wanted)}"
    return Match(entry, agrees, differs)


def _equal(name: str, value: Any, wanted: Any) -> bool | None:
    """None: this says nothing, as the name of a base that no row knows."""
    if name == "base":
        known = recorded_name(str(value))
        other = known in known_starts() or re.fullmatch(
            r"[\w-][\w.-]*/[\w.-]+", str(value)
        )  # a folder's path may be any
        return known == recorded_name(wanted) or (False if other else None)
    if name == "added tokens":
        return dict(value) == dict(wanted)
    return bool(value == wanted)


def known_starts() -> dict[str, str]:
    """Hub ids of the language models that rows were trained from, by their names for comparing."""
    return {recorded_name(base): base for entry in zoo.entries() if (base := start_id(entry))}


def licence_of_base(name: str) -> str | None:
    """The note on the licence of a recorded base; None where no row was trained from it."""
    rows = (entry for entry in zoo.entries() if recorded_name(start_id(entry) or "") == recorded_name(name))
    return next((zoo.licence(entry) for entry in rows), None)


def start_id(entry: Entry) -> str | None:
    """The hub id of the language model that the row was trained from."""
    named = zoo.origin(entry).get("trained_from") or entry.get("base_llm_repo")
    return zoo.base_id({"base_llm_repo": named}) if named else None


def row_traits(entry: Entry) -> dict[str, Any]:
    """What a row says, by the names of `traits.py`; what it leaves open is absent."""
    start = zoo.origin(entry)
    rows: dict[str, Any] = {"format": entry["format"]} | _sizes(start)
    for name, key in _NUMBERS.items():
        value = entry.get(key, start.get(key))
        if isinstance(value, int | float):
            rows[name] = value
    if "projector" in start:
        rows["projector"] = start["projector"]["type"]
    if entry["format"] == "hf-reexport":
        theta = {"rope theta": start["rope_theta"]} if "rope_theta" in start else {}
        return rows | theta | {"aspect": start["image_aspect_ratio"], "image size": _pixels(start)}
    return rows | _own(entry)


def _sizes(start: Entry) -> dict[str, Any]:
    architecture = start.get("llm_arch", "llama")
    sizes = _SIZES[architecture, start["size"]]
    rows: dict[str, Any] = {"architecture": "mpt" if architecture == "mpt" else "llama"}
    if architecture != "mpt":
        rows["key/value heads"] = sizes.kv_heads
    return rows | {"width": sizes.width, "layers": sizes.layers}


def _pixels(entry: Entry) -> int:
    return 336 if "336" in entry["vision_tower"] else 224


def _own(entry: Entry) -> dict[str, Any]:
    """What rows in the original's layouts say besides."""
    rows: dict[str, Any] = {"image size": _pixels(entry)}
    if "image_aspect_ratio" in entry:
        aspect = entry["image_aspect_ratio"]
        rows["aspect"] = "square" if aspect.startswith("absent") else aspect
    if "image_tokens" in entry:
        rows["start/end tokens"] = entry["image_tokens"]["mm_use_im_start_end"]
    if isinstance(inside := entry.get("vision_tower_in_checkpoint"), bool) and entry["format"] in ("merged", "delta"):
        rows["tower inside"] = inside
    if entry["format"] in ("merged", "delta") and _tokens_by_id(entry):
        rows["added tokens"] = entry["added_tokens"]
    if "lora" in entry:
        rows["rank"] = entry["lora"]["r"]
    if entry["format"] in ("lora", "projector"):
        rows["base"] = start_id(entry)
    if entry["format"] == "projector":
        rows["token rows"] = bool(entry.get("embed_tokens_rows"))
    return rows | {name: entry[key] for name, key in _SOMETIMES.items() if key in entry}


_SOMETIMES = {"rope theta": "rope_theta", "merge": "mm_patch_merge_type"}


def _tokens_by_id(entry: Entry) -> bool:
    return all(isinstance(id, int) for id in entry.get("added_tokens", {}).values())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
