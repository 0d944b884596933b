"""Shared code of the two pretraining scripts: initialization, a time-limited training loop, and saving."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from llava.tensors.keymap import Rule, disk_names
from llava.tensors.writer import OutputTensor, write_json, write_safetensors

# options of both scripts
Out = Annotated[Path, typer.Option(help="folder to write; must be missing or empty")]
Minutes = Annotated[float, typer.Option(help="training time in minutes, compilation included")]
Steps = Annotated[int | None, typer.Option(help="number of steps, instead of --minutes")]
Rate = Annotated[float, typer.Option("--lr", help="peak learning rate")]
Decay = Annotated[float, typer.Option("--weight-decay", help="weight decay of the matrices")]
Seed = Annotated[int, typer.Option(help="seed of the initial weights and of the data")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda")]
Compile = Annotated[bool, typer.Option(help="compile the model on a GPU")]
Size = Annotated[int, typer.Option()]

REPORT_S = 5.0  # seconds between reports
WARM_UP = 0.05  # fraction of the steps with a rising learning rate


@torch.no_grad()
def initialise(model: nn.Module, n_layers: int) -> None:
    """Initializes matrices to preserve the scale of their input, or smaller where a block adds to the residual stream.

    Embeddings have standard deviation 0.02, norms are 1, biases and other vectors 0. The caller sets any exceptions.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)
        elif name.endswith("embed.weight"):
            nn.init.trunc_normal_(parameter, std=0.02)
        else:
            adds = name.endswith(("attn.out.weight", "mlp.down.weight"))
            nn.init.trunc_normal_(
                parameter, std=parameter[0].numel() ** -0.5 / (math.sqrt(2 * n_layers) if adds else 1)
            )


@dataclass
class Budget:
    """The training budget in steps, or in minutes, which are converted to steps once the speed is known."""

    minutes: float | None
    steps: int | None
    clock: Callable[[], float] = time.monotonic  # seconds
    step: int = 0
    _started: float = field(init=False)
    _marked: tuple[int, float] | None = None  # step and time of the last `measure`

    def __post_init__(self) -> None:
        self._started = self.clock()

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self._started

    def measure(self) -> float:
        """Returns the steps per second since the last call and updates the number of steps.

        Call it after synchronizing. The first call only starts the clock, because the time before it is compilation.
        """
        now, mark = self.elapsed_s, self._marked
        self._marked = (self.step, now)
        if mark is None or self.step == mark[0]:
            return 0.0
        pace = (self.step - mark[0]) / (now - mark[1])
        if self.minutes is not None:
            self.steps = self.step + max(0, int((60 * self.minutes - now) * pace))
        return pace

    @property
    def rate(self) -> float:
        """Fraction of the peak learning rate: a linear warmup, then a cosine decay to 0."""
        if self.steps is None:
            return min(1.0, (self.step + 1) / 100)
        done = (self.step + 1) / max(self.steps, 1)
        rise = (self.step + 1) / max(1.0, WARM_UP * self.steps)
        return min(rise, 0.5 + 0.5 * math.cos(math.pi * min(1.0, done)))

    @property
    def over(self) -> bool:
        return self.steps is not None and self.step >= self.steps


Report = Callable[[], dict[str, float]]


def fit(
    forward: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter],
    budget: Budget,
    report: Report,
    log: Callable[[dict[str, float]], None],
    *,
    lr: float,
    weight_decay: float,
    samples: int,
) -> None:
    """Trains with AdamW on the loss that `forward` returns until the budget is spent. Only matrices have weight decay.

    Synchronizes only for reports, about every REPORT_S seconds. `samples`: samples per step, to report the speed.
    """
    weights = [p for p in parameters if p.requires_grad]
    device = weights[0].device
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-8, fused=True)
    next_look = 10
    while not budget.over:
        for group in optimizer.param_groups:
            group["lr"] = lr * budget.rate
        loss = forward()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        budget.step += 1
        if budget.step >= next_look or budget.over:
            value = float(loss.detach())  # synchronizes
            pace = budget.measure()
            log({"step": budget.step, "steps": budget.steps or 0, "seconds": round(budget.elapsed_s, 1),
                 "loss": round(value, 4), "samples_per_s": round(pace * samples, 1), **report()})  # fmt: skip
            _wait(device)
            budget.measure()  # excludes the time spent on the report
            next_look = budget.step + max(5, int(pace * REPORT_S))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def logger(file: Path) -> Callable[[dict[str, float]], None]:
    """A function that prints each report and appends it to `file`, one JSON object per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")

    def log(values: dict[str, float]) -> None:
        print("  ".join(f"{key} {value:g}" for key, value in values.items()), flush=True)
        with file.open("a") as out:
            out.write(json.dumps(values) + "\n")

    return log


def save(folder: Path, ours: Mapping[str, Tensor], rules: Iterable[Rule], config: dict[str, Any]) -> None:
    """Writes model.safetensors in float16 under Hugging Face's names, with q, k and v separate, and config.json."""
    table, items = tuple(rules), list[OutputTensor]()
    for name, tensor in ours.items():
        names = disk_names(name, table)
        parts = tensor.detach().to("cpu", torch.float16).chunk(len(names))
        for disk, part in zip(names, parts, strict=True):
            values = partial(iter, (part,))
            items.append(OutputTensor(name=disk, dtype=part.dtype, shape=tuple(part.shape), chunks=values, where=name))
    write_safetensors(folder / "model.safetensors", items, lambda n_bytes: None)
    write_json(folder / "config.json", config)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, float32 on a CPU, where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
