"""Finds the catalogue entries that match a checkpoint by comparing its fingerprint with every entry."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava.formats.base_model import comparable_name
from llava.formats.format import CheckpointFiles, Detection
from llava.tensors.files import parsing
from llava.zoo import catalogue
from llava.zoo.catalogue import Entry
from llava.zoo.fingerprint import SIZES, Fingerprint, fingerprint


class _Sizes(NamedTuple):
    width: int
    layers: int
    kv_heads: int


_SIZES = {  # sizes of the published language models, by architecture and parameter count
    ("llama", "7b"): _Sizes(4096, 32, 32),
    ("llama", "13b"): _Sizes(5120, 40, 40),
    ("llama", "34b"): _Sizes(7168, 60, 8),  # Yi
    ("mistral", "7b"): _Sizes(4096, 32, 8),
    ("mpt", "7b"): _Sizes(4096, 32, 32),
}
_NUMBERS = {"positions": "max_position_embeddings", "eps": "rms_norm_eps", "vocabulary": "vocab_size"}


@dataclass(frozen=True)
class Match:
    """Result of comparing an entry with a checkpoint: evidence of agreement, and a description of each difference."""

    entry: Entry
    agrees: list[str]
    differs: dict[str, str]

    @property
    def same_family(self) -> bool:
        """Whether the checkpoint differs from the entry only in sizes."""
        return set(self.differs) <= set(SIZES)


@dataclass(frozen=True)
class Matches:
    """A checkpoint's fingerprint and the matching entries, most likely first, or the nearest entries if none match."""

    fingerprint: Fingerprint
    candidates: list[Match]
    nearest: list[Match]

    @property
    def family(self) -> list[Match]:
        """The candidates or, if there are none, the nearest entries that differ from the checkpoint only in sizes."""
        return self.candidates or [near for near in self.nearest if near.same_family]


def match(files: CheckpointFiles, detection: Detection) -> Matches:
    """Compares a checkpoint with every entry. Raises CheckpointError if its files cannot be read."""
    with parsing(files.config_file):
        found = fingerprint(files, detection)
    matches = [_compare(found, entry) for entry in catalogue.entries()]
    exact = [one for one in matches if not one.differs]
    exact.sort(key=lambda one: -len(one.agrees))
    same_format = [one for one in matches if "format" not in one.differs] or matches
    best = min(map(_distance, same_format), default=None)
    return Matches(found, exact, [] if exact else [one for one in same_format if _distance(one) == best])


def _distance(match: Match) -> tuple[int, int]:
    return len(match.differs), -len(match.agrees)


def _compare(found: Fingerprint, entry: Entry) -> Match:
    agrees, differs = [], {}
    for name, wanted in entry_fingerprint(entry).items():
        if (fact := found.get(name)) is None:
            continue
        equal = _equal(name, fact.value, wanted)
        if equal:
            agrees.append(fact.evidence)
        elif equal is not None:
            # these two are inferred, so their evidence does not state the value
            value = f"{name} {_format(fact.value)}: " if name in ("format", "architecture") else ""
            differs[name] = f"{value}{fact.evidence}; the entry has {_format(wanted)}"
    return Match(entry, agrees, differs)


def _equal(name: str, value: Any, wanted: Any) -> bool | None:
    """Returns whether two values agree, or None if undecidable, e.g. if a base is recorded as an unknown local path."""
    if name == "base":
        known = comparable_name(str(value))
        # a mismatch is conclusive only for a known base or a hub id, not for a local path
        other = known in known_bases() or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(value))
        return known == comparable_name(wanted) or (False if other else None)
    if name == "added tokens":
        return dict(value) == dict(wanted)
    return bool(value == wanted)


def known_bases() -> dict[str, str]:
    """Returns a mapping (comparable name -> hub id) of all language models that entries were trained from."""
    return {comparable_name(base): base for entry in catalogue.entries() if (base := trained_from(entry))}


def licence_of_base(name: str) -> str | None:
    """Returns the licence note for the base model called `name`, or None if no entry was trained from it."""
    entries = (
        entry for entry in catalogue.entries() if comparable_name(trained_from(entry) or "") == comparable_name(name)
    )
    return next((catalogue.licence(entry) for entry in entries), None)


def trained_from(entry: Entry) -> str | None:
    """Returns the hub id of the language model that the entry was trained from, if known."""
    named = catalogue.origin(entry).get("trained_from") or entry.get("base_llm_repo")
    return catalogue.base_id({"base_llm_repo": named}) if named else None


def entry_fingerprint(entry: Entry) -> dict[str, Any]:
    """Returns the facts recorded in an entry, keyed as in `fingerprint`. Facts that are not recorded are omitted."""
    start = catalogue.origin(entry)
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
    """Returns the remaining facts recorded in an entry that is not a Hugging Face re-export."""
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
        rows["base"] = trained_from(entry)
    if entry["format"] == "projector":
        rows["token rows"] = bool(entry.get("embed_tokens_rows"))
    return rows | {name: entry[key] for name, key in _IF_STATED.items() if key in entry}


_IF_STATED = {"rope theta": "rope_theta", "merge": "mm_patch_merge_type"}


def _tokens_by_id(entry: Entry) -> bool:
    return all(isinstance(id, int) for id in entry.get("added_tokens", {}).values())


def _format(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
