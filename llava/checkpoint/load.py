"""From a resolved checkpoint to a model with its weights, in one type and on one device."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.checkpoint.open import check_headers
from llava.config import LlavaConfig
from llava.errors import ConfigError
from llava.formats.format import Checkpoint
from llava.model.llava import Llava, meta_model, shapes
from llava.model.lora import Adapter, LoraLinear
from llava.tensors.files import check_finite
from llava.tensors.lazy import Concat, FromFile, LazyTensor
from llava.tensors.sums import WithLora

_PoolKey = tuple[tuple[Path, str], ...]
Pool = dict[_PoolKey, Tensor]  # tensors already read, by file and names, that several models share
Store = Callable[[nn.Module, str, LazyTensor], None]  # puts a tensor into a module's parameter of that name


def load_weights(model: Llava, tensors: Mapping[str, LazyTensor], store: Store) -> None:
    """Puts every tensor into the module that has it; the weight of a LoRA's matrix goes to its frozen base.

    Inference and training load through this function and differ in `store`.
    """
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        store(module.base if isinstance(module, LoraLinear) else module, leaf, tensor)


def read_finite(tensor: LazyTensor, force: bool = False) -> Tensor:
    """Reads a tensor. Raises CheckpointError on NaN and Inf (`force`: warns)."""
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
    """The model for inference. Weights that already have the right type and device stay memory-mapped.

    pool: LoRAs are kept separate from their matrices, and tensors that another model with the same pool has read are
    shared. Raises CheckpointError if a tensor is missing, has another shape, or has NaN or Inf (`force`: warns).
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
    """Identifies tensors read from files; None for computed ones."""
    parts = tensor.parts if isinstance(tensor, Concat) else [tensor]
    files = [part for part in parts if isinstance(part, FromFile)]
    if len(files) < len(parts):
        return None
    return tuple((part.weights.headers[part.name].file, part.name) for part in files)


def _separate_loras(model: Llava, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Replaces each sum of a matrix and a LoRA by its terms, in the tensors and in the model's modules."""
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
    """The parts of a matrix by their first row: an adapter, or the number of rows without one."""
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
    """`auto` is the first GPU if there is one, else the CPU. Raises ConfigError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r} does not exist: this machine has {torch.cuda.device_count()} GPUs")
    return chosen


def resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """`auto` is the stored type on a GPU; on a CPU bfloat16, or float32 below 1 B parameters. Raises ConfigError."""
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
        raise ConfigError(f"dtype is {dtype!r}; expected auto, {', '.join(known)}")
    return known[dtype]


def n_parameters(config: LlavaConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes(config).values())
