"""Locates checkpoints on disk or downloads them from the Hugging Face hub with huggingface_hub."""

import os
from collections.abc import Iterable
from pathlib import Path

from llava.errors import CheckpointError
from llava.tensors.files import ADAPTER_FILES, NON_LORA_FILE, PROJECTOR_FILE
from llava.tensors.shards import INDEX_FILES, SINGLE_FILES, weight_map

_SMALL_FILES = ("*.json", "tokenizer.model", "*.txt")


def locate(source: str | Path, *, revision: str | None = None, weights: bool = True, what: str = "checkpoint") -> Path:
    """Returns the folder of a checkpoint. Checkpoints on the hub are downloaded to huggingface_hub's cache.

    weights: also download the weight files, in one file format only.
    what: how error messages refer to the checkpoint.
    Raises CheckpointError.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        try:
            os.fsencode(folder).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{folder!r}: the path is not valid UTF-8; rename the folder") from None
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        raise CheckpointError(f"{folder}: GGUF can be written but not read; use the {what} that it was converted from")
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; expected the folder that contains the {what}")
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or str(source).startswith((".", "~")):
        raise CheckpointError(f"{source}: the {what} is neither an existing folder nor a hub id of the form owner/name")
    return _download(str(source), revision, weights, what)


def locate_file(source: str | Path, *, revision: str | None = None) -> Path | None:
    """Returns the path of a single tensor file, given as a local path or as `owner/name#file` on the hub.

    Returns None if `source` has neither form. Raises CheckpointError if the file cannot be downloaded.
    """
    if not str(source).endswith((".bin", ".safetensors")):
        return None
    if (file := Path(source).expanduser()).is_file():
        return file
    repo, _, name = str(source).partition("#")
    if file.exists() or not name or repo.count("/") != 1:
        return None
    folder = _fetch(repo, [name], revision, "checkpoint")
    if not (folder / name).is_file():
        raise CheckpointError(f"{repo}: has no file {name} on the hub or in the local cache")
    return folder / name


def find_local(source: str, folder: Path, *, revision: str | None = None) -> Path | None:
    """Returns the folder of a whole model that is on this machine, given as a folder or as a hub id in the hub's cache.

    Returns None if there is none. Relative paths are looked up in `folder`, then in the working directory. Downloads
    nothing; a model that is only partly in the cache counts as absent.
    """
    path = Path(source).expanduser()
    for candidate in (folder / path, Path.cwd() / path):
        if _is_checkpoint(candidate):
            return candidate
    if len(parts := source.split("/")) != 2 or not all(parts) or source.startswith((".", "~")):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return cached if _is_checkpoint(cached) else None


def _is_checkpoint(folder: Path) -> bool:
    """Whether the folder contains weights, and all shards that its index lists."""
    for index in INDEX_FILES:
        if (folder / index).is_file():
            try:
                return all((folder / name).is_file() for name in set(weight_map(folder / index).values()))
            except CheckpointError:  # the error is reported when the folder is opened
                return True
    return any((folder / name).is_file() for name in (*SINGLE_FILES, "consolidated.00.pth"))


def absolute_if_local(source: str | Path) -> str:
    """Makes the path of a local folder absolute, so it is valid in any working directory. Returns hub ids unchanged."""
    return str(Path(source).expanduser().absolute()) if Path(source).expanduser().is_dir() else str(source)


def _fetch(repo: str, patterns: Iterable[str], revision: str | None, what: str) -> Path:
    """Downloads all files that match `patterns` and returns the cache folder. Raises CheckpointError on failure."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{repo}: the {what} cannot be downloaded from the hub ({reason})") from None


def _download(repo: str, revision: str | None, weights: bool, what: str) -> Path:
    def fetch(patterns: Iterable[str]) -> Path:
        return _fetch(repo, patterns, revision, what)

    folder = fetch(_SMALL_FILES)
    if weights:
        sharded = [
            sorted(set(weight_map(folder / index).values())) for index in INDEX_FILES if (folder / index).is_file()
        ]
        single = ([SINGLE_FILES[0]], [SINGLE_FILES[1]], [PROJECTOR_FILE], ["consolidated.*.pth"])
        has_adapter = (folder / "adapter_config.json").is_file()
        for patterns in [[*ADAPTER_FILES, NON_LORA_FILE]] if has_adapter else [*sharded, *single]:
            folder = fetch(patterns)
            if all((folder / name).exists() for name in patterns):
                break
    return folder
