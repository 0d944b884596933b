"""The text of conversion.md, which records what a conversion did."""

import re
from collections import Counter
from collections.abc import Sequence

from llava.formats.added_rows import VOCAB_TABLES
from llava.formats.format import Checkpoint
from llava.tensors.writer import OutputTensor


def report(
    source: Checkpoint, outputs: Sequence[OutputTensor], to: str, checks: Sequence[str], remarks: Sequence[str] = ()
) -> str:
    """Returns a Markdown report of renamed, added and omitted tensors, with reasons, checks and notes for users."""
    lines = [f"# Conversion to {to}", "", f"From a {source.format} checkpoint: {'; '.join(source.evidence)}."]
    if source.template.template:
        lines.append(f"Template: {source.template.template} ({source.template.because}).")
    lines += _names(outputs) + _rows(source, outputs) + _left_out(source, outputs)
    if remarks:
        lines += ["", "## Notes", "", *(f"- {remark}" for remark in remarks)]
    lines += ["", "## Checked", "", *(checks or ["Shapes and finite values. Logits were not compared."])]
    return "\n".join(lines) + "\n"


def _names(outputs: Sequence[OutputTensor]) -> list[str]:
    counts = Counter((_normal(out.ours or out.name), _normal(out.name)) for out in outputs)
    lines = [f"| `{ours}` | `{name}` | {n} |" for (ours, name), n in counts.items()]
    return ["", "## Names", "", "`N` is a number.", "", "| ours | here | tensors |", "|---|---|---|", *lines]


def _rows(source: Checkpoint, outputs: Sequence[OutputTensor]) -> list[str]:
    """Returns a section on rows added to or removed from the embedding table and head; empty if none were."""
    before, now = source.config.decoder.vocab_size, {out.shape[0] for out in outputs if out.ours in VOCAB_TABLES}
    if not now or now == {before}:
        return []
    why = (
        "llava-hf adds rows for <image> and <pad> and pads to a multiple of 64; the added rows are never looked up. "
        "Here, they were kept from an earlier conversion, or are the mean of the other rows."
        if max(now) > before
        else "The rows of <image> and <pad>, and llava-hf's padding, are left out, as they are untrained and unused."
    )
    return ["", "## Rows", "", f"Embedding table and head: {before} rows before, {max(now)} here. {why}"]


def _left_out(source: Checkpoint, outputs: Sequence[OutputTensor]) -> list[str]:
    left = Counter(_normal(name) for name in left_out(source, outputs))
    lines = [f"- `{name}` ({n}): {_why(name)}" for name, n in left.items()]
    return ["", "## Left out", "", *lines] if lines else []


def left_out(source: Checkpoint, outputs: Sequence[OutputTensor]) -> tuple[str, ...]:
    """Returns the on-disk names of unused tensors that were not written."""
    kept = {name for out in outputs if out.ours in source.unused for name in source.unused[out.ours].names}
    return tuple(name for name in source.unused_names if name not in kept)


def _why(name: str) -> str:
    return next((why for part, why in _REASONS.items() if part in name), "not needed to compute this model")


_REASONS = {  # substring of an on-disk tensor name -> why the tensor is not written
    "inv_freq": "recomputed by every reader",
    "position_ids": "0, 1, 2 and so on: recomputed by every reader",
    "text_model": "CLIP's text encoder",
    "projection": "CLIP's projections for comparing images with texts",
    "logit_scale": "CLIP's scale for comparing images with texts",
    "post_layernorm": "after the layer that LLaVA reads",
    "encoder.layers": "the tower has its own folder, or this block comes after the layer that LLaVA reads",
}


def _normal(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)
