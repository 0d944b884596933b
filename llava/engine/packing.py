"""Packs the weights of small models on a CPU into a layout that makes decoding faster; see `PackedLinear`."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from llava.engine.adapters import Variant
from llava.model.linear import Linear, PackedLinear, can_pack
from llava.model.projector import Projector
from llava.model.shallow import shallow_copy
from llava.model.vision import Vision

M = TypeVar("M", bound=nn.Module)
_PACKED_BYTES = 2**30  # weights in total up to which a second copy is worth its memory


class Packer:
    """Replaces the linear layers of decoders on a CPU by `PackedLinear`, those with the same weight by the same one."""

    def __init__(self, variants: Mapping[str | None, Variant], *, active: bool):
        """active: False leaves all modules as they are."""
        self._packed: dict[int, PackedLinear] = {}
        weights = {weight.data_ptr(): weight for one in variants.values() for weight in one.model.parameters()}
        small = sum(weight.nbytes for weight in weights.values()) <= _PACKED_BYTES
        fits = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights.values())
        self._active = active and small and fits and can_pack()

    def pack(self, module: M) -> M:
        """Returns the module, or a copy of it with packed linear layers outside of the tower and the projector."""
        return shallow_copy(module, self._replace) if self._active else module

    def _replace(self, module: nn.Module) -> nn.Module | None:
        if isinstance(module, Vision | Projector):  # always have many rows
            return module
        if not isinstance(module, Linear):
            return None
        key = module.weight.data_ptr()
        if key not in self._packed:
            self._packed[key] = PackedLinear(module)
        return self._packed[key]
