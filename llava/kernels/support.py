"""Which kernels can run here, and the parts of Triton that their files use.

A kernel file contains the Triton kernel, an eager twin and one function that calls whichever can run. With Triton's
interpreter (environment variable TRITON_INTERPRET=1), the kernels run on a CPU, for tests.
"""

import shutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except (ImportError, OSError, RuntimeError):  # also what a broken installation raises
        return None


triton, tl = _imported("triton"), _imported("triton.language")
_cuda = _imported("triton.language.extra.cuda")
_errors = _imported("triton.errors")
_descriptors = _imported("triton.tools.tensor_descriptor")
TensorDescriptor: Any = getattr(_descriptors, "TensorDescriptor", None)
TritonError: type[Exception] = getattr(_errors, "TritonError", RuntimeError)
gdc_wait: Any = getattr(_cuda, "gdc_wait", None)
gdc_launch_dependents: Any = getattr(_cuda, "gdc_launch_dependents", None)


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Compiles a Triton kernel at its first launch. Without Triton, returns the function, which cannot be called.

    options: those of `triton.jit`, such as `do_not_specialize`.
    """
    return function if triton is None else triton.jit(function, **options)


def is_interpreted() -> bool:
    """Returns whether Triton's interpreter runs the kernels, on any device."""
    return triton is not None and triton.knobs.runtime.interpret


@cache
def why_not(device: torch.device) -> str | None:
    """Returns why Triton kernels cannot run on a device, or None if they can."""
    if triton is None:
        return "Triton is not installed, or cannot be imported"
    if is_interpreted():
        return None
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "there is no C compiler, which Triton needs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def can_run(device: torch.device) -> bool:
    """Returns whether Triton kernels can run on a device."""
    return why_not(device) is None


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Returns whether a kernel can start while its predecessor drains (programmatic dependent launch; Hopper)."""
    if gdc_wait is None or is_interpreted() or device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def shared_memory(device: torch.device) -> int:
    """Returns how many bytes of shared memory a program can have."""
    if device.type != "cuda":
        return 2**20  # in Triton's interpreter there is no limit
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def launch_options(device: torch.device, **options: Any) -> dict[str, Any]:
    """Returns the last arguments of a launch: PDL, which is whether it is a dependent launch, and Triton's options."""
    dependent = has_dependent_launch(device)
    return {"PDL": dependent, **options, **({"launch_pdl": True} if dependent else {})}


def next_power_of_2(n: int) -> int:
    """Returns the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
