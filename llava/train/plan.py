"""What a run would take: `llava train --plan`. Headers and data are read, no weights."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llava.config import IGNORE
from llava.errors import LlavaError
from llava.model.llava import Llava
from llava.train.batch import Batches
from llava.train.export import kind
from llava.train.recipe import Recipe
from llava.train.start import DTYPES, start, trainable

_LOOKED_AT = 200  # samples that token figures are estimated from
_LOGIT_BYTES = 3 * 2**28  # a chunk of logits in float32, with its gradient and its softmax


@dataclass(frozen=True)
class Plan:
    """Figures of a run that has not started."""

    model: str
    layout: str  # of what it leaves
    trained: dict[str, int]  # parameters that learn, by part
    frozen: dict[str, int]
    ranks: int
    memory_bytes: dict[str, int]  # of each GPU, by part; activations are an estimate
    samples: int
    samples_looked_at: int
    tokens_per_sample: float  # places, pictures' included; of the samples looked at
    learnt_per_sample: float
    broken: int  # of the samples looked at
    batch: int
    steps_per_epoch: int
    steps: int
    tokens: int  # of the whole run, estimated

    def text(self) -> str:
        """For people, a line each."""
        lines = [f"model        {self.model}, written as {self.layout}"]
        for name, parts in (("trained", self.trained), ("frozen", self.frozen)):
            rows = ", ".join(f"{part} {n:,}" for part, n in parts.items()) or "nothing"
            lines.append(f"{name:12} {sum(parts.values()):,} parameters: {rows}")
        total = sum(self.memory_bytes.values())
        parts_text = ", ".join(f"{part} {n / 1e9:.2f}" for part, n in self.memory_bytes.items())
        lines.append(f"memory       {total / 1e9:.2f} GB on each of {self.ranks} GPU(s): {parts_text}")
        lines.append(f"samples      {self.samples:,}; of {self.samples_looked_at} looked at {self.broken} are broken")
        lines.append(
            f"tokens       about {self.tokens_per_sample:.0f} a sample, {self.learnt_per_sample:.0f} of them learnt; "
            f"{self.tokens:,} in all"
        )
        lines.append(f"steps        {self.steps:,} of {self.batch} samples, {self.steps_per_epoch:,} an epoch")
        return "\n".join(lines)


def make_plan(recipe: Recipe, *, n_ranks: int = 1) -> Plan:
    """Raises LlavaError."""
    with TemporaryDirectory() as folder:
        checkpoint = start(recipe, Path(folder) / "tokenizer")
        model = trainable(checkpoint, recipe)
    batches = Batches.of(recipe, checkpoint)
    n, order = len(batches.samples), batches.order
    chosen = random.Random(recipe.seed).sample(range(n), min(_LOOKED_AT, n))
    tokens, learnt = _tokens(batches, chosen)
    good = len(tokens)
    mean = sum(tokens) / max(good, 1)
    return Plan(
        model=recipe.model,
        layout=kind(recipe),
        trained=_by_part(model, learns=True),
        frozen=_by_part(model, learns=False),
        ranks=n_ranks,
        memory_bytes=_memory(model, recipe, mean, n_ranks),
        samples=n,
        samples_looked_at=len(chosen),
        tokens_per_sample=mean,
        learnt_per_sample=sum(learnt) / max(good, 1),
        broken=len(chosen) - good,
        batch=recipe.batch,
        steps_per_epoch=order.steps_per_epoch,
        steps=order.n_steps,
        tokens=round(mean * recipe.batch * order.n_steps),
    )


def _tokens(batches: Batches, indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Places of these samples, and how many of them are learnt; broken samples are left out."""
    tokens, learnt = [], []
    for index in indices:
        try:
            input = batches.prepare(index)
        except LlavaError:
            continue
        tokens.append(len(input.ids))
        learnt.append(int((input.labels != IGNORE).sum()))
    return tokens, learnt


def _by_part(model: Llava, *, learns: bool) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == learns:
            part = "adapters" if ".adapters." in name else name.split(".")[0]
            parts[part] = parts.get(part, 0) + parameter.numel()
    packed = sum(2 * buffer.numel() for name, buffer in model.named_buffers() if name.endswith("codes"))
    if packed and not learns:
        parts["decoder in 4 bits"] = packed
    return parts


def _memory(model: Llava, recipe: Recipe, tokens_per_sample: float, n_ranks: int) -> dict[str, int]:
    """Of each GPU. Weights, gradients and AdamW's two moments are exact; activations are those kept between blocks."""
    learning = [p for p in model.parameters() if p.requires_grad]
    own = sum(p.numel() * p.element_size() for p in model.parameters()) // n_ranks
    own += sum(b.numel() * b.element_size() for b in model.buffers())  # 4-bit weights are whole on every rank
    gradients = sum(p.numel() * p.element_size() for p in learning) // n_ranks
    config = model.config.decoder
    rows = recipe.micro_batch * tokens_per_sample
    width = DTYPES[recipe.compute].itemsize
    inside = 4 * config.dim + 3 * config.mlp_dim + (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    kept = config.n_layers * (config.dim if recipe.checkpointing else 2 * config.dim + inside) + inside
    return {
        "weights": own,
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "activations": round(rows * kept * width),
        "logits": min(_LOGIT_BYTES, round(3 * 4 * rows * config.vocab_size)),
    }
