"""A LoRA in PEFT's format, and beside it what else was trained. It is read by `onbase.py`. arXiv:2106.09685."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.checkpoint import keymap
from llava.checkpoint.files import TRAINED_BESIDE
from llava.checkpoint.source import Given
from llava.checkpoint.write import Item, counting, new_folder, silent, write_json
from llava.config import LlavaConfig
from llava.convert.original import WRITERS, Form, llava_settings, named, rules_of
from llava.convert.tokenizer import copy_tokenizer
from llava.convert.torchzip import write_torch
from llava.errors import ConfigError
from llava.formats.tokenizer import load_tokenizer

Pair = tuple[Tensor, Tensor]  # A [r, in], B [out, r]
_WRAPPED = "base_model.model."  # what PEFT puts before the names of the model it wraps


def write_lora(
    folder: Path,
    config: LlavaConfig,
    lora: Mapping[str, Mapping[str, Pair]],
    *,
    r: int,
    alpha: float,
    dropout: float,
    base: str,
    vision_tower: str | None,
    non_lora: Mapping[str, Tensor],
    tokenizer_from: Path | None = None,
    form: Form = "safetensors",
    recorded: Mapping[str, Any] | None = None,
) -> None:
    """adapter_config.json, adapter_model, non_lora_trainables.bin and config.json; tensors in the type they have.

    lora: pairs by our module and its part: {"decoder.blocks.3.attn.qkv": {"q": (A, B), "v": (A, B)},
    "decoder.blocks.3.mlp.gate": {"": (A, B)}}. non_lora: by our names. base: recorded as what the LoRA belongs to;
    without `tokenizer_from` the reader takes its tokenizer. Raises ConfigError.
    """
    adapter = list(_adapter_items(lora, config, r))
    beside = [replace(item, name=_WRAPPED + item.name) for item in named(non_lora, config)]
    tokenizer = load_tokenizer(tokenizer_from) if tokenizer_from else None
    settings = llava_settings(config, tokenizer, vision_tower) | {"_name_or_path": base, **(recorded or {})}
    every = [*adapter, *beside]
    with new_folder(folder, sum(item.n_bytes for item in every)) as partial:
        WRITERS[form](partial / f"adapter_model.{form}", adapter, counting(adapter, silent))
        write_torch(partial / TRAINED_BESIDE, beside, counting(beside, silent))
        write_json(partial / "adapter_config.json", _adapter_settings(adapter, r, alpha, dropout, base))
        write_json(partial / "config.json", settings)
        if tokenizer_from:
            copy_tokenizer(tokenizer_from, partial)


def _adapter_items(lora: Mapping[str, Mapping[str, Pair]], config: LlavaConfig, r: int) -> Iterator[Item]:
    rules = rules_of(config)
    for module, parts in lora.items():
        names = keymap.disk_names(f"{module}.weight", rules)
        for part, (a, b) in parts.items():
            if a.shape[0] != r or b.shape[1] != r:
                raise ConfigError(f"{module}: the LoRA has rank {a.shape[0]}, expected {r}")
            if (part == "") != (len(names) == 1):
                raise ConfigError(f"{module}: the LoRA's part is {part!r}; stacked matrices have q, k and v, others ''")
            name = _WRAPPED + names["qkv".index(part)].removesuffix(".weight")
            yield _item(f"{name}.lora_A.weight", a)
            yield _item(f"{name}.lora_B.weight", b)


def _item(name: str, tensor: Tensor) -> Item:
    source = Given(tensor=tensor, what=name)
    return Item(name=name, dtype=source.dtype, shape=source.shape, where=name, parts=source.pieces)


def _adapter_settings(items: list[Item], r: int, alpha: float, dropout: float, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({item.name.split(".")[-3] for item in items}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
