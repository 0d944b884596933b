"""What `llava doctor` reports: which versions, devices, kernels, extras and caches this installation has.

A probe is a generator of findings. What it raises becomes a finding too, so that a broken library or driver, which may
be why the report is made, does not prevent the rest of it.
"""

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from llava.tensors.atomic import size_text

DISTRIBUTION = "llava-native"
_DRIVER_TIMEOUT_S = 10
_MEASURE_TIMEOUT_S = 2  # per cache; the hub's can hold many files on a slow disk


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    text: str
    value: Any = None  # for JSON; None: the text


Probe = Callable[[], Iterator[Finding]]
Report = dict[str, list[Finding]]  # by section


def examine(cache_folders: Mapping[str, Path], cache_problems: Mapping[str, str]) -> Report:
    """Returns the report. Raises nothing except KeyboardInterrupt.

    cache_folders: where compiled kernels are kept. cache_problems: why some of these folders are not used.
    """
    caches = {name: partial(_cache, name, path, cache_problems.get(name)) for name, path in cache_folders.items()}
    sections: dict[str, dict[str, Probe]] = {
        "versions": {"llava": _llava, "libraries": _libraries, "torch": _torch, "driver": _driver},
        "devices": {"cpu": _cpu, "memory": _memory, "gpu": _gpus},
        "kernels": {"triton": _triton, "kernels": _kernels, "attention": _attention, "cpu": _cpu_paths},
        "extras": {"extras": _extras},
        "caches": {"hub": _hub_cache, **caches},
    }
    return {
        section: [one for name, probe in probes.items() for one in _findings(name, probe)]
        for section, probes in sections.items()
    }


def to_dict(report: Report) -> dict[str, dict[str, Any]]:
    """Returns the report as a dict that can be stored as JSON."""
    return {
        section: {one.name: one.text if one.value is None else one.value for one in findings}
        for section, findings in report.items()
    }


def _findings(name: str, probe: Probe) -> Iterator[Finding]:
    try:
        yield from probe()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        yield Finding(name, f"could not be examined: {text}", {"error": text})


# --- versions ---------------------------------------------------------------------------------------------------------


def _llava() -> Iterator[Finding]:
    import llava

    yield Finding("llava", llava.__version__)
    yield Finding("python", platform.python_version())
    yield Finding("system", platform.platform())


def _libraries() -> Iterator[Finding]:
    for name in _requirements().get("", ()):
        if name != "torch":
            yield Finding(name, _version(name) or "not installed")


def _torch() -> Iterator[Finding]:
    import torch

    yield Finding("torch", torch.__version__)
    yield Finding("cuda", torch.version.cuda or "none: this is a build of torch for CPUs")
    yield Finding("triton", _version("triton") or "not installed")


def _driver() -> Iterator[Finding]:
    yield Finding("driver", _driver_version() or "none: no NVIDIA driver was found")


