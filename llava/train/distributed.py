"""The processes of a run, one per GPU: the rank and device of this process, and collectives over all ranks."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from llava.errors import ConfigError, LlavaError


@dataclass(frozen=True)
class World:
    """The rank and device of this process, and the process groups that connect it to the other ranks of the run."""

    rank: int
    size: int  # number of ranks
    local_size: int  # number of ranks on this machine
    device: torch.device
    metrics_group: dist.ProcessGroup
    # a separate group, because another thread writes checkpoints, and two threads must not share a group
    checkpoint_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums each value over all ranks. Raises LlavaError if another rank exits or does not respond."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with _explain_lost_rank():
            dist.all_reduce(total, group=self.metrics_group)
        return total.tolist()

    def barrier(self) -> None:
        """Waits until all ranks reach this call. Raises LlavaError if another rank exits or does not respond."""
        with _explain_lost_rank():
            dist.barrier(group=self.metrics_group)


@contextmanager
def _explain_lost_rank() -> Iterator[None]:
    """Converts a failed collective into a one-line LlavaError."""
    try:
        yield
    except RuntimeError as error:
        raise LlavaError(
            f"another rank exited or is not responding ({str(error).splitlines()[0]:.120}); see that rank's error"
        ) from None


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Joins the process group defined by torchrun's environment variables; without them, creates a group of size 1.

    device: auto, cpu or cuda. Raises ConfigError if it is unknown or unavailable.
    """
    single = "RANK" not in os.environ
    chosen = _choose_device(device, 0 if single else int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if single:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    try:
        groups = (dist.new_group(backend="gloo"), dist.new_group(backend="gloo"))
        local_size = 1 if single else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield World(dist.get_rank(), dist.get_world_size(), local_size, chosen, *groups)
    finally:
        dist.destroy_process_group()


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"unknown device {device!r}; expected auto, cpu or cuda")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not (n := torch.cuda.device_count()):
        raise ConfigError("no GPU was found that this PyTorch can use; to train on the CPU, pass --device cpu")
    if local_rank >= n:
        raise ConfigError(
            f"no GPU for local rank {local_rank}: this machine has {n} GPU{'s' * (n != 1)}; start at most one process "
            f"per GPU (--nproc-per-node {n}), or pass --device cpu"
        )
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen
