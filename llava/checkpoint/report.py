"""What a conversion did: in words for conversion.md, and in logits of both sides.

S places   V vocabulary rows
"""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from llava.checkpoint.load import build
from llava.checkpoint.open import Checkpoint
from llava.checkpoint.write import Item
from llava.errors import CheckpointError

TOLERANCE = 1e-4  # logits of the same weights, float32
_N_IDS = 24


def report(source: Checkpoint, written: Sequence[Item], to: str, checks: Sequence[str]) -> str:
    """Markdown: what was renamed, filled up and left out, and why."""
    lines = [f"# Conversion to {to}", "", f"From a {source.kind} checkpoint: {'; '.join(source.evidence)}."]
    if source.template.template:
        lines.append(f"Template: {source.template.template} ({source.template.because}).")
    lines += ["", "## Names", "", "`N` is a number.", "", "| ours | here | tensors |", "|---|---|---|"]
    counts = Counter((_normal(item.ours or item.name), _normal(item.name)) for item in written)
    lines += [f"| `{ours}` | `{name}` | {n} |" for (ours, name), n in counts.items()]
    tables = [item for item in written if item.ours in ("decoder.embed.weight", "decoder.head.weight")]
    rows = source.config.decoder.vocab_size
    changed = {item.shape[0] for item in tables} - {rows}
    if changed:
        lines += ["", "## Rows", "", f"Embedding table and head: {rows} rows before, {changed.pop()} here. "
                  "llava-hf's layout has rows for <image> and <pad> and is filled up to a multiple of 64; "
                  "what is added is the mean of the others, and never looked up."]  # fmt: skip
    if source.unused:
        left = Counter(_normal(name) for name in source.unused)
        lines += ["", "## Left out: not needed to compute the model, or made anew by readers", ""]
        lines += [f"- `{name}` ({n})" for name, n in left.items()]
    lines += ["", "## Checked", "", *(checks or ["Shapes and finite values; logits were not compared."])]
    return "\n".join(lines) + "\n"


def _normal(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


def check_logits(one: Checkpoint, other: Checkpoint) -> float:
    """Largest difference of logits, on the rows that both have. Raises CheckpointError above `TOLERANCE`."""
    a, b = logits(one), logits(other)
    n = min(a.shape[1], b.shape[1])
    difference = (a[:, :n] - b[:, :n]).abs().max().item()
    if not difference <= TOLERANCE:
        raise CheckpointError(f"{other.folder}: its logits differ from {one.folder}'s by {difference:.1e}; not written")
    return difference


@torch.inference_mode()
def logits(checkpoint: Checkpoint) -> Tensor:
    """[S, V] float32 of a fixed picture, where there is a tower, and fixed ids behind it.

    Of a sum, such as a LoRA on its base, the values are rounded to the type that they are stored in.
    """
    model = build(checkpoint, dtype=torch.float32, device=torch.device("cpu"), force=True, rounded=True)
    ids = torch.arange(1, _N_IDS + 1) * 7919 % min(checkpoint.config.decoder.vocab_size, 31999)
    x = model.embed(ids)
    if model.vision is not None and checkpoint.config.vision is not None:
        size = checkpoint.config.vision.image_size
        pixels = torch.linspace(-2, 2, 3 * size * size).view(1, 3, size, size).sin()
        (picture,) = model.encode_images(pixels, [1], [None])
        x = torch.cat([picture, x])
    hidden = model.decoder(x[None], torch.arange(len(x)))
    found: Tensor = model.decoder.logits(hidden)[0]
    return found
