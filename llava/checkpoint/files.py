"""Where a checkpoint lies, and the tensors in its files, read through mapped pages."""

import json
import logging
import os
import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tarfile import is_tarfile
from typing import Any, NamedTuple
from zipfile import BadZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava.errors import CheckpointError

log = logging.getLogger(__name__)

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT's, the first that is there
TRAINED_BESIDE = "non_lora_trainables.bin"  # what LLaVA trained whole beside a LoRA
PROJECTOR_FILE = "mm_projector.bin"
_SMALL_FILES = ("*.json", "tokenizer.model", "*.txt")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}  # as safetensors writes them


def locate(source: str | Path, *, revision: str | None = None, weights: bool = True, what: str = "checkpoint") -> Path:
    """The folder of a checkpoint: a local one as it is, a hub id through huggingface_hub (cache, token, offline mode).

    `weights`: fetch the weight files too, of one format only. Raises CheckpointError.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        try:
            os.fsencode(folder).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{folder!r}: the folder's name is not UTF-8; rename it") from None
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        raise CheckpointError(f"{folder}: GGUF is written and not read; give the {what} that it was made from")
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; give the folder that the {what} lies in")
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or str(source).startswith((".", "~")):
        raise CheckpointError(f"{source}: no such folder, and not a hub id of the form owner/name, for the {what}")
    return _download(str(source), revision, weights, what)


def locate_file(source: str | Path, *, revision: str | None = None) -> Path | None:
    """The one file of tensors that is named, here or as `owner/name#file` on the hub; None: no such name.

    Raises CheckpointError where the hub does not give it.
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
        raise CheckpointError(f"{repo}: has no file {name} on the hub, or none that was fetched before")
    return folder / name


def _fetch(repo: str, patterns: Iterable[str], revision: str | None, what: str) -> Path:
    """The folder in the cache that holds those of the files that there are."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{repo}: the {what} can not be fetched from the hub ({reason})") from None


def _download(repo: str, revision: str | None, weights: bool, what: str) -> Path:
    def fetch(patterns: Iterable[str]) -> Path:
        return _fetch(repo, patterns, revision, what)

    folder = fetch(_SMALL_FILES)
    if weights:
        indexed = [
            sorted(set(_weight_map(folder / index).values())) for index in _INDEXES if (folder / index).is_file()
        ]
        adapted = (folder / "adapter_config.json").is_file()
        single = ([_SINGLES[0]], [_SINGLES[1]], [PROJECTOR_FILE], ["consolidated.*.pth"])
        for patterns in [[*ADAPTER_FILES, TRAINED_BESIDE]] if adapted else indexed[:1] or single:
            folder = fetch(patterns)
            if all((folder / name).exists() for name in patterns):
                break
    return folder


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing; the folder is not a whole checkpoint")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: can not be read as JSON ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: holds no JSON object")
    return values


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """While values of a foreign file are taken in: what is not of the kind expected becomes a CheckpointError."""
    try:
        yield
    except KeyError as key:
        raise CheckpointError(f"{file}: has no {key}; fetch it again") from None
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{file}: a value is not of its kind ({error}); fetch it again") from None


def _weight_map(index: Path) -> dict[str, str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: has no weight_map; fetch it again")
    for tensor, name in table.items():
        if not isinstance(name, str) or not name.endswith((".safetensors", ".bin")) or Path(name).name != name:
            raise CheckpointError(f"{index}: places {tensor} in {name!r}; expected the name of a shard in this folder")
    return table


class Entry(NamedTuple):
    """One tensor's header."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_values(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def n_bytes(self) -> int:
        return self.n_values * self.dtype.itemsize


class Weights(Mapping[str, Tensor]):
    """Tensors of a folder by their names on disk; values are mapped from the files when asked for."""

    def __init__(self, files: Iterable[Path], *, apart: bool = False):
        """Reads headers only. `apart`: files hold parts of the same tensors, names are `file/name`.

        Raises CheckpointError naming a file that is damaged or not what it should be.
        """
        self.entries: dict[str, Entry] = {}
        self._readers: dict[Path, Any] = {}
        for file in files:
            reader, entries = _open(file)
            if apart:
                entries = {f"{file.name}/{name}": entry for name, entry in entries.items()}
            if twice := sorted(set(entries) & set(self.entries)):
                raise CheckpointError(
                    f"{file}: {twice[0]} stands in {self.entries[twice[0]].file.name} too; remove one"
                )
            self._readers[file] = reader
            self.entries.update(entries)

    def __getitem__(self, name: str) -> Tensor:
        file = self.entries[name].file
        reader, name = self._readers[file], name.removeprefix(f"{file.name}/")
        tensor: Tensor = reader[name] if isinstance(reader, dict) else reader.get_tensor(name)
        return tensor

    def __iter__(self) -> Any:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_weights(folder: Path) -> Weights:
    """The weights of a folder: safetensors before `.bin`, sharded before single, then Meta's. Empty if it holds none.

    Raises CheckpointError (missing or broken shard, index that does not fit).
    """
    for index, single in zip(_INDEXES, _SINGLES, strict=True):
        if (folder / index).is_file():
            return _open_shards(folder, folder / index)
        if (folder / single).is_file():
            return Weights([folder / single])
    return Weights(meta_shards(folder), apart=True)


