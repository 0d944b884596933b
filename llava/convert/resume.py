"""A resumable sharded writer: after an interruption, rerunning the command continues from the temporary folder."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from llava.errors import CheckpointError, LlavaError
from llava.tensors.atomic import check_space, free_folder, rename_in, replacing
from llava.tensors.files import Weights, read_json_if_present
from llava.tensors.lock import locked
from llava.tensors.writer import OutputTensor, Progress, plan_shards, stream_safetensors, write_json

log = logging.getLogger(__name__)

_STATE = "merge.json"  # state file: inputs of the run and checksums of complete shards
_LOCK = ".lock"
SUMS = "SHA256SUMS"  # readable by sha256sum --check


@dataclass(frozen=True, kw_only=True)
class PartialFolder:
    """An output folder that is still being written."""

    folder: Path
    inputs: Mapping[str, Any]  # only a run with the same inputs may resume from this folder
    sha256: dict[str, str] = field(default_factory=dict)  # name of each complete shard -> checksum

    def write_shards(
        self, outputs: Sequence[OutputTensor], progress: Progress, max_bytes: int
    ) -> dict[str, list[OutputTensor]]:
        """Writes shards of at most `max_bytes`, skipping complete shards. Returns file name -> tensors in the shard."""
        shards = plan_shards(outputs, max_bytes)
        total, done = sum(out.n_bytes for out in outputs), 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            progress(done, total)

        for name, shard in shards.items():
            if name in self.sha256 and (self.folder / name).is_file():
                count(sum(out.n_bytes for out in shard))
                continue
            self.sha256[name] = _write_shard(self.folder / name, shard, count)
            self.save_state()
        return shards

    def verify(self, shards: Mapping[str, Sequence[OutputTensor]], progress: Progress) -> None:
        """Checks the shards against their checksums and against recomputed tensors. Raises CheckpointError."""
        total, done = sum(out.n_bytes for shard in shards.values() for out in shard), 0
        for name, shard in shards.items():
            file = self.folder / name
            if _sha256(file) != self.sha256[name]:
                raise CheckpointError(f"{file}: was changed by a disk error or another process after it was written")
            weights = Weights([file])
            for out in shard:
                _compare(out, weights, file)
                done += out.n_bytes
                progress(done, total)

    def save_state(self) -> None:
        with replacing(self.folder / _STATE) as partial:
            write_json(partial, {"inputs": dict(self.inputs), "sha256": self.sha256})


def _compare(out: OutputTensor, weights: Weights, file: Path) -> None:
    stored = weights[out.name].split([len(chunk) for chunk in out.chunks()])
    for computed, written in zip(out.chunks(), stored, strict=True):
        computed = computed.to(out.dtype).contiguous()  # view() fails on transposed tensors, as in some .bin files
        if not torch.equal(computed.view(torch.uint8), written.view(torch.uint8)):
            raise CheckpointError(f"{file}: {out.name} does not match the recomputed tensor; merge again")


@contextmanager
def resumable_folder(target: Path, inputs: Mapping[str, Any], n_bytes: int) -> Iterator[PartialFolder]:
    """Yields a `PartialFolder` at `target.partial`, which is renamed to `target` (absent or empty) on success.

    Complete shards from an interrupted run with the same `inputs` are kept. A LlavaError in the with block, e.g. for
    invalid input, removes the partial folder; a full disk or Ctrl-C does not. Raises CheckpointError.
    """
    target = free_folder(target)
    folder = target.with_name(f"{target.name}.partial")
    lock = folder / _LOCK  # inside, so that it does not stay behind when a user removes the folder of a killed run
    try:
        if target.exists():  # fail before the work starts if the target cannot be replaced
            target.rmdir()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror}); choose another folder") from None
    busy = CheckpointError(f"{folder}: another process is writing to it; wait for that process or stop it")
    with locked(folder, lock, busy):
        partial = PartialFolder(folder=folder, inputs=inputs, sha256=_complete_shards(folder, inputs))
        done = sum((folder / name).stat().st_size for name in partial.sha256)
        try:
            check_space(folder, n_bytes - done, target)
        except CheckpointError:
            if not partial.sha256:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        with _keeping_progress(folder, target):
            partial.save_state()
            yield partial
            sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(partial.sha256.items()))
            (folder / SUMS).write_text(sums, encoding="utf-8")
            if target.exists():
                target.rmdir()
            for name in (_STATE, _LOCK):  # last: without its state, the folder cannot be resumed any more
                (folder / name).unlink(missing_ok=True)
            folder.rename(target)


@contextmanager
def _keeping_progress(folder: Path, target: Path) -> Iterator[None]:
    """Removes `folder` on a LlavaError, e.g. for invalid input. On OSError or Ctrl-C, keeps it for a later run."""
    try:
        yield
    except LlavaError as error:
        shutil.rmtree(folder, ignore_errors=True)
        rename_in(error, folder, target)
        raise
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error.strerror or error}); complete files are kept in {folder}; fix "
            "the cause and run the same command again"
        ) from None
    except KeyboardInterrupt:
        if folder.exists():  # otherwise, the target was already complete
            log.warning("complete files are kept in %s; run the same command again to resume", folder)
        raise


def _complete_shards(folder: Path, inputs: Mapping[str, Any]) -> dict[str, str]:
    """Returns the names and checksums of intact shards from an earlier run, and removes unfinished files.

    Raises CheckpointError if that run had different inputs.
    """
    if {file.name for file in folder.iterdir()} <= {_LOCK}:
        return {}
    state = read_json_if_present(folder / _STATE)
    if not state and (folder / SUMS).is_file():
        raise CheckpointError(
            f"{folder}: is a complete result, but the run was killed before it was renamed; rename it, "
            "or remove it to start over"
        )
    if state.get("inputs") != inputs:
        raise CheckpointError(
            f"{folder}: contains partial output of another job, or the inputs have changed; remove the folder "
            "or choose another target"
        )
    for unfinished in folder.glob(".*.partial-*"):
        unfinished.unlink()
    found = ((folder / name, digest) for name, digest in state["sha256"].items() if (folder / name).is_file())
    return {file.name: digest for file, digest in found if _sha256(file) == digest}


def _write_shard(file: Path, outputs: Sequence[OutputTensor], on_bytes: Callable[[int], None]) -> str:
    """Writes one shard and returns its checksum."""
    with replacing(file) as partial, partial.open("wb") as raw, _HashingWriter(raw) as out:
        stream_safetensors(out, outputs, on_bytes)
    return out.sha256.hexdigest()


class _HashingWriter:
    """Writes each chunk in one thread and hashes it in another, while the caller computes the next chunk."""

    def __init__(self, raw: BinaryIO):
        self.sha256 = hashlib.sha256()
        self._raw = raw
        self._pool = ThreadPoolExecutor(2)
        self._last: list[Future[Any]] = []

    def __enter__(self) -> "_HashingWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait()

    def write(self, data: Any) -> None:
        """Starts writing `data`, which must not be modified afterwards. Raises OSError if the previous write failed."""
        self._wait()
        self._last = [self._pool.submit(self._raw.write, data), self._pool.submit(self.sha256.update, data)]

    def _wait(self) -> None:
        for last in self._last:
            last.result()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as raw:
        while chunk := raw.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
