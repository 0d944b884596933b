"""Reads back GGUF files written by gguf.py, to verify a conversion. Other GGUF files are not supported."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.config import DecoderConfig, ImageConfig, ProjectorConfig, RopeScaling, VisionConfig
from llava.errors import CheckpointError
from llava.formats.format import Checkpoint
from llava.formats.gguf import LANGUAGE, MMPROJ, MMPROJ_FILE, MODEL_FILE, package
from llava.tensors.keymap import Rule, plan
from llava.tensors.lazy import Concat, HalfSplit, InMemory, LazyTensor


def read_gguf(folder: Path, like: Checkpoint) -> Checkpoint:
    """Reads the model from a folder; takes what GGUF does not store (template, tokenizer) from `like`.

    Raises CheckpointError on an unknown tensor.
    """
    model = _File(next(folder.glob(MODEL_FILE.format("*"))))
    decoder = _decoder(model)
    tensors = _tensors(model, LANGUAGE[decoder.kind], decoder.head_dim)
    config = replace(like.config, decoder=decoder, vision=None, projector=None, image=None)
    for file in folder.glob(MMPROJ_FILE.format("*")):
        mmproj = _File(file)
        tensors |= _tensors(mmproj, MMPROJ, None)
        vision = _vision(mmproj)
        projector = ProjectorConfig(in_dim=vision.dim, out_dim=mmproj["clip.vision.projection_dim"], depth=2)
        config = replace(config, vision=vision, projector=projector, image=_image(mmproj))
    return replace(like, path=folder, config=config, tensors=tensors, missing=(), unused={}, unused_names=())


class _File:
    """The keys and memory-mapped tensors of a GGUF file."""

    def __init__(self, file: Path):
        reader = package().GGUFReader(file, "c")  # "c" maps the file copy-on-write
        self.file = file
        self.keys: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors: Mapping[str, Tensor] = {tensor.name: _tensor(tensor) for tensor in reader.tensors}

    def __getitem__(self, key: str) -> Any:
        return self.keys[key]


def _tensor(stored: Any) -> Tensor:
    """Converts a tensor to torch. GGUF lists the innermost dimension first; GGUFReader returns bfloat16 as bytes."""
    values = torch.from_numpy(stored.data)
    shape = [int(size) for size in reversed(stored.shape)]
    return (values.view(torch.bfloat16) if stored.tensor_type.name == "BF16" else values).view(shape)


def _tensors(file: _File, rules: tuple[Rule, ...], head_dim: int | None) -> dict[str, LazyTensor]:
    planned = plan(file.tensors, rules)
    if planned.unknown:
        raise CheckpointError(f"{file.file}: contains the unknown tensor {planned.unknown[0]}; convert the model again")
    tensors: dict[str, LazyTensor] = {}
    for ours, names in planned.tensors.items():
        parts: list[LazyTensor] = [
            InMemory(tensor=file.tensors[name], origin=f"{file.file}: {name}", names=(name,)) for name in names
        ]
        if len(parts) == 3 and head_dim:
            parts[:2] = [HalfSplit(part, head_dim) for part in parts[:2]]
        tensors[ours] = Concat(parts) if len(parts) > 1 else parts[0]
    return tensors


def _decoder(file: _File) -> DecoderConfig:
    kind = file["general.architecture"]
    own = {key.removeprefix(f"{kind}."): value for key, value in file.keys.items()}
    n_heads, dim = own["attention.head_count"], own["embedding_length"]
    rotary, positions = kind == "llama", own["context_length"]
    factor = own.get("rope.scaling.factor")
    scaling = RopeScaling(kind="linear", factor=factor, original_max_seq=round(positions / factor)) if factor else None
    return DecoderConfig(
        kind=kind,
        n_layers=own["block_count"],
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=own["attention.head_count_kv"],
        head_dim=own.get("attention.key_length", dim // n_heads),
        mlp_dim=own["feed_forward_length"],
        vocab_size=own["vocab_size"],
        max_seq=positions,
        eps=own["attention.layer_norm_rms_epsilon" if rotary else "attention.layer_norm_epsilon"],
        rope_theta=own["rope.freq_base"] if rotary else None,
        rope_scaling=scaling,
        alibi_bias_max=own.get("attention.max_alibi_bias"),
        clip_qkv=own.get("attention.clamp_kqv"),
        tied="output.weight" not in file.tensors,
    )


def _vision(file: _File) -> VisionConfig:
    own = {key.removeprefix("clip.vision."): value for key, value in file.keys.items()}
    return VisionConfig(
        dim=own["embedding_length"],
        n_layers=own["block_count"],
        n_heads=own["attention.head_count"],
        mlp_dim=own["feed_forward_length"],
        image_size=own["image_size"],
        patch_size=own["patch_size"],
        eps=own["attention.layer_norm_epsilon"],
        activation="gelu" if file["clip.use_gelu"] else "quick_gelu",
        select_layer=own["feature_layer"][0],
    )


def _image(file: _File) -> ImageConfig:
    own = {key.removeprefix("clip.vision."): value for key, value in file.keys.items()}
    sides = own.get("image_grid_pinpoints", [])
    return ImageConfig(
        size=own["image_size"],
        mean=tuple(own["image_mean"]),
        std=tuple(own["image_std"]),
        aspect="anyres" if sides else "pad",
        pinpoints=tuple(zip(sides[::2], sides[1::2], strict=True)),
        merge=own.get("mm_patch_merge_type", "flat"),
    )
