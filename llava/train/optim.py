"""The optimiser of a run and its learning rates."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from llava.train.recipe import Recipe


def optimizer(model: nn.Module, recipe: Recipe) -> AdamW:
    """AdamW over all that learns, in groups by rate and decay.

    As in the original, norms and biases do not decay. Nor does a table of which only some rows learn: its others must
    stay as they are.
    """
    only_rows = "rows" in recipe.train and ("decoder" not in recipe.train or bool(recipe.lora_rank))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.dim() == 1 and not name.endswith((".newline", ".vision.cls"))
            kept = vector or (only_rows and name.endswith(".embed.weight"))
            decay = 0.0 if kept else recipe.weight_decay
            groups.setdefault((rate_of(name, recipe), decay), []).append(parameter)
    return AdamW(
        [{"params": group, "lr": rate, "rate": rate, "weight_decay": decay} for (rate, decay), group in groups.items()],
        lr=recipe.rate,
        betas=recipe.betas,
        eps=recipe.eps,
        fused=True,
    )


def rate_of(name: str, recipe: Recipe) -> float:
    """The peak rate of a parameter."""
    if ".projector." in name or name.endswith(".newline"):
        return recipe.projector_rate or recipe.rate
    return (".vision." in name and recipe.vision_rate) or recipe.rate


def factor(step: int, n_steps: int, recipe: Recipe) -> float:
    """Share of the peak rate at a step, from 0 on: a line up, then half a cosine down to 0, as transformers has it."""
    warm = math.ceil(recipe.warmup * n_steps)
    if step < warm:
        return step / max(1, warm)
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))


def set_rates(optimizer: AdamW, share: float) -> None:
    """Every group at its own peak times `share`."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * share


def scale_gradients(parameters: Iterable[nn.Parameter], by: float) -> None:
    """In place."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if grads:
        torch._foreach_mul_(grads, by)


def clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """The norm of all gradients before they are cut to `limit` (0: not cut)."""
    norm = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
