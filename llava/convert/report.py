"""What a conversion did, in words: conversion.md."""

import re
from collections import Counter
from collections.abc import Sequence

from llava.checkpoint.onbase import LENGTHENED
from llava.checkpoint.open import Checkpoint
from llava.checkpoint.write import Item


def report(
    source: Checkpoint, written: Sequence[Item], to: str, checks: Sequence[str], remarks: Sequence[str] = ()
) -> str:
    """Markdown: what was renamed, filled up and left out, and why; what a reader of the new files should know."""
    lines = [f"# Conversion to {to}", "", f"From a {source.kind} checkpoint: {'; '.join(source.evidence)}."]
    if source.template.template:
        lines.append(f"Template: {source.template.template} ({source.template.because}).")
    lines += _names(written) + _rows(source, written) + _left_out(source, written)
    if remarks:
        lines += ["", "## To know", "", *(f"- {remark}" for remark in remarks)]
    lines += ["", "## Checked", "", *(checks or ["Shapes and finite values; logits were not compared."])]
    return "\n".join(lines) + "\n"


def _names(written: Sequence[Item]) -> list[str]:
    counts = Counter((_normal(item.ours or item.name), _normal(item.name)) for item in written)
    lines = [f"| `{ours}` | `{name}` | {n} |" for (ours, name), n in counts.items()]
    return ["", "## Names", "", "`N` is a number.", "", "| ours | here | tensors |", "|---|---|---|", *lines]


def _rows(source: Checkpoint, written: Sequence[Item]) -> list[str]:
    """Of the embedding table and the head, where there are more or fewer than before."""
    before, now = source.config.decoder.vocab_size, {item.shape[0] for item in written if item.ours in LENGTHENED}
    if not now or now == {before}:
        return []
    why = (
        "llava-hf's layout has rows for <image> and <pad> and is filled up to a multiple of 64; they are never looked "
        "up. Added here: what was kept from there, else the mean of the others."
        if max(now) > before
        else "Left out: those of <image> and <pad> and what fills a llava-hf table up, untrained and never looked up."
    )
    return ["", "## Rows", "", f"Embedding table and head: {before} rows before, {max(now)} here. {why}"]


def _left_out(source: Checkpoint, written: Sequence[Item]) -> list[str]:
    left = Counter(_normal(name) for name in left_out(source, written))
    lines = [f"- `{name}` ({n}): {_why(name)}" for name, n in left.items()]
    return ["", "## Left out", "", *lines] if lines else []


def left_out(source: Checkpoint, written: Sequence[Item]) -> tuple[str, ...]:
    """Names on disk that were not written: what the model does not need may have come along."""
    kept = {name for item in written if item.ours in source.spare for name in source.spare[item.ours].names}
    return tuple(name for name in source.unused if name not in kept)


def _why(name: str) -> str:
    return next((why for part, why in _REASONS.items() if part in name), "not needed to compute this model")


_REASONS = {  # part of a name on disk -> why it is not written
    "inv_freq": "computed anew by every reader",
    "position_ids": "0, 1, 2 and so on: made anew by every reader",
    "text_model": "CLIP's side for texts",
    "projection": "CLIP's way to compare pictures with texts",
    "logit_scale": "CLIP's way to compare pictures with texts",
    "post_layernorm": "behind the layer that LLaVA reads",
    "encoder.layers": "the tower lies in its own folder, or this block is behind the layer that LLaVA reads",
}


def _normal(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)
