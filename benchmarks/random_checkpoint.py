"""Random checkpoints with the published shapes on disk, written tensor by tensor."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peers import clip_settings
from shapes import Noise, clip_config, hub_sizes, llava_config
from timing import Target

from llava.formats.clip import RULES as CLIP
from llava.formats.llava import RULES as LLAVA
from llava.model.llava import shapes
from llava.tensors import keymap
from llava.tensors.writer import OutputTensor, write_json, write_shards
from tests import tiny

TEXT_IDS = range(300, 500)  # ids of text pieces; the random head makes one of them the most likely


def n_bytes(size: str, layers: int | None) -> int:
    """The size in bytes of a LLaVA with its tower, at 16 bits per weight."""
    return 2 * sum(torch.Size(shape).numel() for shape in shapes(llava_config(size, layers, vision=True)).values())


def write_llava(folder: Path, size: str, layers: int | None) -> Path:
    """Writes folder/llava, a LLaVA-1.5 in bfloat16 in the original's layout, and folder/clip. Returns the former."""
    config = llava_config(size, layers, vision=True)
    assert config.vision is not None
    noise = Noise(Target(device=torch.device("cpu"), dtype=torch.bfloat16))
    llava, clip = folder / "llava", folder / "clip"
    llava.mkdir()
    clip.mkdir()
    tensors = {name: shape for name, shape in shapes(config).items() if not name.startswith("vision.")}
    write_shards(llava, [item for name, shape in tensors.items() for item in items(name, shape, LLAVA, noise)])
    settings = tiny.llava_config(
        **hub_sizes(config.decoder),
        mm_hidden_size=config.vision.dim,
        mm_vision_tower=str(clip),
        torch_dtype="bfloat16",
    )
    write_json(llava / "config.json", settings)
    tiny.write_tokenizer(llava)
    write_clip(clip, size, noise)
    return llava


def write_clip(folder: Path, size: str, noise: Noise) -> None:
    """Writes a complete tower, including the last block, which LLaVA does not read."""
    tower = clip_config(size)
    written: list[OutputTensor] = []
    names: dict[str, tuple[int, ...]] = {}
    for i in range(tower.n_layers):
        names |= {f"vision.blocks.{i}.{name}": shape for name, shape in block_shapes(tower.dim, tower.mlp_dim).items()}
    names |= {
        "vision.cls": (tower.dim,),
        "vision.patch.weight": (tower.dim, 3, tower.patch_size, tower.patch_size),
        "vision.pos": (tower.grid**2 + 1, tower.dim),
        "vision.pre_norm.weight": (tower.dim,),
        "vision.pre_norm.bias": (tower.dim,),
    }
    for name, shape in names.items():
        written += items(name, shape, CLIP, noise)
    write_shards(folder, written)
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": clip_settings(tower)})
    pixels = {"height": tower.image_size, "width": tower.image_size}
    processor = {"size": {"shortest_edge": tower.image_size}, "crop_size": pixels, "resample": 3}
    write_json(folder / "preprocessor_config.json", {**processor, "image_mean": tiny.MEAN, "image_std": tiny.STD})


def block_shapes(d: int, mlp: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one block of the tower under our names."""
    layers = {"attn.qkv": (3 * d, d), "attn.out": (d, d), "mlp.up": (mlp, d), "mlp.down": (d, mlp)}
    found: dict[str, tuple[int, ...]] = {f"{norm}.{kind}": (d,) for norm in ("attn_norm", "mlp_norm")
                                         for kind in ("weight", "bias")}  # fmt: skip
    for name, shape in layers.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def items(ours: str, shape: Sequence[int], rules: Sequence[keymap.Rule], noise: Noise) -> Iterator[OutputTensor]:
    """The tensors on disk that make up one of ours: random values, except norm weights of 1."""
    if ours.startswith("projector."):  # the first rule of the table is for a single-layer projector
        names = [f"model.mm_projector.{ours.removeprefix('projector.')}"]
    else:
        names = keymap.disk_names(ours, rules)
    part = (shape[0] // len(names), *shape[1:])

    def values() -> Iterator[torch.Tensor]:
        tensor = torch.ones(part, dtype=torch.bfloat16)
        if not ours.endswith("norm.weight"):
            noise.fill(tensor)
        if ours == "decoder.head.weight":
            tensor[: TEXT_IDS.start] = 0
            tensor[TEXT_IDS.stop :] = 0
        yield tensor

    for name in names:
        yield OutputTensor(name=name, dtype=torch.bfloat16, shape=part, chunks=values, where=name)
