"""From a checkpoint that is understood to a model with its weights, of a type and in a place."""

import torch

from llava.checkpoint.files import check_finite
from llava.checkpoint.open import Checkpoint, check_headers
from llava.config import LlavaConfig
from llava.errors import ConfigError
from llava.model.llava import Llava, shapes, skeleton


def build(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, force: bool = False) -> Llava:
    """The model with its weights. Weights that have the right type and place already stay mapped from their file.

    Raises CheckpointError: a tensor is missing, has another shape, or holds NaN or Inf (`force`: a warning).
    """
    check_headers(checkpoint)
    model = skeleton(checkpoint.config)
    state = {}
    for name, source in checkpoint.sources.items():
        tensor = source.read()
        check_finite(tensor, source.where, force)
        state[name] = tensor.to(device, dtype)
    if checkpoint.config.decoder.tied:
        state["decoder.head.weight"] = state["decoder.embed.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if checkpoint.config.decoder.tied:
        model.decoder.head.weight = model.decoder.embed.weight
    return model.requires_grad_(False).eval()


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
