"""Checkpoints to go on from: what learns, the optimiser, the step. Data order and random numbers follow from the step.

Written beside the running steps, under a temporary name, by all ranks together; readable by any other number of ranks.
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
from llava.train.endings import uninterrupted
from llava.train.log import writing
from llava.train.ranks import Ranks

_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen weights come from where the run started
_PROGRESS = "progress.json"


class Saver:
    """The checkpoints of one run; a context that ends with none half written, be it by an error."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        self.folder, self.keep, self.ranks = folder, keep, ranks
        self._writing: tuple[Future[Any], Path, Path] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            with suppress(CheckpointError):  # the run's own error is the one to tell
                self.finish()

    def clean(self) -> None:
        """Removes what a killed run left half written. For rank 0, before any `save`."""
        for partial in self.folder.glob(".step-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def newest(self) -> Path | None:
        """The last checkpoint that was written whole."""
        return max(self._whole(), default=None)

    def load(self, checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Puts it into model and optimiser; returns what `save` was told of progress. Raises CheckpointError."""
        try:
            progress = json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8"))
            weights, moments = get_state_dict(model, optimizer, options=_OPTIONS)
            state: dict[str, Any] = {"model": weights, "optimizer": moments}
            load(state, checkpoint_id=checkpoint, process_group=self.ranks.saving)
        except (OSError, ValueError, KeyError, RuntimeError, CheckpointException) as error:
            raise CheckpointError(
                f"{checkpoint}: can not be read ({_reason(error)}); remove it to go on from the one before"
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
        """Copies the state and writes it while the run goes on. `step`: steps that are done."""
        self.finish()
        final = self.folder / f"step-{step:08}"
        partial = final.with_name(f".{final.name}.partial")
        if self.ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
            with writing(partial):
                partial.mkdir(parents=True)
                (partial / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        self.ranks.wait()
        weights, moments = get_state_dict(model, optimizer, options=_OPTIONS)
        state = {"model": weights, "optimizer": moments}
        with uninterrupted():  # else nobody waits for the thread that writes
            future = async_save(state, checkpoint_id=partial, process_group=self.ranks.saving)
            assert isinstance(future, Future)
            self._writing = future, partial, final

    def poll(self) -> None:
        """Gives a checkpoint that is written its final name, if one is."""
        if self._writing and self._writing[0].done():
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written. Raises CheckpointError if that failed."""
        if not self._writing:
            return
        future, partial, final = self._writing
        try:
            future.result()
            if self.ranks.first:
                if partial.exists():  # else an interrupt came behind this line
                    shutil.rmtree(final, ignore_errors=True)
                    partial.rename(final)
                for old in sorted(self._whole())[: -self.keep]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError, CheckpointException) as error:
            self._writing = None
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{final}: can not be written ({_reason(error)}); make room, and the same command goes on from the "
                "checkpoint before"
            ) from None
        self._writing = None

    def _whole(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name)]


def _reason(error: BaseException) -> str:
    """In one line; where ranks failed, the first of them."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
