"""The catalogue of published LLaVA checkpoints, `zoo.json`, and the commands to download and use an entry.

An entry is a JSON object from zoo.json. This module does not read checkpoints; `match.py` compares them with entries.
"""

import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any, NamedTuple

from llava.errors import ConfigError

Entry = Mapping[str, Any]
OTHERS = "Not in the zoo's tables"  # heading for entries not listed in any table
_DATA = ("pretrain_data", "finetune_data")
FORMAT_WORDS = {"llava": "merged", "llava-hf": "hf-reexport"}  # our name of a format -> the catalogue's


@functools.cache
def _catalogue() -> dict[str, Any]:
    text = (resources.files("llava.zoo") / "zoo.json").read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)
    return values


def entries() -> list[dict[str, Any]]:
    """Returns all entries: first those in the zoo's tables, in table order, then those not listed in any table."""
    return [*_catalogue()["entries"], *_catalogue()["extra_entries"]]


def select(
    *,
    base_llm: str | None = None,
    format: str | None = None,
    vision_encoder: str | None = None,
    data: str | None = None,
) -> list[dict[str, Any]]:
    """Returns the entries whose fields contain the given strings, ignoring case. A value of None matches any entry.

    format: may also be one of our names for a format. Raises ConfigError if there are no entries of this format at all.
    """
    if format is not None:
        format = FORMAT_WORDS.get(format.lower(), format)
        known = sorted({str(entry["format"]) for entry in entries()})
        if not _holds(known, format):
            ours = ", ".join(f"{word} for {name}" for word, name in FORMAT_WORDS.items())
            raise ConfigError(f"format is {format!r}; expected one of {', '.join(known)} (or {ours})")

    def fits(entry: Entry) -> bool:
        encoder = entry.get("vision_encoder") or entry.get("vision_tower")
        return (
            _holds([entry.get("base_llm")], base_llm)
            and _holds([entry["format"]], format)
            and _holds([encoder], vision_encoder)
            and _holds([entry.get(key) for key in _DATA], data)
        )

    return [entry for entry in entries() if fits(entry)]


def _holds(cells: Iterable[str | None], text: str | None) -> bool:
    return text is None or any(text.lower() in cell.lower() for cell in cells if cell)


def find(name: str) -> dict[str, Any]:
    """Finds an entry by its id or the last component of its id. Raises ConfigError unless exactly one entry matches."""
    names = {entry["id"]: entry for entry in entries()}
    if name in names:
        return names[name]
    wanted = name.lower()
    found = [entry for id, entry in names.items() if wanted in (id.lower(), *_short(id.lower()))]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{name}: ambiguous; specify one of {', '.join(entry['id'] for entry in found)}")
    near = [id for id in names if wanted and wanted in id.lower()][:5]
    shorts = {short: id for id in names for short in (id.lower(), *_short(id.lower()))}
    near = near or list(dict.fromkeys(shorts[hit] for hit in difflib.get_close_matches(wanted, shorts, 4, 0.5)))
    hint = f"similar ids: {', '.join(near)}" if near else "run llava zoo to list all entries"
    raise ConfigError(f"{name}: no such entry in the zoo; {hint}")


def _short(id: str) -> list[str]:
    """Returns the last component of an id, with and without the suffix .bin."""
    last = re.split("[/#]", id)[-1]
    return [last, last.removesuffix(".bin")]


class Table(NamedTuple):
    """One of the zoo's tables. Each line consists of an entry's id and the cells of its row."""

    title: str
    columns: list[str]
    lines: list[list[str]]


def tables(chosen: Iterable[Entry]) -> Iterator[Table]:
    """Groups the chosen entries by the newest table that lists them; unlisted entries come last."""
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for entry in chosen:
        rows = entry.get("source_rows")
        title = rows[-1]["table"].split(": ", 1)[-1] if rows else OTHERS
        groups.setdefault(title, []).append((entry["id"], rows[-1]["cells"] if rows else _outside(entry)))
    for title in sorted(groups, key=lambda title: title == OTHERS):
        columns = list(dict.fromkeys(column for _, cells in groups[title] for column in cells))
        lines = [[id, *(_text(cells.get(column)) for column in columns)] for id, cells in groups[title]]
        yield Table(title, columns, lines)


def _outside(entry: Entry) -> dict[str, Any]:
    """Returns the cells for an entry that is not listed in any table."""
    return {
        "Format": entry["format"],
        "Size": entry.get("size") or find(entry["reexport_of"])["size"],
        "Made from": entry.get("reexport_of") or entry.get("base_llm"),
        "Class": entry.get("model_class"),
        "Vocabulary": entry.get("vocab_size"),
    }


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell)


# ------------------------------------------------------------------------------------------------ using an entry


def origin(entry: Entry) -> Entry:
    """Returns the original of a re-exported entry. Any other entry is returned unchanged."""
    return find(entry["reexport_of"]) if "reexport_of" in entry else entry


def base_id(entry: Entry) -> str | None:
    """Returns the hub id of the base model that the entry needs, or None if no base is needed.

    For a base under Meta's licence, the id refers to a repository with the base in Hugging Face format. Vicuna v0 was
    published only as a delta, so the id of the delta is returned.
    """
    named = entry.get("base_llm_repo")
    if not named:
        return None
    if match := re.fullmatch(r"(\S+/\S+) \((v[\d.]+)\)", named):  # lmsys/vicuna-7b (v1.1)
        repo, version = match.groups()
        return f"{repo}-delta-v0" if version == "v0" else f"{repo}-{version}"
    match = re.search(r"[\w.-]+/[\w.-]+", named.replace("LLaMA-1", ""))
    return match[0] if match else str(named)


