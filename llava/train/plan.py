"""Estimates the memory, tokens and steps of a run for `llava train --plan`. Reads headers and data, but no weights."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llava.config import IGNORE
from llava.errors import ContextError, LlavaError
from llava.model.llava import Llava
from llava.tensors.atomic import size_text
from llava.train.batch import BatchDataset
from llava.train.checks import check_pictures, check_run
from llava.train.export import export_format
from llava.train.recipe import Recipe
from llava.train.start import DTYPES, start, trainable

_SAMPLED = 200  # number of samples used to estimate token counts
_LOGIT_BYTES = 3 * 2**28  # one chunk of float32 logits plus its softmax and gradient


@dataclass(frozen=True)
class Plan:
    """Key figures of a run, computed before it starts."""

    model: str
    format: str  # format of the exported model
    trained: dict[str, int]  # part of the model -> number of trained parameters
    frozen: dict[str, int]
    ranks: int
    memory_bytes: dict[str, int]  # per GPU, by purpose; activations are estimated
    disk_bytes: dict[str, int]  # by purpose
    samples: int
    samples_looked_at: int  # number of samples used to compute the next three fields
    tokens_per_sample: float  # including image tokens
    target_tokens_per_sample: float
    broken: int
    too_long: int  # longer than the model's context; not included in `broken`
    global_batch_size: int
    steps_per_epoch: int
    steps: int
    tokens: int  # estimate for the whole run

    def text(self) -> str:
        """Returns the plan as text, one line per topic."""
        lines = [f"model        {self.model}, exported in {self.format} format"]
        for name, parts in (("trained", self.trained), ("frozen", self.frozen)):
            rows = ", ".join(f"{part} {n:,}" for part, n in parts.items()) or "nothing"
            lines.append(f"{name:12} {sum(parts.values()):,} parameters: {rows}")
        total = sum(self.memory_bytes.values())
        parts_text = ", ".join(f"{part} {size_text(n)}" for part, n in self.memory_bytes.items())
        where = "on one GPU" if self.ranks == 1 else f"on each of {self.ranks} GPUs"
        lines.append(f"memory       {size_text(total)} {where}: {parts_text}")
        files = ", ".join(f"{part} {size_text(n)}" for part, n in self.disk_bytes.items())
        lines.append(f"disk         {size_text(sum(self.disk_bytes.values()))}: {files}")
        lines.append(
            f"samples      {self.samples:,}; of the {self.samples_looked_at} examined, {self.broken} "
            f"{'is' if self.broken == 1 else 'are'} broken and {self.too_long} longer than the model's context"
        )
        lines.append(
            f"tokens       about {self.tokens_per_sample:.0f} per sample, {self.target_tokens_per_sample:.0f} of them "
            f"targets; {self.tokens:,} in total"
        )
        lines.append(
            f"steps        {self.steps:,} of {self.global_batch_size} sample{'s' * (self.global_batch_size != 1)}, "
            f"{self.steps_per_epoch:,} per epoch"
        )
        return "\n".join(lines)


def make_plan(recipe: Recipe, *, n_ranks: int = 1) -> Plan:
    """Computes the plan for a run on `n_ranks` GPUs. Raises LlavaError."""
    with TemporaryDirectory() as folder:
        checkpoint = start(recipe, Path(folder) / "tokenizer")
        model = trainable(checkpoint, recipe)
        disk = check_run(Path(recipe.output_dir), model, checkpoint, recipe)
    dataset = BatchDataset.open(recipe, checkpoint)
    check_pictures(dataset.samples)
    n, order = len(dataset.samples), dataset.order
    chosen = random.Random(recipe.seed).sample(range(n), min(_SAMPLED, n))
    tokens, targets, too_long = _count_tokens(dataset, chosen)
    n_good = len(tokens)
    mean = sum(tokens) / max(n_good, 1)
    return Plan(
        model=recipe.model,
        format=export_format(recipe, checkpoint),
        trained=_parameters_by_part(model, trained=True),
        frozen=_parameters_by_part(model, trained=False),
        ranks=n_ranks,
        memory_bytes=_memory(model, recipe, mean, n_ranks),
        disk_bytes=disk,
        samples=n,
        samples_looked_at=len(chosen),
        tokens_per_sample=mean,
        target_tokens_per_sample=sum(targets) / max(n_good, 1),
        broken=len(chosen) - n_good - too_long,
        too_long=too_long,
        global_batch_size=recipe.global_batch_size,
        steps_per_epoch=order.steps_per_epoch,
        steps=order.n_steps,
        tokens=round(mean * recipe.global_batch_size * order.n_steps),
    )


def _count_tokens(dataset: BatchDataset, indices: Sequence[int]) -> tuple[list[int], list[int], int]:
    """Returns the token counts and target token counts of the usable samples, and the number of too long samples."""
    tokens, targets, too_long = [], [], 0
    for index in indices:
        try:
            input = dataset.prepare(index)
        except ContextError:
            too_long += 1
            continue
        except LlavaError:
            continue
        tokens.append(len(input.ids))
        targets.append(int((input.labels != IGNORE).sum()))
    return tokens, targets, too_long


def _parameters_by_part(model: Llava, *, trained: bool) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == trained:
            part = "adapters" if ".adapters." in name else name.split(".")[0]
            parts[part] = parts.get(part, 0) + parameter.numel()
    packed = sum(2 * buffer.numel() for name, buffer in model.named_buffers() if name.endswith("codes"))
    if packed and not trained:
        parts["decoder in 4 bits"] = packed
    return parts


def _memory(model: Llava, recipe: Recipe, tokens_per_sample: float, n_ranks: int) -> dict[str, int]:
    """Returns the memory needed per GPU, in bytes, by purpose.

    The sizes of weights, gradients and AdamW's two moments are exact. Activations include only tensors saved for the
    backward pass.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) // n_ranks
    weights += sum(b.numel() * b.element_size() for b in model.buffers())  # 4-bit weights are not sharded
    gradients = sum(p.numel() * p.element_size() for p in trained) // n_ranks
    config = model.config.decoder
    tokens = recipe.micro_batch_size * tokens_per_sample
    in_block = 4 * config.dim + 3 * config.mlp_dim + (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    per_block = config.dim if recipe.gradient_checkpointing else 2 * config.dim + in_block
    per_token = config.n_layers * per_block + in_block
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "activations": round(tokens * per_token * DTYPES[recipe.compute_dtype].itemsize),
        "logits": min(_LOGIT_BYTES, round(3 * 4 * tokens * config.vocab_size)),
    }
