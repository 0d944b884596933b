"""The language model under a LoRA, a projector or a delta: which one it is, and whether what was given can be it.

Names recorded inside files are evidence; the names of folders and the hub ids that a user gives never are.
"""

import logging
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava.checkpoint import zoo
from llava.checkpoint.detect import FORMAT_KEY, Facts, Finding, Kind
from llava.checkpoint.identify import Match, identify, known_starts
from llava.checkpoint.traits import recorded_name, recorded_names
from llava.config import DecoderConfig
from llava.errors import CheckpointError, LlavaError

log = logging.getLogger(__name__)

_RAW_LLAMA = "the raw LLaMA-1 that the difference was taken to (not Vicuna, not Llama 2)"
_NO_BASES: Mapping[str, str] = {  # kinds that are no language model to put something on
    "llava-hf": "a re-export for transformers, with rows of its own; give the original base, or convert it: "
    "llava convert FOLDER OUT --to llama",
}


class Needed(NamedTuple):
    """The base of a folder: hub ids (several where files do not tell sizes apart), and how that is known."""

    names: list[str]
    evidence: str

    def __str__(self) -> str:
        return " or ".join(self.names) or "the language model that it was trained from"


def needed_base(facts: Facts, finding: Finding) -> Needed:
    """The base that the files name, by its hub id where the zoo knows it; else that of the rows that they fit."""
    for name, where in recorded_names(facts, finding.kind):
        return Needed([known_starts().get(recorded_name(name), name)], f"{where} = {name}")
    try:
        found = identify(facts, finding)
    except LlavaError:  # an error about the base must not hide behind another
        return Needed([], "its files do not say which")
    rows = found.candidates or [match for match in found.nearest if match.entry["format"] == finding.kind]
    names = list(dict.fromkeys(base for match in rows if (base := zoo.base_id(match.entry))))
    return Needed(names, f"as for {_rows(rows)}" if names else "its files do not say which")


def _rows(matches: list[Match]) -> str:
    text = ", ".join(match.entry["id"] for match in matches)
    return text if not matches or not matches[0].differs else f"{text}, the nearest in the zoo"


def words(kind: Kind, needed: Needed) -> str:
    """The base for people."""
    if kind == "delta":
        return f"{_RAW_LLAMA}, such as {needed}" if needed.names else f"{_RAW_LLAMA}, such as huggyllama/llama-7b"
    return str(needed)


def missing_base(facts: Facts, finding: Finding) -> CheckpointError:
    """What to say where a base is needed and none was given."""
    needed = needed_base(facts, finding)
    example, first = needed.names[0] if needed.names else "FOLDER_OR_HUB_ID", ""
    if example.endswith("-delta-v0"):  # Vicuna v0
        whole = example.split("/")[-1].replace("-delta", "")
        raw = f"huggyllama/llama-{'13b' if '13b' in whole else '7b'}"
        first = (
            f"; it was published as a delta alone: llava apply-delta --base {raw} --target {whole} --delta {example}"
        )
        example = whole
    return CheckpointError(
        f"{facts.folder}: {finding.kind} ({finding.evidence[0]}): needs its base, {words(finding.kind, needed)} "
        f"({needed.evidence}); name its folder or hub id with base= (--base): "
        f"llava ask IMAGE QUESTION --model {shlex.quote(str(facts.folder))} --base {example}{first}"
    )


def check_kind(base: Facts, kind: Kind, loads: bool, facts: Facts, finding: Finding) -> None:
    """The base is a language model of the same architecture. Raises CheckpointError."""

    def wanted() -> str:
        return words(finding.kind, needed_base(facts, finding))

    if not loads or kind in _NO_BASES:
        why = _NO_BASES.get(kind, "no language model by itself")
        raise CheckpointError(
            f"{base.folder}: is of kind {kind}, no language model to put a {finding.kind} on ({why}); "
            f"base= is {wanted()}"
        )
    has, asked = _architecture(base), _architecture(facts)
    if has and asked and has != asked:
        raise CheckpointError(
            f"{base.folder}: is of architecture {has}, {facts.folder} is for {asked}: not the base of this "
            f"{finding.kind}, which is {wanted()}"
        )


