"""The optimizer and the learning rate schedule of a run."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from llava.train.recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> AdamW:
    """Builds AdamW over all trainable parameters, grouped by learning rate and weight decay.

    As in the original LLaVA code, weight decay is not applied to norms and biases. If only some rows of the embedding
    table are trained, it is not applied to the table either, because the other rows must not change.
    """
    only_rows = "rows" in recipe.train and ("decoder" not in recipe.train or bool(recipe.lora_rank))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.dim() == 1 and not name.endswith((".newline", ".vision.cls"))
            exempt = vector or (only_rows and name.endswith(".embed.weight"))
            decay = 0.0 if exempt else recipe.weight_decay
            groups.setdefault((peak_lr(name, recipe), decay), []).append(parameter)
    return AdamW(
        [{"params": group, "lr": lr, "initial_lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()],
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
        fused=True,
    )


def peak_lr(name: str, recipe: Recipe) -> float:
    """Returns the peak learning rate of a parameter."""
    if ".projector." in name or name.endswith(".newline"):
        return recipe.projector_lr or recipe.lr
    return (".vision." in name and recipe.vision_lr) or recipe.lr


def lr_factor(step: int, n_steps: int, recipe: Recipe) -> float:
    """Returns the learning rate at a step, counted from 0, as a fraction of the peak.

    A linear warmup is followed by the peak rate (constant) or by a half-cosine decay to 0 (cosine), as in transformers'
    get_cosine_schedule_with_warmup.
    """
    warmup_steps = math.ceil(recipe.warmup_ratio * n_steps)
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, n_steps - warmup_steps)))


def set_lr(optimizer: AdamW, factor: float) -> None:
    """Sets the learning rate of each group to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies all gradients by `factor` in place."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if grads:
        torch._foreach_mul_(grads, factor)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Clips the gradients to `max_norm`, unless it is 0. Returns their norm before clipping."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