def meta_shards(folder: Path) -> list[Path]:
    """`consolidated.00.pth` and so on, as Meta's own format has them. Raises CheckpointError where one is lacking."""
    files = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    for i, file in enumerate(files):
        if file.name != (name := f"consolidated.{i:02}.pth"):
            raise CheckpointError(f"{folder / name}: is missing, {file.name} is there; fetch it")
    return files


def _open_shards(folder: Path, index: Path) -> Weights:
    table = _weight_map(index)
    files = {name: folder / name for name in sorted(set(table.values()))}
    for name, file in files.items():
        if not file.is_file():
            n = sum(value == name for value in table.values())
            raise CheckpointError(f"{file}: is missing; {index.name} places {n} tensors there: fetch the shard again")
    weights = Weights(files.values())
    for tensor, name in table.items():
        entry = weights.entries.get(tensor)
        if entry is None or entry.file != files[name]:
            where = f"it is in {entry.file.name}" if entry else "no shard holds it"
            raise CheckpointError(
                f"{index}: places {tensor} in {name}, but {where}; index and shards do not fit: fetch both"
            )
    return weights


def _open(file: Path) -> tuple[Any, dict[str, Entry]]:
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file)


def _open_safetensors(file: Path) -> tuple[Any, dict[str, Entry]]:
    try:
        reader: Any = safe_open(str(file), framework="pt")
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, struct.error) as error:
        size = file.stat().st_size if file.exists() else 0
        raise CheckpointError(f"{file}: damaged or cut short at {size} bytes ({error}); fetch it again") from None
    entries = {}
    for name, part in slices.items():
        if (dtype := _DTYPES.get(part.get_dtype())) is None:
            raise CheckpointError(f"{file}: {name} is of type {part.get_dtype()}, which is not supported")
        entries[name] = Entry(file, dtype, tuple(part.get_shape()))
    return reader, entries


_DAMAGE = (RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError, TypeError, BadZipFile,
           struct.error, MemoryError)  # what torch.load raises; the last for a length that no memory holds  # fmt: skip


def _open_bin(file: Path) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """Only tensors are unpickled; code in the file is refused, not run."""
    try:
        mapped = is_zipfile(file)
        with file.open("rb") as start:
            if not mapped and start.read(4) == b"PK\x03\x04":
                raise CheckpointError(f"{file}: cut short at {file.stat().st_size} bytes; fetch it again")
        if not mapped and is_tarfile(file):  # torch would unpack it into a folder
            raise CheckpointError(f"{file}: is empty or a tar, not what torch.save writes; fetch it again")
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "Unsupported" in line or "global" in line.lower()), ""
        )
        raise CheckpointError(
            f"{file}: holds more than tensors, or is damaged; refused, nothing in it was run ({reason.strip()[:120]})"
        ) from None
    except _DAMAGE as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: damaged or cut short ({reason}); fetch it again") from None
    if not isinstance(tensors, dict) or not all(_is_named_tensor(*item) for item in tensors.items()):
        raise CheckpointError(f"{file}: holds no table of tensors by name")
    _check_plain(file, tensors)
    if not mapped:
        log.warning("%s is in torch's format from before 1.6: it can not be mapped and was read into memory", file)
    return tensors, {name: Entry(file, t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def _is_named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _check_plain(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Values of a known type that lie in the file: a few bytes there can claim to be a tensor of any size."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise CheckpointError(f"{file}: {name} is of type {kind}, which is not supported")
    claimed, size = sum(tensor.nbytes for tensor in tensors.values()), file.stat().st_size
    if claimed > 2 * size:  # a tied head may stand for the table a second time
        raise CheckpointError(f"{file}: claims {claimed} bytes of tensors and has {size}; fetch it again")


def check_finite(tensor: Tensor, where: str, force: bool = False) -> None:
    """Refuses NaN and Inf. The smallest and the largest value show them, in one pass and without a copy."""
    if not tensor.numel() or not tensor.is_floating_point():
        return
    low, high = torch.aminmax(tensor)
    if low.isfinite() and high.isfinite():
        return
    bad = int((~tensor.isfinite()).sum())
    if not force:
        raise CheckpointError(
            f"{where}: {bad} of {tensor.numel()} values are NaN or Inf; fetch it again, or force=True"
        )
    log.warning("%s: %d values are NaN or Inf", where, bad)
