"""Exports the trained model as a checkpoint: a whole model, or a LoRA or projector to be loaded with its base.

`check_export` runs the same code on the meta device before the first step, so what cannot be saved is refused then.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llava.checkpoint.detect import detect, read_files
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.errors import CheckpointError
from llava.formats import FORMATS
from llava.formats.added_rows import VOCAB_TABLES
from llava.formats.base_model import BaseModelError, check_base_format
from llava.formats.format import Checkpoint, CheckpointFiles, Detection, WriteJob
from llava.formats.llava import llava_config, own_tower_tensors, tower_name, write_own_tower
from llava.formats.lora import write_lora
from llava.formats.on_base import base_tensors
from llava.formats.projector import write_projector
from llava.formats.recorded_base import base_record
from llava.formats.tokenizer import update_json
from llava.model.llava import Llava, shapes
from llava.tensors.atomic import new_folder
from llava.tensors.files import Weights
from llava.tensors.hub import absolute_if_local
from llava.tensors.lazy import Cast, InMemory, LazyTensor, Slice
from llava.tensors.sums import WithLora
from llava.tensors.writer import no_progress
from llava.train.lora import adapter_pairs, lora_pairs, stacked
from llava.train.recipe import Recipe

log = logging.getLogger(__name__)

_FLOAT16_MAX = torch.finfo(torch.float16).max


def export_format(recipe: Recipe, checkpoint: Checkpoint) -> str:
    """Returns the format of the export: that of the recipe or, for "auto", the smallest one that holds the result."""
    if recipe.export != "auto":
        return recipe.export
    if recipe.lora_rank:
        return "lora"
    if {"decoder", "vision"} & set(recipe.train):
        return "llava"
    return "lora" if checkpoint.format == "lora" else "projector"


def check_export(folder: Path, model: Llava, checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Checks that a model can be saved to `folder` after training. `model` may be on the meta device.

    Returns the size of the export in bytes. Raises ConfigError or CheckpointError.
    """
    trained = {name: p for name, p in model.named_parameters() if _exported(name, p, checkpoint)}
    return _Export(folder, model, trained, checkpoint, recipe, check_only=True).run()


def export(folder: Path, model: Llava, checkpoint: Checkpoint, recipe: Recipe, *, first: bool) -> None:
    """Writes the trained model. Every rank must call this, but only the rank whose `first` is True writes files."""
    trained = {name: _whole(p) for name, p in model.named_parameters() if _exported(name, p, checkpoint)}
    if first:
        _Export(folder, model, trained, checkpoint, recipe).run()


def _exported(name: str, parameter: nn.Parameter, checkpoint: Checkpoint) -> bool:
    """Whether a value can be found only in the model: it was trained, or initialised for this run."""
    return parameter.requires_grad or name in checkpoint.missing


def _whole(parameter: nn.Parameter) -> Tensor:
    """Returns the full parameter on the CPU, gathered from all ranks if it is sharded."""
    tensor = parameter.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


