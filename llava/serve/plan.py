"""What serving a model needs, from its headers: no weights are read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llava.assistant import LLAVA_TINY
from llava.checkpoint.adapters import open_separately
from llava.checkpoint.load import n_parameters, resolve_device, resolve_dtype
from llava.config import EngineOptions, LoadOptions
from llava.engine.memory import free_bytes, n_pages
from llava.errors import ConfigError
from llava.model.paged import cache_bytes_per_token
from llava.tensors.atomic import size_text


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory and capacity of a server."""

    name: str
    adapters: list[str]
    device: str
    dtype: str
    weight_bytes: int  # without adapters
    free_bytes: int  # of the device, before loading
    cache_tokens: int
    cache_bytes: int
    context: int  # tokens
    max_batch: int  # sequences that run at the same time
    full_sequences: int  # sequences of full length that the cache holds

    def text(self) -> str:
        """Returns lines for people."""
        adapters = f" with {', '.join(self.adapters)}" if self.adapters else ""
        return "\n".join(
            [
                f"{self.name}{adapters}, in {self.dtype} on {self.device}",
                f"weights:   {size_text(self.weight_bytes)} of {size_text(self.free_bytes)} free",
                f"cache:     {self.cache_tokens} tokens, {size_text(self.cache_bytes)}",
                f"sequences: {self.max_batch} at once; the cache holds {self.full_sequences} of {self.context} tokens",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan for JSON."""
        return asdict(self)


def make_plan(
    model: str | Path | None,
    name: str,
    options: LoadOptions,
    engine: EngineOptions,
    *,
    adapters: Mapping[str, str],
    dtype: str,
    device: str,
) -> Plan:
    """Returns the plan. Raises LlavaError if the model cannot be served with these options."""
    target = resolve_device(device)
    checkpoints = open_separately(LLAVA_TINY if model is None else model, adapters, options, merge=True)
    compute = resolve_dtype(dtype, next(iter(checkpoints.values())), target)
    config, free = checkpoints[None].config, free_bytes(target)
    weight_bytes = n_parameters(config) * compute.itemsize
    if weight_bytes > free:
        raise ConfigError(
            f"the weights need {size_text(weight_bytes)} in {_name(compute)}, but only {size_text(free)} are free on "
            f"{target}"
        )
    pages = n_pages(config.decoder, engine, compute, target, reserved_bytes=weight_bytes)
    tokens = pages * engine.page_size
    return Plan(
        name=name,
        adapters=list(adapters),
        device=str(target),
        dtype=_name(compute),
        weight_bytes=weight_bytes,
        free_bytes=free,
        cache_tokens=tokens,
        cache_bytes=tokens * cache_bytes_per_token(config.decoder, compute),
        context=config.decoder.max_seq,
        max_batch=engine.max_batch,
        full_sequences=tokens // config.decoder.max_seq,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
