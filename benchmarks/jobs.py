"""Runs one job of load.py, convert.py or merge.py in a separate process.

The last line of stdout is {"seconds": ...}, timed from when Python and the job's imports have loaded.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from processes import copy_files, read_files, weight_files
from timing import Device, DType, Target, Threads

KEPT: list[object] = []  # keeps loaded models alive, so that freeing them is not timed


def read(folder: Path, target: Target) -> None:
    read_files(weight_files(folder))


def copy(folder: Path, target: Target) -> None:
    copy_files(weight_files(folder), folder.parent / "copied")


def load(folder: Path, target: Target) -> None:
    import llava

    KEPT.append(llava.load(folder, dtype=target.dtype, device=target.device))


def load_text(folder: Path, target: Target) -> None:
    import llava

    KEPT.append(llava.load(folder, dtype=target.dtype, device=target.device, vision=False))


def load_peer(folder: Path, target: Target) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=target.dtype)
    KEPT.append(model.to(target.device))


def save_peer(folder: Path, target: Target) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder.parent / "saved")
    KEPT.append(model)


def copy_delta(folder: Path, target: Target) -> None:
    """Reads base and delta and writes as many bytes as the delta has, the minimum work of a merge."""
    copy_files(weight_files(folder / "delta"), folder / "copied")
    read_files(weight_files(folder / "base"))


def add_delta(folder: Path, target: Target) -> None:
    """Loads two models, adds one to the other and saves the sum, like the original's apply_delta."""
    from transformers import LlamaForCausalLM

    base, delta = (
        LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float16, low_cpu_mem_usage=True)
        for name in ("base", "delta")
    )
    base_state = base.state_dict()
    for name, value in delta.state_dict().items():
        rows = base_state[name]
        if value.shape == rows.shape:
            value += rows
        else:
            value[: rows.shape[0], : rows.shape[1]] += rows
    delta.save_pretrained(folder / "summed")


LLAMA = "transformers.models.llama.modeling_llama"
JOBS: dict[str, tuple[Callable[[Path, Target], None], str]] = {  # the job, and the module to import before timing
    "read": (read, "torch"),
    "copy": (copy, "torch"),
    "load": (load, "llava.assistant"),
    "load-text": (load_text, "llava.assistant"),
    "load-peer": (load_peer, LLAMA),
    "save-peer": (save_peer, LLAMA),
    "copy-delta": (copy_delta, "torch"),
    "add-delta": (add_delta, LLAMA),
}


def main(
    name: Annotated[str, typer.Argument(help=", ".join(JOBS))],
    folder: Path,
    device: Device = "cpu",
    dtype: DType = "bfloat16",
    threads: Threads = None,
) -> None:
    target = Target.from_options(device, dtype, threads)
    job, module = JOBS[name]
    importlib.import_module(module)
    if target.on_gpu:
        torch.zeros(1, device=target.device)  # creates the CUDA context
    print(json.dumps({"seconds": target.seconds(lambda: job(folder, target))}))


if __name__ == "__main__":
    typer.run(main)
