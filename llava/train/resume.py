"""Resumable checkpoints of trained weights, optimizer state and step.

The step determines the sample order and random seeds. All ranks write a checkpoint together, in the background and
under a temporary name. A checkpoint can be loaded on any number of ranks.
"""

import json
import re
import shutil
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from llava.errors import CheckpointError
from llava.tensors.atomic import size_text
from llava.train.distributed import World
from llava.train.log import explain_write_errors
from llava.train.signals import defer_signals

_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen weights come from the initial checkpoint
_PROGRESS = "progress.json"


def step_of(checkpoint: Path) -> int:
    """Returns the step of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))


class Checkpointer:
    """Saves and loads the checkpoints of one run. On exit, the context manager waits for any unfinished write."""

    def __init__(self, folder: Path, keep_last: int, world: World):
        self.folder, self.keep_last, self.world = folder, keep_last, world
        self._pending: tuple[Future[Any], Path, Path] | None = None  # future, temporary path, final path

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            with suppress(CheckpointError):  # the error raised by the run takes precedence
                self.finish()

    def remove_partial(self) -> None:
        """Deletes partial checkpoints left by a killed run. Call on rank 0 only, before the first `save`."""
        for partial in self.folder.glob(".step-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def latest(self) -> Path | None:
        """Returns the newest complete checkpoint, or None."""
        return max(self._complete(), default=None)

    def load(self, checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Loads a checkpoint into the model and the optimizer. Returns the `progress` passed to `save`.

        Raises CheckpointError if the checkpoint cannot be read.
        """
        try:
            progress = json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8"))
            weights, moments = get_state_dict(model, optimizer, options=_OPTIONS)
            state: dict[str, Any] = {"model": weights, "optimizer": moments}
            load(state, checkpoint_id=checkpoint, process_group=self.world.checkpoint_group)
        except (OSError, ValueError, KeyError, RuntimeError, CheckpointException) as error:
            raise CheckpointError(
                f"{checkpoint}: cannot be read ({_reason(error)}); remove this checkpoint to resume from the "
                "previous one"
            ) from None
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_OPTIONS,
        )
        return progress

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> None:
        """Copies the training state after `step` steps and starts writing the copy in the background.

        Raises CheckpointError if the previous checkpoint could not be written.
        """
        self.finish()
        final = self.folder / f"step-{step:08}"
        partial = final.with_name(f".{final.name}.partial")
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            with explain_write_errors(partial):
                partial.mkdir(parents=True)
                (partial / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        self.world.barrier()
        weights, moments = get_state_dict(model, optimizer, options=_OPTIONS)
        state = {"model": weights, "optimizer": moments}
        with defer_signals():  # an interrupt before the assignment would keep `finish` from waiting for this write
            future = async_save(state, checkpoint_id=partial, process_group=self.world.checkpoint_group)
            assert isinstance(future, Future)
            self._pending = future, partial, final

    def poll(self) -> None:
        """Calls `finish` if the background write has completed. Raises CheckpointError if the write failed."""
        if self._pending and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Waits for any background write, renames its folder, and deletes old checkpoints. Raises CheckpointError."""
        if not self._pending:
            return
        future, partial, final = self._pending
        try:
            future.result()
            if self.world.is_main:
                if partial.exists():  # False if an earlier call was interrupted after the rename
                    shutil.rmtree(final, ignore_errors=True)
                    partial.rename(final)
                for old in sorted(self._complete())[: -self.keep_last]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError, CheckpointException) as error:
            self._pending = None
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{final}: cannot be written ({_write_reason(error, self.folder)}); free some space and run the same "
                f"command again to {self._continuation()}"
            ) from None
        self._pending = None

    def _continuation(self) -> str:
        latest = self.latest()
        return f"continue from step {step_of(latest)}" if latest else "start from step 0, as no checkpoint is complete"

    def _complete(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name)]


def _write_reason(error: BaseException, folder: Path) -> str:
    """Formats a write error. torch reports a full disk only as a failed check of its zip writer."""
    reason = _reason(error)
    if not re.search(r"enforce fail|PytorchStreamWriter|unexpected pos", reason):
        return reason
    free = next(shutil.disk_usage(path).free for path in (folder, *folder.parents) if path.exists())
    return f"the write stopped short; the disk has {size_text(free)} free"


def _reason(error: BaseException) -> str:
    """Formats an error as one line. If several ranks failed, uses the error from the first of them."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
