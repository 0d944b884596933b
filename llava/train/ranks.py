"""The processes of a run, one a GPU: who they are, and sums over them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from llava.errors import ConfigError, LlavaError


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    n: int
    device: torch.device
    counting: dist.ProcessGroup
    saving: dist.ProcessGroup  # apart, as checkpoints are written beside the steps: two threads must not share a group

    @property
    def first(self) -> bool:
        """The one that writes and shows."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Of each value over all ranks."""
        if self.n == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with _together():
            dist.all_reduce(total, group=self.counting)
        return total.tolist()

    def wait(self) -> None:
        """Until all are here."""
        with _together():
            dist.barrier(group=self.counting)


@contextmanager
def _together() -> Iterator[None]:
    """A rank that another leaves alone ends in a line, too."""
    try:
        yield
    except RuntimeError as error:
        raise LlavaError(
            f"another rank has ended or does not answer ({str(error).splitlines()[0]:.120}); its own message says why"
        ) from None


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """Joins the others as torchrun's environment says; without it this process is the only one.

    device: auto, cpu or cuda. Raises ConfigError.
    """
    alone = "RANK" not in os.environ
    place = _device(device, 0 if alone else int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    if alone:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    try:
        groups = (dist.new_group(backend="gloo"), dist.new_group(backend="gloo"))
        yield Ranks(dist.get_rank(), dist.get_world_size(), place, *groups)
    finally:
        dist.destroy_process_group()


def _device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not known here; expected auto, cpu or cuda")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"rank {local_rank} of this machine has no GPU: it shows {torch.cuda.device_count()}")
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    return place
