"""Reads JSON and tensor files: tensor headers are read up front, values are memory-mapped on access."""

import json
import logging
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

from llava.errors import CheckpointError, counted

log = logging.getLogger(__name__)

# File names that Hugging Face, PEFT and LLaVA use; where several are listed, the first one found is read.
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILE = "non_lora_trainables.bin"  # fully fine-tuned weights that accompany a LoRA adapter in LLaVA
PROJECTOR_FILE = "mm_projector.bin"
ADDED_ROWS_FILE = "llava_hf_rows.safetensors"  # our own: vocabulary rows that only llava-hf has

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
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}  # as spelled in safetensors files


# ------------------------------------------------------------------------------------------------------ JSON


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError if the file is missing or does not contain a JSON object."""
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing; the checkpoint is incomplete")
    refuse_lfs_pointer(file)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); download the file again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def read_json_if_present(file: Path) -> dict[str, Any]:
    """Like `read_json`, but returns {} if the file does not exist."""
    return read_json(file) if file.is_file() else {}


def refuse_lfs_pointer(file: Path) -> None:
    """Raises CheckpointError if `git clone` without Git LFS left only a pointer to the file."""
    magic = b"version https://git-lfs"
    if not file.is_file():  # a named pipe would block
        return
    try:
        with file.open("rb") as start:
            found = start.read(len(magic))
    except OSError:  # reported when the file is opened
        return
    if found == magic:
        raise CheckpointError(f"{file}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


@contextmanager
def parsing(file: Path) -> Iterator[None]:
    """Converts exceptions caused by missing keys or values of the wrong type in `file` to CheckpointError."""
    try:
        yield
    except KeyError as key:
        raise CheckpointError(f"{file}: the key {key} is missing; download the file again") from None
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{file}: a value has the wrong type ({error}); download the file again") from None


# --------------------------------------------------------------------------------------------------- weights


class TensorHeader(NamedTuple):
    """File, type and shape of a stored tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def n_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Weights(Mapping[str, Tensor]):
    """Maps tensor names, as stored on disk, to the tensors in a set of files; values are memory-mapped on access."""

    def __init__(self, files: Iterable[Path], *, separate: bool = False):
        """Reads only the headers. separate: prefix names with `file/`, for files with parts of the same tensors.

        Raises CheckpointError if a file is damaged or contains anything other than tensors, or if a name occurs twice.
        """
        self.headers: dict[str, TensorHeader] = {}
        self._readers: dict[Path, Any] = {}
        for file in files:
            reader, headers = _open(file)
            if separate:
                headers = {f"{file.name}/{name}": header for name, header in headers.items()}
            if twice := sorted(set(headers) & set(self.headers)):
                raise CheckpointError(
                    f"{file}: tensor {twice[0]} is also in {self.headers[twice[0]].file.name}; the files come from "
                    "different saves: download them all again"
                )
            self._readers[file] = reader
            self.headers.update(headers)

    def __getitem__(self, name: str) -> Tensor:
        file = self.headers[name].file
        reader, name = self._readers[file], name.removeprefix(f"{file.name}/")
        tensor: Tensor = reader[name] if isinstance(reader, dict) else reader.get_tensor(name)
        return tensor

    def __iter__(self) -> Any:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)


def _open(file: Path) -> tuple[Any, dict[str, TensorHeader]]:
    refuse_lfs_pointer(file)
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file)


def _open_safetensors(file: Path) -> tuple[Any, dict[str, TensorHeader]]:
    try:
        reader: Any = safe_open(str(file), framework="pt")
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, struct.error) as error:
        size = file.stat().st_size if file.exists() else 0
        raise CheckpointError(f"{file}: is damaged or truncated at {size} bytes ({error}); download it again") from None
    headers = {}
    for name, part in slices.items():
        if (dtype := _DTYPES.get(part.get_dtype())) is None:
            raise CheckpointError(f"{file}: tensor {name} has dtype {part.get_dtype()}, which is not supported")
        headers[name] = TensorHeader(file, dtype, tuple(part.get_shape()))
    return reader, headers


# Exceptions that torch.load raises for damaged files (MemoryError if a corrupt length exceeds the available memory).
_DAMAGE = (RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError, TypeError, BadZipFile,
           struct.error, MemoryError)  # fmt: skip


def _open_bin(file: Path) -> tuple[dict[str, Tensor], dict[str, TensorHeader]]:
    """Opens a file written by torch.save. Rejects files that contain anything but tensors, without running any code."""
    try:
        mapped = is_zipfile(file)
        with file.open("rb") as start:
            if not mapped and start.read(4) == b"PK\x03\x04":
                raise CheckpointError(f"{file}: is truncated at {file.stat().st_size} bytes; download it again")
        if not mapped and is_tarfile(file):  # torch.load would unpack the tar into a folder
            raise CheckpointError(
                f"{file}: is empty or a tar archive; expected a file written by torch.save; download it again"
            )
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "Unsupported" in line or "global" in line.lower()), ""
        )
        raise CheckpointError(
            f"{file}: is damaged or contains objects that are not tensors; no code was run ({reason.strip()[:120]})"
        ) from None
    except _DAMAGE as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: is damaged or truncated ({reason}); download it again") from None
    if not isinstance(tensors, dict) or not all(_is_named_tensor(*item) for item in tensors.items()):
        raise CheckpointError(f"{file}: contents are not supported; expected a dictionary of named tensors")
    _check_storage(file, tensors)
    if not mapped:
        log.warning(
            "%s uses the file format of torch before 1.6, which cannot be memory-mapped; it was read into memory", file
        )
    return tensors, {name: TensorHeader(file, t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def _is_named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _check_storage(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless all tensors are dense CPU tensors of supported dtypes and the file can hold them.

    The check is needed because even a short pickle can declare tensors of any size.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            found = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise CheckpointError(f"{file}: tensor {name} is not supported ({found})")
    claimed, size = sum(tensor.nbytes for tensor in tensors.values()), file.stat().st_size
    if claimed > 2 * size:  # twice, because a tied head may share the embedding table's bytes
        raise CheckpointError(
            f"{file}: declares {claimed} bytes of tensors, but is only {size} bytes long; download it again"
        )


def check_finite(tensor: Tensor, where: str, force: bool = False) -> None:
    """Raises CheckpointError if `tensor` contains NaN or Inf; with `force`, logs a warning instead.

    Any NaN or Inf appears in the minimum or maximum; computing the two takes one pass and no copy.
    """
    if not tensor.numel() or not tensor.is_floating_point():
        return
    low, high = torch.aminmax(tensor)
    if low.isfinite() and high.isfinite():
        return
    bad = int((~tensor.isfinite()).sum())
    if not force:
        raise CheckpointError(
            f"{where}: contains NaN or Inf ({bad} of {counted(tensor.numel(), 'value')}); download the file again, or "
            "pass force=True (--force)"
        )
    log.warning("%s: contains NaN or Inf (%s)", where, counted(bad, "value"))
