"""Small tensors on their way between host and device, without waiting for what the device is computing.

Staging buffers are pinned memory. PyTorch uses one again only after the copies from or to it are complete.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns numbers, or a tensor on the host, as a tensor on the device."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def copy_to_device(values: Tensor, out: Tensor) -> None:
    """Copies a tensor on the host to memory on the device."""
    out.copy_(values.pin_memory() if out.device.type == "cuda" else values, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """Starts to copy x to the host. On a GPU, the result holds its values once the stream has come to this point."""
    if x.device.type != "cuda":
        return x.to("cpu")
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context in which kernels run on this device, also where a library takes the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
