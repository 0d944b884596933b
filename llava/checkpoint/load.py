"""From a checkpoint that is understood to a model with its weights, of a type and in a place."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llava.checkpoint.files import check_finite
from llava.checkpoint.open import Checkpoint, check_headers
from llava.checkpoint.source import Source, Stored
from llava.checkpoint.sums import Adapted
from llava.config import LlavaConfig
from llava.errors import ConfigError
from llava.model.llava import Llava, shapes, meta_model
from llava.model.lora import Adapter, LoraLinear

Pool = dict[tuple[Path, tuple[str, ...]], Tensor]  # tensors that were read, by file and names: models may share them


def build(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    force: bool = False,
    pool: Pool | None = None,
) -> Llava:
    """The model with its weights. Weights that have the right type and place already stay mapped from their file.

    `pool`: LoRAs stay apart from their matrices, and a tensor that another model with this pool has read, of this type
    and in this place, is taken from there. Raises CheckpointError: a tensor is missing, has another shape, or holds NaN
    or Inf (`force`: a warning).
    """
    check_headers(checkpoint)
    model = meta_model(checkpoint.config)

    def made(source: Source) -> Tensor:
        key = (source.weights.entries[source.names[0]].file, source.names) if isinstance(source, Stored) else None
        if pool is not None and key in pool:
            return pool[key]
        tensor = source.read()
        check_finite(tensor, source.where, force)
        tensor = tensor.to(device, dtype)
        if pool is not None and key:
            pool[key] = tensor
        return tensor

    sources = checkpoint.sources if pool is None else _apart(model, checkpoint.sources)
    state = {name: made(source) for name, source in sources.items()}
    if checkpoint.config.decoder.tied:
        state["decoder.head.weight"] = state["decoder.embed.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if checkpoint.config.decoder.tied:
        model.decoder.head.weight = model.decoder.embed.weight
    return model.requires_grad_(False).eval()


def _apart(model: Llava, sources: Mapping[str, Source]) -> dict[str, Source]:
    """Sums of a matrix and a LoRA taken apart, in the model too."""
    apart = dict(sources)
    for name, source in sources.items():
        if not isinstance(source, Adapted):
            continue
        path = name.removesuffix(".weight")
        del apart[name]
        apart[f"{path}.base.weight"] = source.base
        if f"{path}.bias" in apart:
            apart[f"{path}.base.bias"] = apart.pop(f"{path}.bias")
        for adapter in source.adapters:
            apart[f"{path}.adapters.{adapter.first}.a"] = adapter.a
            apart[f"{path}.adapters.{adapter.first}.b"] = adapter.b
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLinear(model.get_submodule(path), _parts(source)))
    return apart


def _parts(source: Adapted) -> dict[str, Adapter | int]:
    """Its parts by their first row, those without a LoRA too."""
    parts: dict[str, Adapter | int] = {}
    end, (rows, columns) = 0, source.shape
    for first, a, b, scale in sorted(source.adapters, key=lambda adapter: adapter.first):
        if first > end:
            parts[str(end)] = first - end
        with torch.device("meta"):
            parts[str(first)] = Adapter(columns, b.shape[0], a.shape[0], scale)
        end = first + b.shape[0]
    return parts | ({str(end): rows - end} if end < rows else {})


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the first GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is not known; expected auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r} is not there: this machine shows {torch.cuda.device_count()} GPUs")
    return chosen


def resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own type on a GPU; on a CPU bfloat16, or float32 below 1 B parameters."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, torch.dtype):
        if dtype not in known.values():
            raise ConfigError(f"dtype {dtype} is not supported; expected one of {', '.join(known)}")
        return dtype
    if dtype == "auto":
        if device.type != "cpu":
            return known[checkpoint.config.dtype]
        return torch.float32 if n_parameters(checkpoint.config) < 1e9 else torch.bfloat16
    if dtype not in known:
        raise ConfigError(f"dtype {dtype!r} is not known; expected auto, {', '.join(known)}")
    return known[dtype]


def n_parameters(config: LlavaConfig) -> int:
    """Weights of the model as it is built."""
    return sum(torch.Size(shape).numel() for shape in shapes(config).values())
