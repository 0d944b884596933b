"""Key tables, which map tensor names on disk to our tensor names. All formats share this code."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from llava.errors import CheckpointError
from llava.tensors.files import Weights
from llava.tensors.lazy import Concat, FromFile, LazyTensor


@dataclass(frozen=True)
class Rule:
    """Maps one or more tensors on disk to one of our tensors.

    `*` matches a number; `**` matches any text. Tensors in braces, such as {q,k,v}, are concatenated along the rows.
    """

    disk: str
    ours: str | None  # None: the tensor is known but not needed

    def parts(self) -> list[str]:
        """Returns the name pattern of each tensor to concatenate, in order. Without braces, there is only one."""
        if not (braces := re.search(r"{(.*)}", self.disk)):
            return [self.disk]
        return [self.disk.replace(braces[0], part) for part in braces[1].split(",")]


def prefixed(prefix: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Returns a copy of the rules with `prefix` prepended to the names on disk."""
    return tuple(replace(rule, disk=prefix + rule.disk) for rule in rules)


class Plan(NamedTuple):
    """The names on disk, classified by a key table."""

    tensors: dict[str, tuple[str, ...]]  # our name -> names on disk of the tensors to concatenate along the rows
    dropped: tuple[str, ...]  # known but not needed
    unknown: tuple[str, ...]  # not matched by any rule


def plan(names: Iterable[str], rules: Iterable[Rule]) -> Plan:
    """Classifies every name on disk.

    Raises CheckpointError if a tensor to concatenate is missing, or if two names stand for the same tensor, as in a
    folder with files of two layouts.
    """
    table = [(re.compile(_pattern(part)), i, rule) for rule in rules for i, part in enumerate(rule.parts())]
    found: dict[str, dict[int, str]] = {}
    rule_of: dict[str, Rule] = {}
    dropped, unknown = [], []
    for name in names:
        for pattern, i, rule in table:
            if match := pattern.fullmatch(name):
                if rule.ours is None:
                    dropped.append(name)
                    break
                ours = _fill(rule.ours, match)
                parts = found.setdefault(ours, {})
                if i in parts or rule_of.setdefault(ours, rule) != rule:
                    raise CheckpointError(
                        f"{next(iter(parts.values()))} and {name} are names of the same tensor in two layouts, so the "
                        "files are a mixture; download them all again"
                    )
                parts[i] = name
                break
        else:
            unknown.append(name)
    n_parts = {_normalise(rule.ours): len(rule.parts()) for rule in rules if rule.ours}
    for ours, parts in found.items():
        if len(parts) < n_parts.get(_normalise(ours), 1):
            raise CheckpointError(
                f"{ours}: found only {', '.join(parts.values())}; the other parts of this tensor are missing: download "
                "the files again"
            )
    tensors = {ours: tuple(parts[i] for i in sorted(parts)) for ours, parts in found.items()}
    return Plan(tensors, tuple(dropped), tuple(unknown))


class Target(NamedTuple):
    """What an on-disk tensor name is mapped to: one of our tensors, or one part of a concatenated tensor."""

    ours: str
    part: int  # index among the n_parts tensors that are concatenated
    n_parts: int


def target_of(name: str, rules: Iterable[Rule]) -> Target | None:
    """Returns the target for an on-disk tensor name, or None if the tensor is unknown or not needed.

    Does not check whether the other parts of a concatenated tensor exist.
    """
    for rule in rules:
        for i, part in enumerate(rule.parts()):
            if rule.ours and (match := re.fullmatch(_pattern(part), name)):
                return Target(_fill(rule.ours, match), i, len(rule.parts()))
    return None


def disk_names(ours: str, rules: Iterable[Rule]) -> list[str]:
    """Applies `rules` in reverse: returns the on-disk names of the tensor that we call `ours`, in row order.

    Raises KeyError if no rule matches.
    """
    for rule in rules:
        if rule.ours and (match := re.fullmatch(_pattern(rule.ours), ours)):
            return [_fill(part, match) for part in rule.parts()]
    raise KeyError(ours)


def from_files(weights: Weights, names: tuple[str, ...]) -> LazyTensor:
    """Returns the named tensor, or the concatenation of the named tensors along dim 0 if there are several."""
    parts = [FromFile(weights, name) for name in names]
    return parts[0] if len(parts) == 1 else Concat(parts)


def _pattern(text: str) -> str:
    return re.escape(text).replace(r"\*\*", "(.+)").replace(r"\*", r"(\d+)")


def _fill(text: str, match: re.Match[str]) -> str:
    for value in match.groups():
        text = text.replace("**" if "**" in text else "*", value, 1)
    return text


def _normalise(ours: str) -> str:
    return re.sub(r"\d+", "*", ours)
