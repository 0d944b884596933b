"""Builds a model from a resolved checkpoint, with all weights in one dtype on one device."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.checkpoint.consistency import check_headers
from llava.config import LlavaConfig
from llava.errors import ConfigError, counted
from llava.formats.format import Checkpoint
from llava.model.llava import Llava, meta_model, shapes
from llava.model.lora import Adapter, LoraLinear
from llava.tensors.files import check_finite
from llava.tensors.lazy import Concat, FromFile, LazyTensor
from llava.tensors.sums import WithLora

_PoolKey = tuple[tuple[Path, str], ...]
Pool = dict[_PoolKey, Tensor]  # tensors already read, by file and name; shared by several models
Store = Callable[[nn.Module, str, LazyTensor], None]  # stores a tensor as the named parameter of a module


def load_weights(model: Llava, tensors: Mapping[str, LazyTensor], store: Store) -> None:
    """Calls `store` for every tensor with the module that it belongs to: in a LoraLinear, the frozen `base` layer.

    Inference and training both use this function, with different `store` callbacks.
    """
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        store(module.base if isinstance(module, LoraLinear) else module, leaf, tensor)


def read_finite(tensor: LazyTensor, force: bool = False) -> Tensor:
    """Reads a tensor. If it contains NaN or Inf, raises CheckpointError, or logs a warning if `force` is true."""
    value = tensor.read()
    check_finite(value, tensor.where, force)
    return value


def build(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    force: bool = False,
    pool: Pool | None = None,
) -> Llava:
    """Builds the model for inference. Weights that already have the right dtype and device stay memory-mapped.

    pool: if given, LoRAs are kept separate from their matrices, and tensors are shared with other models built with
    the same pool. Raises CheckpointError if a tensor is missing, has the wrong shape, or contains NaN or Inf; with
    `force`, NaN and Inf only cause a warning.
    """
    check_headers(checkpoint)
    model = meta_model(checkpoint.config)
    tensors = checkpoint.tensors if pool is None else _separate_loras(model, checkpoint.tensors)

    def read(tensor: LazyTensor) -> Tensor:
        key = _pool_key(tensor)
        if pool is None or key is None:
            return read_finite(tensor, force).to(device, dtype)
        if key not in pool:
            pool[key] = read_finite(tensor, force).to(device, dtype)
        return pool[key]

    def store(module: nn.Module, leaf: str, tensor: LazyTensor) -> None:
        module.register_parameter(leaf, nn.Parameter(read(tensor), requires_grad=False))

    load_weights(model, tensors, store)
    if checkpoint.config.decoder.tied:
        model.decoder.head.weight = model.decoder.embed.weight
    return model.requires_grad_(False).eval()


def _pool_key(tensor: LazyTensor) -> _PoolKey | None:
    """Returns a key that identifies a tensor read from files, or None for a computed tensor."""
    parts = tensor.parts if isinstance(tensor, Concat) else [tensor]
    files = [part for part in parts if isinstance(part, FromFile)]
    if len(files) < len(parts):
        return None
    return tuple((part.weights.headers[part.name].file, part.name) for part in files)


def _separate_loras(model: Llava, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Replaces each `WithLora` tensor with its base and LoRA tensors, and its layer in the model with `LoraLinear`."""
    separate = dict(tensors)
    for name, tensor in tensors.items():
        if not isinstance(tensor, WithLora):
            continue
        path = name.removesuffix(".weight")
        separate[name] = tensor.base
        for pair in tensor.pairs:
            separate[f"{path}.adapters.{pair.first}.a"] = pair.a
            separate[f"{path}.adapters.{pair.first}.b"] = pair.b
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLinear(model.get_submodule(path), _parts(tensor)))
    return separate


def _parts(tensor: WithLora) -> dict[str, Adapter | int]:
    """Returns {first row: Adapter} for the row ranges that have a LoRA and {first row: row count} for the others."""
    parts: dict[str, Adapter | int] = {}
    end, (rows, columns) = 0, tensor.shape
    for first, a, b, scale in sorted(tensor.pairs, key=lambda pair: pair.first):
        if first > end:
            parts[str(end)] = first - end
        with torch.device("meta"):
            parts[str(first)] = Adapter(columns, b.shape[0], a.shape[0], scale)
        end = first + b.shape[0]
    return parts | ({str(end): rows - end} if end < rows else {})


def resolve_device(device: str | torch.device) -> torch.device:
    """Returns the device. `auto` selects the first GPU if there is one, else the CPU. Raises ConfigError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= (n := torch.cuda.device_count()):
        raise ConfigError(f"device {device!r} does not exist: this machine has {counted(n, 'GPU')}")
    return chosen


def resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Returns the dtype. `auto` selects the checkpoint's dtype on a GPU. On a CPU, it selects float32 for models with
    fewer than 1 B parameters and bfloat16 for larger models. Raises ConfigError if the dtype is not supported.
    """
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
        raise ConfigError(f"dtype is {dtype!r}; expected one of auto, {', '.join(known)}")
    return known[dtype]


def n_parameters(config: LlavaConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes(config).values())