@dataclass(frozen=True)
class _Export:
    """One export. With `check_only`, the trained tensors are on the meta device and nothing is written."""

    folder: Path
    model: Llava
    trained: Mapping[str, Tensor]  # our parameter name -> tensor, adapters included
    checkpoint: Checkpoint  # the checkpoint that training started from
    recipe: Recipe
    check_only: bool = False

    def run(self) -> int:
        """Writes or checks the export. Returns its size in bytes."""
        write = {"lora": self._lora, "projector": self._projector}.get(self.format, self._whole_model)
        return write()

    @property
    def format(self) -> str:
        return export_format(self.recipe, self.checkpoint)

    @property
    def recorded(self) -> dict[str, Any]:
        """Additional keys for config.json, as the original code records them."""
        rates = {"mm_projector_lr": self.recipe.projector_lr, "mm_vision_tower_lr": self.recipe.vision_lr}
        return {key: value for key, value in rates.items() if value}

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """The model's tensors after training, without new adapters. What was not trained is read from its source."""
        names = shapes(self.checkpoint.config)
        trained = {n: InMemory(tensor=t, origin=f"trained {n}") for n, t in self.trained.items() if n in names}
        return self.checkpoint.tensors | trained

    # ------------------------------------------------------------------------------------------------ a whole model

    def _whole_model(self) -> int:
        format, source = FORMATS[self.format], self._merged()
        prepared = format.prepare(source)
        outputs, config = format.outputs(prepared), format.write_config(prepared)
        n_bytes = sum(out.n_bytes for out in outputs) + format.extra_bytes(source)
        if not self.check_only:
            with new_folder(self.folder, n_bytes) as partial:
                format.write(WriteJob(prepared, source, outputs, config, partial, no_progress))
                if format.name == "llava":
                    update_json(partial / "config.json", self.recorded)
        return n_bytes

    def _merged(self) -> Checkpoint:
        """Returns the trained model, with adapters merged into their matrices, in the dtype of its checkpoint."""
        pairs = lora_pairs(self.model.decoder, self.trained)
        tensors = {name: WithLora(t, pairs[name]) if name in pairs else t for name, t in self.tensors.items()}
        config = replace(self.checkpoint.config, dtype=self._dtype())
        dtype = getattr(torch, config.dtype)
        return replace(
            self.checkpoint,
            config=config,
            tensors={name: t if t.dtype == dtype else Cast(t, dtype) for name, t in tensors.items()},
            missing=(),
            tower_inside=self.checkpoint.tower_inside or "vision" in self.recipe.train,
        )

    def _dtype(self) -> Any:
        """Returns the checkpoint's dtype, or bfloat16 if trained values exceed the range of float16."""
        dtype = self.checkpoint.config.dtype
        if self.check_only or dtype != "float16":
            return dtype
        largest = max((t.abs().max().item() for t in self.trained.values() if t.numel()), default=0.0)
        if largest <= _FLOAT16_MAX:
            return dtype
        log.warning("%s: saved in bfloat16, because trained values exceed the range of float16", self.folder)
        return "bfloat16"

    # ---------------------------------------------------------------------------------------------- a part of a model

    def _lora(self) -> int:
        base, checkpoint, recipe = self._base(), self.checkpoint, self.recipe
        kept = self._beyond(base)
        self._refuse_other_decoder(kept, base)
        kept |= {name: tensor for name, tensor in self.tensors.items() if name in self.trained}
        adapters = adapter_pairs(self.model.decoder, self.trained)
        pairs, r, alpha = stacked(adapters, checkpoint, recipe, meta=self.check_only)
        n_bytes = write_lora(
            self.folder,
            checkpoint.config,
            pairs,
            r=r,
            alpha=alpha,
            dropout=recipe.lora_dropout,
            base=self._base_name(),
            non_lora=kept,
            tokenizer_from=self._own_tokenizer(base),
            **self._common(base),
        )
        return n_bytes + self._tower_bytes()

    def _projector(self) -> int:
        base, tensors = self._base(), self.tensors
        kept = self._beyond(base)
        self._refuse_other_decoder({n: t for n, t in kept.items() if n not in VOCAB_TABLES}, base)
        rows = None
        if "decoder.embed.weight" in {*kept, *self.trained}:
            first = self.checkpoint.tokenizer.id_of("<im_start>")
            assert first is not None  # only tokens around images add rows to the table of a projector's base
            rows = Slice(tensors["decoder.embed.weight"], first, first + 2)
        n_bytes = write_projector(
            self.folder,
            self.checkpoint.config,
            {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")},
            base=self._base_name(),
            start_end=rows,
            tokenizer_from=self._own_tokenizer(base) or (self.checkpoint.tokenizer_folder if rows else None),
            **self._common(base),
        )
        return n_bytes + self._tower_bytes()

    def _common(self, base: Checkpoint) -> dict[str, Any]:
        source = replace(self.checkpoint, tensors=self.tensors)
        return {
            "vision_tower": tower_name(source, separate=True),
            "recorded": self.recorded | base_record(self._base_name(), base.tensors),
            "write_extra": partial(write_own_tower, source, separate=True),
            "check_only": self.check_only,
        }

    def _tower_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in own_tower_tensors(self.checkpoint, separate=True).values())

    def _base_name(self) -> str:
        return absolute_if_local(self._base_source())

    def _base_source(self) -> str:
        """Returns the base as the recipe names it, so that its tensors have the same origin as those in training."""
        recipe = self.recipe
        return recipe.model if recipe.projector else recipe.base or recipe.model

    def _base(self) -> Checkpoint:
        """Opens the language model that the export will be loaded with. Raises CheckpointError if it cannot be one."""
        files = read_files(self._base_source())
        format = detect(files).format
        config = llava_config(self.checkpoint.config, None, tower_name(self.checkpoint, separate=True))
        part = CheckpointFiles(self.folder, config, Weights([]))
        try:
            check_base_format(files, format, FORMATS.get(format), part, Detection(self.format, ["trained"]))
        except BaseModelError:
            raise self._needs_whole(f"has format {format}, which cannot be the base of a {self.format}") from None
        return open_checkpoint(files, LoadOptions(vision=False, force=True))

    def _beyond(self, base: Checkpoint) -> dict[str, LazyTensor]:
        """Returns the tensors, without LoRAs, that the base does not provide. A tower of its own is left out."""
        provided = base_tensors(base)
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if not _same(tensor.base if isinstance(tensor, WithLora) else tensor, provided.get(name))
            and (not name.startswith("vision.") or "vision.cls" in provided)
        }

    def _refuse_other_decoder(self, kept: Mapping[str, LazyTensor], base: Checkpoint) -> None:
        """Raises CheckpointError if a frozen matrix of the decoder is not the base's, as after applying a delta."""
        if other := [n for n in kept if n.startswith("decoder.") and n not in {*self.trained, *VOCAB_TABLES}]:
            raise self._needs_whole(f"the decoder differs from its base {base.path} in {other[0]}")

    def _needs_whole(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._base_name()}: {why}, so the trained {self.format} cannot be saved for it; to save a whole model "
            "instead, pass export=llava (--set export=llava)"
        )

    def _own_tokenizer(self, base: Checkpoint) -> Path | None:
        folder = self.checkpoint.tokenizer_folder
        return None if folder.resolve() == base.tokenizer_folder.resolve() else folder


def _same(one: LazyTensor, other: LazyTensor | None) -> bool:
    """Whether two tensors are read from the same place in the same way."""
    return other is not None and type(one) is type(other) and (one.where, one.shape) == (other.where, other.shape)