def _driver_version() -> str | None:
    loaded = Path("/proc/driver/nvidia/version")
    if loaded.is_file() and (found := re.search(r"Module.*?\s(\d+(?:\.\d+)+)\s", loaded.read_text())):
        return found[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_S, check=True)
    except FileNotFoundError:
        return None
    return next(iter(done.stdout.split()), None)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, list[str]]:
    """Returns the distributions that each extra needs, and under "" those that are needed on every system."""
    found: dict[str, list[str]] = {}
    for line in metadata.requires(DISTRIBUTION) or ():
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra\s*==\s*['\"]([\w.-]+)", line)
        if name and (extra or ";" not in line):
            found.setdefault(extra[1] if extra else "", []).append(name[0])
    return found


# --- devices ----------------------------------------------------------------------------------------------------------


def _cpu() -> Iterator[Finding]:
    import torch

    from llava.model.linear import has_instructions

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    name = model[1] if model else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads, vectors = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    dtypes = ["float32", *(str(d)[6:] for d in (torch.bfloat16, torch.float16) if has_instructions(d))]
    value = {"name": name, "cores": cores, "threads": threads, "vectors": vectors, "products": dtypes}
    text = f"{name}, {cores} cores, {threads} threads; {vectors}, with instructions for products of {', '.join(dtypes)}"
    yield Finding("cpu", text, value)


def _memory() -> Iterator[Finding]:
    import torch

    from llava.engine.memory import free_bytes

    free, total = free_bytes(torch.device("cpu")), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("memory", f"{size_text(free)} free of {size_text(total)}", {"free": free, "total": total})


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("gpu", f"none: {_why_no_gpu()}")
        return
    for i in range(torch.cuda.device_count()):
        yield from _findings(f"cuda:{i}", partial(_gpu, i))


def _gpu(i: int) -> Iterator[Finding]:
    import torch

    free, total = torch.cuda.mem_get_info(i)
    found = torch.cuda.get_device_properties(i)
    capability = f"{found.major}.{found.minor}"
    yield Finding(
        f"cuda:{i}",
        f"{found.name}, compute capability {capability}, {size_text(free)} free of {size_text(total)}",
        {"name": found.name, "compute_capability": capability, "free": free, "total": total},
    )


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "this is a build of torch for CPUs"
    try:
        torch.cuda.init()
    except Exception as error:  # names the cause
        return str(error).splitlines()[0]
    return "torch finds no GPU"


# --- kernels ----------------------------------------------------------------------------------------------------------


def _triton() -> Iterator[Finding]:
    from llava.checkpoint.load import resolve_device
    from llava.kernels.support import has_dependent_launch, is_interpreted, why_not

    device = resolve_device("auto")
    problem = why_not(device)
    where = "in Triton's interpreter, for tests" if is_interpreted() else f"on {device}"
    text = f"not used, as {problem}; their eager twins are" if problem else f"used {where}"
    yield Finding("triton kernels", text, {"run": problem is None, "why_not": problem})
    launch = has_dependent_launch(device)
    text = "used between kernels" if launch else "not used: needs compute capability 9.0 and Triton"
    yield Finding("dependent launch", text, launch)
    text = "used for decoding steps and the vision tower" if device.type == "cuda" else "not used: there is no GPU"
    yield Finding("cuda graphs", text, device.type == "cuda")


def _kernels() -> Iterator[Finding]:
    """Finds the kernels by themselves: functions named `…_kernel`. A module's first line says what its kernel does."""
    from llava import kernels

    for found in iter_modules(kernels.__path__):
        if found.name != "support":
            yield from _findings(found.name, partial(_kernel, found.name))


def _kernel(name: str) -> Iterator[Finding]:
    from llava.checkpoint.load import resolve_device
    from llava.kernels import support

    module = import_module(f"llava.kernels.{name}")
    if not any(one.endswith("_kernel") for one in vars(module)):
        return
    problem = getattr(module, "why_not", support.why_not)(resolve_device("auto"))
    does = (module.__doc__ or "no description").strip().splitlines()[0]
    text = f"{'eager twin' if problem else 'runs'}: {does}"
    yield Finding(name, text, {"run": problem is None, "why_not": problem, "does": does})


def _attention() -> Iterator[Finding]:
    import torch

    is_new = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    flash = is_new and torch.backends.cuda.is_flash_attention_available()
    needs = "not used: needs a GPU of compute capability 8.0"
    yield Finding("flash attention", "used for prompts" if flash else needs, flash)
    import_module("torch.nn.attention.varlen")
    yield Finding("varlen attention", "used for packed training batches" if is_new else needs, is_new)


def _cpu_paths() -> Iterator[Finding]:
    from llava.model.linear import can_pack

    packs = can_pack()
    text = (
        "used for small float32 models on the CPU" if packs else "not used: this build of torch lacks oneDNN's layout"
    )
    yield Finding("packed linear", text, packs)
    fast = _version("simplejpeg")
    yield Finding("jpeg decoder", f"simplejpeg {fast}" if fast else f"Pillow {_version('pillow')}")


# --- extras and caches ------------------------------------------------------------------------------------------------


def _extras() -> Iterator[Finding]:
    for extra, names in _requirements().items():
        if not extra:
            continue
        versions = {name: _version(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        command = f"pip install '{DISTRIBUTION}[{extra}]'"
        installed = ", ".join(f"{name} {version}" for name, version in versions.items())
        text = f"missing: {', '.join(missing)}\n{command}" if missing else installed
        yield Finding(extra, text, {"installed": not missing, "versions": versions, "command": command})


def _hub_cache() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    yield from _cache("hub", Path(HF_HUB_CACHE), None)


def _cache(name: str, folder: Path, problem: str | None) -> Iterator[Finding]:
    n_bytes, n_files, complete = measure(folder)
    size = f"{'' if complete else 'more than '}{size_text(n_bytes)} in {n_files} files" if n_files else "empty"
    text = f"{folder}: {size}" + (f"; not used: {problem}" if problem else "")
    value = {"folder": str(folder), "bytes": n_bytes, "files": n_files, "complete": complete, "problem": problem}
    yield Finding(name, text, value)


def measure(folder: Path, timeout_s: float = _MEASURE_TIMEOUT_S) -> tuple[int, int, bool]:
    """Returns the bytes and the number of files below a folder, and whether all were counted before the timeout."""
    n_bytes = n_files = 0
    end = time.monotonic() + timeout_s
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # deleted in the meantime
                n_bytes += Path(parent, name).lstat().st_size
                n_files += 1
        if time.monotonic() > end:
            return n_bytes, n_files, False
    return n_bytes, n_files, True
