"""Recognises checkpoints with quantized weights. This version cannot read any of them.

The tensors decide: a config.json also records how a model was quantized in memory while it was trained or loaded.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llava.errors import CheckpointError
from llava.formats.format import CheckpointFiles
from llava.tensors.lazy import LazyTensor

log = logging.getLogger(__name__)

_ADVICE = (
    "this version reads only float16, bfloat16 and float32 weights: use the checkpoint that was quantized, or load "
    "this one with transformers, call dequantize() and save it"
)
# Name endings of the scales and packed weights that each method stores; the first match decides.
_SIGNS = (
    (r"\.quant_state\.bitsandbytes__(nf4|fp4)", "bitsandbytes, 4 bits"),
    (r"\.(nested_)?(absmax|quant_map)", "bitsandbytes, 4 bits"),
    (r"\.(SCB|weight_format)", "bitsandbytes, 8 bits"),
    (r"\.g_idx", "GPTQ"),
    (r"\.(qweight|qzeros)", "AWQ or GPTQ"),
    (r"\.weight_(packed|zero_point|shape)", "compressed-tensors"),
    (r"\.(weight_scale(_inv|_2)?|input_scale|activation_scale|kv_scale|[kv]_scale)", "fp8 or int8 with scales"),
    (r"\.weight_scales", "EETQ"),
    (r"\.W_q", "HQQ"),
    (r"\.weight\._(data|scale)", "quanto"),
    (r"_weight_(qdata|scale|zero_point)", "torchao"),
    (r"\.(codebooks|codes)", "AQLM"),
    (r"\.(centroids|res_centroids)(\.weight)?", "VPTQ"),
    (r"\.(dense_weights|dense_weights_strided)", "SpQR"),
)
_SAVED_AS = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "fp8": "fp8", "hqq": "HQQ", "eetq": "EETQ"}


def check_not_quantized(files: CheckpointFiles) -> None:
    """Raises CheckpointError if the tensors are quantized. Logs a warning if only config.json says so."""
    settings = _settings(files.config)
    if found := _sign(files.weights):
        name, scheme = found
        recorded = _SAVED_AS.get(str(settings.get("quant_method", "")).lower())
        scheme = scheme if recorded is None or scheme.startswith(recorded) else recorded
        where = files.weights.headers[name].file
        raise CheckpointError(f"{where}: the weights are quantized ({scheme}; tensor {name}); {_ADVICE}")
    if settings and files.weights and not _compressed(files):
        log.warning("%s: quantization_config is ignored, because the weights are not quantized", files.config_file)


def check_unknown(files: CheckpointFiles, unknown: Mapping[str, Any]) -> None:
    """Raises CheckpointError if tensors are unknown, and config.json states a method of quantization."""
    if unknown and (method := _settings(files.config).get("quant_method")):
        raise CheckpointError(
            f"{files.path}: the weights are quantized (config.json: quant_method = {method!r:.40}; tensor "
            f"{next(iter(unknown))}); {_ADVICE}"
        )


def check_floating(tensors: Mapping[str, LazyTensor]) -> None:
    """Raises CheckpointError if a weight has an integer or 8-bit dtype. tensors: keyed by our names."""
    for tensor in tensors.values():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{tensor.where}: has dtype {dtype}, so the weights are quantized; {_ADVICE}")


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(value := holder.get(key), Mapping) and value:
                return value
    return {}


def _sign(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns the tensor that shows that a checkpoint is quantized, and the method."""
    names = list(names)
    for pattern, scheme in _SIGNS:
        for name in names:
            if re.search(pattern + "$", name):
                return name, scheme
    return None


def _compressed(files: CheckpointFiles) -> bool:
    return any(not h.dtype.is_floating_point or h.dtype.itemsize == 1 for h in files.weights.headers.values())