def _architecture(facts: Facts) -> str | None:
    """llama or mpt, None where config.json does not show it."""
    if FORMAT_KEY in facts.settings:
        return (facts.settings.get("decoder") or {}).get("kind")
    keys = {"d_model": "mpt", "hidden_size": "llama", "num_hidden_layers": "llama"}
    return next((kind for key, kind in keys.items() if key in facts.settings), None)


def check_heads(has: DecoderConfig, asked: DecoderConfig, base: Path, who: str, wrong: str) -> None:
    """Sizes that no tensor's shape shows. Raises CheckpointError."""
    for name in ("n_heads", "n_kv_heads", "head_dim"):
        one, other = getattr(has, name), getattr(asked, name)
        if one != other:
            raise CheckpointError(f"{base}: {name} is {one}, {who} {other}: {wrong}")


def check_vocabulary(rows: int, result: int, facts: Facts, wrong: str, force: bool) -> None:
    """The base has as many rows as the folder states, or the folder brings the others. Raises CheckpointError."""
    stated = facts.settings.get("vocab_size")
    if isinstance(stated, int) and stated not in (rows, result):
        complain(f"{wrong}: it has a vocabulary of {rows}, {facts.folder} states {stated}", force)


def check_raw(
    base: Path, kind: Kind, sizes: DecoderConfig, asked: DecoderConfig, settings: Mapping[str, Any], force: bool
) -> None:
    """The base of a delta is the raw LLaMA-1: on a trained one the sum is garbage.

    `kind`, `sizes`, `settings`: the base's, the last its config.json. `asked`: the delta's sizes. Raises
    CheckpointError.
    """
    if evidence := [*_trained(kind, settings), *_of_llama_2(sizes, asked)]:
        complain(
            f"{base}: is not {_RAW_LLAMA}: {'; '.join(evidence)}; give the raw LLaMA-1, such as "
            "huggyllama/llama-7b or huggyllama/llama-13b, as base= (--base)",
            force,
        )


def _trained(kind: Kind, settings: Mapping[str, Any]) -> Iterator[str]:
    """What shows that a model is Vicuna, Llama 2 or a LLaVA."""
    name = str(settings.get("_name_or_path") or "")
    if any(word in recorded_name(name) for word in ("vicuna", "llama-2", "llama2", "llava")):
        yield f"config.json: _name_or_path = {name}"
    if kind == "merged" or settings.get("mm_vision_tower") or settings.get("vision"):
        yield "config.json describes a LLaVA"


def _of_llama_2(sizes: DecoderConfig, asked: DecoderConfig) -> Iterator[str]:
    """Numbers of Llama 2 that the delta, which keeps its base's, does not have."""
    if 4096 <= sizes.max_seq != asked.max_seq:
        yield f"config.json: {sizes.max_seq} positions (the delta: {asked.max_seq}, as LLaMA-1)"
    if sizes.eps == 1e-5 != asked.eps:
        yield f"config.json: rms_norm_eps = 1e-05 (the delta: {asked.eps}, as LLaMA-1)"


def complain(text: str, force: bool) -> None:
    """An error, or with `force` a warning of one line. Raises CheckpointError."""
    if not force:
        raise CheckpointError(f"{text}; force=True (--force) goes on all the same")
    log.warning("%s", text)


def warn_of_other_name(facts: Facts, kind: Kind, base: Facts) -> None:
    """One warning line where a LoRA or projector records another base than the base itself does."""
    own = str(base.settings.get("_name_or_path") or "")
    name, where = next(recorded_names(facts, kind), ("", ""))
    if name and own and recorded_name(own) != recorded_name(name):
        log.warning(
            f"{facts.folder}: {where} = {name}, but the base, {base.folder}, records config.json: _name_or_path = "
            f"{own}; on another base the answers are worse"
        )
