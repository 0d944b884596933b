"""Determines which weight files of a folder form the model: one file, indexed or numbered shards, or Meta's shards.

Folders often contain the remains of several saves or of an interrupted download. If exactly one complete set of files
is present, it is opened, and a warning names anything that contradicts it. Otherwise, the error names the files.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llava.errors import CheckpointError, counted
from llava.tensors.files import ADAPTER_FILES, ADDED_ROWS_FILE, Weights, read_json

log = logging.getLogger(__name__)

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
_WEIGHT_LIKE = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.msgpack", "*.h5", "*.npz")


_TRAINER_STATE = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")


class _FileSet(NamedTuple):
    """A complete set of weight files."""

    files: tuple[Path, ...]
    listed_in: Path | None = None  # the index that lists exactly these files

    def __str__(self) -> str:
        return _some([file.name for file in self.files])


def open_weights(folder: Path) -> Weights:
    """Opens the weights in a folder: safetensors if complete, else `.bin`, else Meta's shards.

    Returns an empty mapping if the folder contains no weights. Raises CheckpointError if no set of files is complete,
    if several sets are, or if a file is damaged or does not match its index.
    """
    problems: list[str] = []
    for single in SINGLE_FILES:
        if found := _complete_set(folder, single, problems):
            for problem in problems:
                log.warning("%s; %s is loaded instead", problem, found)
            return _open_indexed(found) if found.listed_in else Weights(found.files)
    if problems:
        raise CheckpointError(problems[0])
    if lone := _lone_file(folder):
        log.warning("%s: is loaded, the only safetensors file, although its name is not model.safetensors", lone)
        return Weights([lone])
    return Weights(numbered_shards(folder), separate=True)


def _lone_file(folder: Path) -> Path | None:
    """Returns the only safetensors file beside a config.json, such as model.fp16.safetensors."""
    others = (*ADAPTER_FILES, ADDED_ROWS_FILE, "mm_projector.safetensors")
    files = [file for file in folder.glob("*.safetensors") if file.name not in others and file.is_file()]
    return files[0] if len(files) == 1 and (folder / "config.json").is_file() else None


def weight_files(folder: Path) -> list[str]:
    """Returns the names of everything in `folder` that looks like weights, for error messages."""
    found = [path for pattern in _WEIGHT_LIKE for path in folder.glob(pattern)]
    names = {path.name + "/ (a folder)" * path.is_dir() for path in found}
    names -= {name for name in names if name.startswith(_TRAINER_STATE)}
    return sorted(names | {f"{path.name}/" for path in folder.glob("global_step*") if path.is_dir()})  # DeepSpeed


def numbered_shards(folder: Path) -> list[Path]:
    """Returns Meta's shards (`consolidated.00.pth`, …). Raises CheckpointError if the numbering has a gap."""
    files = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    for i, file in enumerate(files):
        if file.name != (name := f"consolidated.{i:02}.pth"):
            raise CheckpointError(f"{folder / name}: is missing, but {file.name} is present; download the missing file")
    return files


def weight_map(index: Path) -> dict[str, str]:
    """Returns an index file's map from tensor name to shard name. Raises CheckpointError if the file is invalid."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: weight_map is missing or invalid; download the file again")
    for tensor, name in table.items():
        if not isinstance(name, str) or not name.endswith((".safetensors", ".bin")) or Path(name).name != name:
            raise CheckpointError(
                f"{index}: {tensor} is mapped to {name!r}; expected a .safetensors or .bin file in the same folder"
            )
    return table


# ---------------------------------------------------------------------------------------------------- sets of files


def _complete_set(folder: Path, single: str, problems: list[str]) -> _FileSet | None:
    """Returns the only complete set of files of one kind, named like `single`, and appends to `problems` otherwise.

    Raises CheckpointError if there are several.
    """
    index = folder / f"{single}.index.json"
    sets = [_FileSet((folder / single,))] if (folder / single).is_file() else []
    sharded = [*_numbered_sets(folder, single, problems)]
    if index.is_file():
        table = weight_map(index)
        files = tuple(folder / name for name in sorted(set(table.values())))
        if missing := [file for file in files if not file.is_file()]:
            n = sum(name == missing[0].name for name in table.values())
            present = f"; the folder contains {_some(names)}" if (names := weight_files(folder)) else ""
            problems.insert(
                0,
                f"{missing[0]}: is missing; download it ({index.name} maps {counted(n, 'tensor')} to this shard)"
                f"{present}",
            )
        else:
            sharded = [_FileSet(files, index)]  # other numbered shards are left over
    sets = [*(one for one in sets if one.files not in [more.files for more in sharded]), *sharded]
    if len(sets) > 1:
        found = " and ".join(map(str, sets))
        raise CheckpointError(f"{folder}: contains {found}, which are {len(sets)} models; remove all but one")
    return sets[0] if sets else None


def _numbered_sets(folder: Path, single: str, problems: list[str]) -> Iterator[_FileSet]:
    """Yields each complete set of shards named like model-00001-of-00002.safetensors."""
    stem, _, suffix = single.partition(".")
    groups: dict[int, dict[int, Path]] = {}
    for file in sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
        if (match := re.fullmatch(r".*-(\d{5})-of-(\d{5})\..*", file.name)) and file.is_file():
            groups.setdefault(int(match[2]), {})[int(match[1])] = file
    for n, files in groups.items():
        if missing := [i for i in range(1, n + 1) if i not in files]:
            name = f"{stem}-{missing[0]:05}-of-{n:05}.{suffix}"
            problems.append(
                f"{folder / name}: is missing; download it (the folder contains {len(files)} of {n} shards)"
            )
        else:
            yield _FileSet(tuple(files[i] for i in sorted(files)))


def _open_indexed(found: _FileSet) -> Weights:
    """Opens indexed shards. Raises CheckpointError if a tensor is not in the shard that the index names."""
    assert found.listed_in
    weights = Weights(found.files)
    for tensor, name in weight_map(found.listed_in).items():
        header = weights.headers.get(tensor)
        if header is None or header.file.name != name:
            where = f"the tensor is in {header.file.name}" if header else "no shard contains this tensor"
            raise CheckpointError(
                f"{found.listed_in}: maps {tensor} to {name}, but {where}; index and shards come from different saves: "
                "download them all again, or delete the index to load the shards as they are"
            )
    return weights


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, … {names[-1]} ({len(names)} files)"
