"""Expected tensors, computed from the files of checkpoints without the package."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import tiny

Tensors = dict[str, Tensor]


MARKS = ("<im_patch>", "<im_start>", "<im_end>")


V11: dict[str, Any] = {"mm_projector_type": "linear", "mm_use_im_start_end": True, **tiny.LLAMA_1}


V0: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **V11}


def stored(folder: Path) -> Tensors:
    """All tensors in a model's files, as stored."""
    found: Tensors = {}
    for file in sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        part = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        assert not set(part) & set(found)
        found |= part
    return found


def raw_bytes(value: Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Asserts the same names, dtypes, shapes and bytes."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert raw_bytes(found[name]) == raw_bytes(value), name


def without_rotary(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.endswith("inv_freq")}


def summed(base: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> Tensors:
    """Adds a delta like the original: in float16, to the leading rows; tensors that the base lacks are copied."""
    made = {}
    for name, value in without_rotary(delta).items():
        whole = value.half().clone()
        if name in base:
            rows, *columns = base[name].shape
            whole[:rows] = value.half()[:rows] + base[name].half()
            assert not columns or columns == list(value.shape[1:])
        made[name] = whole
    return made


def pairs_of(lora: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The stored A and B of each matrix, by its name."""
    bin_, safe = lora / "adapter_model.bin", lora / "adapter_model.safetensors"
    held = torch.load(bin_, weights_only=True) if bin_.exists() else load_file(safe)
    clean = {name[name.index("model.layers") :].replace(".default", ""): value for name, value in held.items()}
    return {
        name.replace(".lora_A", ""): (value, clean[name.replace("lora_A", "lora_B")])
        for name, value in clean.items()
        if ".lora_A." in name
    }


def merged(base: Path, lora: Path, *, precise: bool) -> Tensors:
    """Merges like peft on the CPU: B @ A in float32, rounded, added in float16. `precise` rounds only the sum."""
    made = {name: value.half() for name, value in without_rotary(stored(base)).items()}
    settings = json.loads((lora / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    for name, (a, b) in pairs_of(lora).items():
        product = (b.float() @ a.float()) * scale
        made[name] = (made[name].float() + product).half() if precise else made[name] + product.half()
    for name, value in torch.load(lora / "non_lora_trainables.bin", weights_only=True).items():
        at = max(name.find("model.mm_projector"), name.find("model.embed_tokens"), name.find("lm_head"))
        made[name[at:]] = value.half()
    return made