def base_words(entry: Entry) -> str | None:
    """Describes the base model that the entry needs, if any. A delta needs raw LLaMA, so the text rules out Vicuna."""
    id = base_id(entry)
    if entry["format"] == "delta":
        return f"the raw LLaMA-1 {entry['size'].upper()} in Hugging Face format (e.g. {id}; not Vicuna)"
    return id


def licence(entry: Entry) -> str:
    """Returns the licence note for the entry's language model."""
    start = origin(entry)
    if (note := start.get("license_note")) not in (None, _NO_DETAILS):
        return str(note)
    notes = (
        other["license_note"]
        for other in entries()
        if other.get("license_note") not in (None, _NO_DETAILS) and _model(other) == _model(start)
    )
    return ": ".join([f"{_NO_DETAILS}, {start['base_llm']}", *list(notes)[:1]])


_NO_DETAILS = "base LLM licence"  # `license_note` of entries that do not specify the licence


def _model(entry: Entry) -> str:
    """Returns the normalised name of the language model, without its size."""
    return (
        re.sub(r"[^a-z0-9.]|\d+b\b", "", str(entry["base_llm"]).lower().replace("-", " "))
        if "base_llm" in entry
        else ""
    )


def tower(entry: Entry) -> str | None:
    """Returns the hub id of the vision tower that the entry needs, or None if the entry includes the tower."""
    inside = entry["format"] == "hf-reexport" or entry.get("vision_tower_in_checkpoint") is True
    return None if inside else entry["vision_tower"]


def commands(entry: Entry) -> list[tuple[str, str]]:
    """Returns (purpose, command) pairs for the entry. The purposes are fetch, base, merge, ask and convert."""
    repo, file = entry.get("repo", entry["id"].split("#")[0]), entry.get("file")
    folder = repo.split("/")[-1]
    given = f"{folder}/{file}" if file else folder
    lines = [("fetch", f"hf download {repo}{f' {file}' if file else ''} --local-dir {folder}")]
    if vision := tower(entry):
        lines.append(("fetch", f"hf download {vision}"))
    base, lines = _base_commands(entry, lines)
    under = f" --base {base}" if base else ""
    lines.append(("ask", f'llava ask photo.jpg "What is in the picture?" --model {given}{under}'))
    if base and entry["format"] in ("delta", "lora"):
        job, kind = ("apply-delta", "delta") if entry["format"] == "delta" else ("merge-lora", "lora")
        lines.append(("merge", f"llava {job} --base {base} --target {folder}-merged --{kind} {given}"))
        lines.append(("ask", f'llava ask photo.jpg "What is in the picture?" --model {folder}-merged'))
    lines.append(("convert", f"llava convert {given} {folder}-native --to native{under}"))
    return lines


def _base_commands(entry: Entry, lines: list[tuple[str, str]]) -> tuple[str | None, list[tuple[str, str]]]:
    """Returns the folder to pass as --base, and `lines` extended with the commands that create this folder."""
    id = base_id(entry)
    if id is None:
        return None, lines
    base = id.split("/")[-1]
    lines = [*lines, ("fetch", f"hf download {id} --local-dir {base}")]
    if base.endswith("-delta-v0"):  # Vicuna v0
        raw, whole = f"huggyllama/llama-{entry['size']}", base.replace("-delta", "")
        lines.append(("base", f"llava apply-delta --base {raw} --target {whole} --delta {base}"))
        base = whole
    return base, lines


def facts(entry: Entry) -> list[tuple[str, str]]:
    """Describes the entry as (label, text) pairs."""
    start = origin(entry)
    base, vision = base_words(entry), tower(entry)
    prompts = start.get("conversation") or {}
    mode = "hf (crops as transformers does)" if entry["format"] == "hf-reexport" else "original"
    projector = start.get("projector") or {}
    named = {
        "id": entry["id"],
        "made from": entry.get("reexport_of"),
        "format": entry["format"],
        "language model": f"{start['base_llm']} ({start['size']})",
        "needs base": base or "none",
        "vision tower": vision or f"in the checkpoint; made from {start['vision_tower']}",
        "projector": projector.get("type"),
        "pretraining": _joined(start, "pretrain_data", "pretrain_schedule"),
        "finetuning": _joined(start, "finetune_data", "finetune_schedule"),
        "template, trained": prompts.get("train"),
        "template, served": prompts.get("serve") or "not published; llava_v1 is chosen from its files",
        "image mode": f"{mode}; aspect {start.get('image_aspect_ratio', 'square')}",
        "vocabulary": entry.get("vocab_size"),
        "added tokens": ", ".join(f"{text} {id}" for text, id in entry.get("added_tokens", {}).items()),
        "scores": ", ".join(f"{name} {score}" for name, score in (start.get("scores") or {}).items())
        or "none published",
        "licence": licence(entry),
        "note": entry.get("note") or entry.get("vocab_size_note") or entry.get("added_tokens_note"),
    }
    return [(name, str(value)) for name, value in named.items() if value]


def _joined(entry: Entry, *keys: str) -> str:
    return ", ".join(str(entry[key]) for key in keys if entry.get(key))
