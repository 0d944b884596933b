"""The folders that keep compiled GPU kernels from one process to the next.

Code is loaded from them and run, so they must not be writable by other users. The default of torch's compiler is a
folder in /tmp, with a name that another user can take first.
"""

import atexit
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

_VARIABLES = {"triton": "TRITON_CACHE_DIR", "inductor": "TORCHINDUCTOR_CACHE_DIR"}  # subfolder -> what overrides it


def private_folder() -> Path:
    """Returns where kernels are kept unless environment variables name other folders: ~/.cache/llava/kernels."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))  # ignored if relative, as its specification demands
    try:
        return (cache if cache.is_absolute() else Path.home() / ".cache") / "llava" / "kernels"
    except RuntimeError:  # there is no home folder
        return Path(tempfile.gettempdir(), f"llava-kernels-{os.getuid()}")


def chosen_folders() -> dict[str, Path]:
    """Returns the cache folders that environment variables name: "triton" for Triton, "inductor" for torch."""
    chosen = {part: Path(os.environ[name]) for part, name in _VARIABLES.items() if os.environ.get(name)}
    if home := os.environ.get("TRITON_HOME"):
        chosen.setdefault("triton", Path(home, ".triton", "cache"))
    return chosen


def folders() -> dict[str, Path]:
    """Returns the cache folders of the commands that load a model on a GPU, by the same names."""
    return {part: private_folder() / part for part in _VARIABLES} | chosen_folders()


def why_not_private(folder: Path) -> str | None:
    """Returns why code should not be loaded from a folder, or None if it is private or does not exist."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    if found.st_uid != os.getuid():
        return f"belongs to user {found.st_uid}, not to user {os.getuid()}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"is writable by other users (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def use_private_folder(device: str) -> None:
    """Makes Triton and torch's compiler keep kernels in a private folder, unless environment variables name others.

    Both read the variables when they compile the first kernel. If the private folder cannot be used, warns and uses a
    temporary one.

    device: the option --device. For a CPU, does nothing.
    """
    import torch

    chosen = chosen_folders()
    if device == "cpu" or len(chosen) == len(_VARIABLES) or not torch.cuda.is_available():
        return
    private = open_private(private_folder())
    os.environ |= {name: str(private / part) for part, name in _VARIABLES.items() if part not in chosen}


def open_private(folder: Path) -> Path:
    """Creates a folder with mode 0700, or sets this mode, and returns it.

    If the folder may contain what other users wrote, or cannot be created, warns and returns a temporary folder, which
    is removed when the process ends.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = why_not_private(folder)
        if problem is None:
            folder.chmod(0o700)
            return folder
    except OSError as error:
        problem = f"cannot be used ({error.strerror})"
    log.warning(
        "%s: the folder for compiled kernels %s; they are compiled again in every process. Remove it, or set "
        "XDG_CACHE_HOME to a folder of your own",
        folder,
        problem,
    )
    temporary = Path(tempfile.mkdtemp(prefix="llava-kernels-"))  # has mode 0700
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary
