"""Writes a folder for each row of the zoo: scaled down so that it loads, or at full size in sparse files.

Config keys, architectures, tokens and files are those of the row; sizes are arguments.
"""

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava.convert.convert import convert
from llava.formats.format import IMAGE_MODE_KEY, TEMPLATE_KEY
from llava.zoo import catalogue as zoo
from llava.zoo.match import trained_from
from tests import tiny
from tests.tiny import ABSENT, PIECES

Entry = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]
OLD: dict[str, Any] = dict.fromkeys(
    ("image_aspect_ratio", "mm_projector_type", "mm_use_im_patch_token", "mm_vision_select_feature", "max_length"),
    ABSENT,
)  # keys that configs before v1.0 lack
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
WIDTHS = {"7b": (4096, 11008, 32, 32, 32), "13b": (5120, 13824, 40, 40, 40), "34b": (7168, 20480, 60, 56, 8)}
WIDE = 1024  # width of CLIP-L
MISTRAL = (4096, 14336, 32, 32, 8)
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def bare(entry: Entry) -> bool:
    """Whether the row is a single file, not a folder."""
    return "file" in entry


def settings(entry: Entry) -> dict[str, Any]:
    """The config.json of a row without sizes and vocabulary; ABSENT for keys that it lacks."""
    start = zoo.origin(entry)
    values: dict[str, Any] = {
        "_name_or_path": trained_from(entry)
        if entry["format"] in ("lora", "projector")
        else entry["id"].split("/")[-1],
        "mm_projector_type": start.get("projector", {"type": "linear"})["type"],
        "mm_vision_tower": start["vision_tower"],
        "image_aspect_ratio": start.get("image_aspect_ratio", "square"),
        "mm_use_im_start_end": marks(entry),
    }
    for key, default in (("max_position_embeddings", 4096), ("rms_norm_eps", 1e-5), ("rope_theta", ABSENT)):
        known = start.get(key, 2048 if key.startswith("max") else 1e-6) if "lora-preview" in entry["family"] else None
        value = known or start.get(key, default)
        values[key] = default if isinstance(value, str) else value  # Llama-2 rows say "read config"
    if start["family"] == "v1.6":
        values |= tiny.ANYRES | {"image_grid_pinpoints": PINPOINTS}
        values |= {"tokenizer_padding_side": start.get("tokenizer_padding_side", "right")}
    if start.get("llm_arch") == "mistral":
        values |= {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"}
    if entry["format"] == "projector":
        values |= {"architectures": ["LlamaForCausalLM"], "tune_mm_mlp_adapter": True}
    if entry["format"] == "delta":
        values |= OLD | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1, "max_sequence_length": 2048}
    if entry["family"].startswith("v0"):
        values |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": ABSENT}
    return values


def marks(entry: Entry) -> bool:
    """Whether the row puts <im_start> and <im_end> around a picture."""
    return entry.get("image_tokens", {}).get("mm_use_im_start_end", "lora-preview-2023" in entry["family"])


def vocabulary(entry: Entry) -> int:
    """The number of rows of the embedding table; a default if the entry does not state a number."""
    value = entry.get("vocab_size", 32003)
    return value if isinstance(value, int) else 32000 if value else 32001


def added(entry: Entry) -> tuple[str, ...]:
    """The tokens after the tokenizer's pieces, in the order of their ids."""
    tokens = entry.get("added_tokens") or {}
    if "lora-preview-2023" in entry["family"]:
        tokens = {"<im_patch>": 0, "<im_start>": 1, "<im_end>": 2}
    return tuple(sorted(tokens, key=tokens.__getitem__))


def write_tokens(folder: Path, entry: Entry) -> None:
    """Writes the tokenizer files of the row's repository."""
    if entry["family"] == "v0-delta-scienceqa":
        tiny.write_tokenizer(folder, legacy=None, bos="</s>", pad="[PAD]", blank=True)
    elif entry["family"] == "v0-delta":
        bos = "</s>" if entry["size"] == "13b" else "<s>"
        tiny.write_tokenizer(folder, added=added(entry), legacy=None, bos=bos, pad="[PAD]", blank=True)
    elif zoo.origin(entry)["size"] == "34b":
        ends = ("<|im_start|>", "<|im_end|>")
        tiny.write_tokenizer(folder, added=ends, legacy=True, bos="<s>", eos="<|im_end|>", add_bos=False)
    elif added(entry):
        tiny.write_tokenizer(folder, added=added(entry), legacy=None)


# ------------------------------------------------------------------------------------------------- scaled down


def scaled(entry: Entry) -> dict[str, Any]:
    """Small sizes and the vocabulary, as config keys for `tiny`."""
    start = zoo.origin(entry)
    extra = 2 if start["size"] == "34b" else vocabulary(start) - 32000
    sizes: dict[str, Any] = {"vocab_size": PIECES + extra}
    if start.get("llm_arch") == "mistral":
        sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    elif start["size"] == "34b":
        sizes |= {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}
    if start["family"] == "v1.6":
        sizes["image_grid_pinpoints"] = tiny.ANYRES["image_grid_pinpoints"]
    return sizes


def write_scaled(folder: Path, entry: Entry, clip: Path) -> Path:
    """Writes a row scaled down: a complete model, or a delta, LoRA or projector for the base of `write_base`."""
    start = zoo.origin(entry)
    config = {**settings(start), **scaled(entry), "mm_vision_tower": str(clip)}
    if start["family"] == "mpt":
        return tiny.write_mpt(folder, clip=clip)
    if entry["format"] == "delta":
        tiny.write_delta(folder, clip=clip, **config)
    elif entry["format"] == "lora":
        tiny.write_lora(
            folder, clip=clip, base=f"./checkpoints/{trained_from(entry)}", rows=bool(added(entry)), **config
        )
    elif entry["format"] == "projector":
        config.pop("mm_use_im_start_end")
        tiny.write_projector(folder, clip=clip, **{k: v for k, v in config.items() if k not in _OF_PROJECTOR})
    else:
        inside = start["vision_tower_in_checkpoint"] is True
        layout: tiny.Layout = "safetensors-shards" if start["family"] == "v1.6" else "bin-shards"
        tiny.write_llava(folder, layout=layout, clip=clip, tower_seed=5 if inside else None, **config)
    write_tokens(folder, start)
    return folder


def write_published(path: Path, entry: Entry, clip: Path) -> Path:
    """Writes a row scaled down in its published form: like `write_scaled`, in llava-hf's layout, or a single file."""
    if bare(entry):
        # as wide as CLIP-L: only the width of a single file tells which tower it is for
        sizes = {"mm_projector_type": "linear", "mm_hidden_size": WIDE, **tiny.LLAMA_1}
        beside = tiny.write_projector(path.with_suffix(".folder"), clip=clip, start_end=marks(entry), **sizes)
        (beside / "mm_projector.bin").rename(path)
        shutil.rmtree(beside)
    elif entry["format"] == "hf-reexport":
        source = write_scaled(path.with_name(f"{path.name}.source"), entry, clip)
        convert(source, path, to="llava-hf", check=False)
        shutil.rmtree(source)
        # published folders crop and lack our keys, which would make transformers pad like LLaVA
        tiny.edit_json(path / "preprocessor_config.json", image_processor_type="CLIPImageProcessor")
        own = dict.fromkeys((IMAGE_MODE_KEY, TEMPLATE_KEY, "image_aspect_ratio"), tiny.ABSENT)
        tiny.edit_json(path / "config.json", **own)
    else:
        write_scaled(path, entry, clip)
    return path


_OF_PROJECTOR = ("architectures", "tune_mm_mlp_adapter")


def write_base(folder: Path, entry: Entry) -> Path:
    """Writes the base of a row, whose config records its name if the published one does."""
    sizes = {key: value for key, value in scaled(entry).items() if key != "vocab_size"}
    if entry["format"] == "delta":
        return tiny.write_llama(folder, seed=7, **tiny.LLAMA_1, **sizes)
    return tiny.write_llama(folder, _name_or_path=trained_from(entry), **sizes)


# --------------------------------------------------------------------------------------------------- full size


def full(entry: Entry) -> dict[str, Any]:
    start = zoo.origin(entry)
    widths = MISTRAL if start.get("llm_arch") == "mistral" else WIDTHS[start["size"]]
    return {**dict(zip(KEYS, widths, strict=True)), "vocab_size": vocabulary(entry), "mm_hidden_size": 1024}


def write_headers(folder: Path, entry: Entry) -> Path:
    """Writes a folder or single file with the row's config and all its tensors at full size, filled with zeros."""
    folder.mkdir(parents=True)
    start = zoo.origin(entry)
    sizes, kind = full(entry), entry["format"]
    config = tiny.llava_config(**{**settings(start if kind == "hf-reexport" else entry), **sizes})
    if kind == "hf-reexport":
        _write_hf(folder, entry, config)
    elif start["family"] == "mpt":
        _write_mpt(folder, entry)
    elif kind == "projector":
        rows: Shapes = {"model.embed_tokens.weight": (2, sizes["hidden_size"])} if marks(entry) else {}
        file = folder / ("nonsense.bin" if bare(entry) else "mm_projector.bin")
        _write_bin(file, _projector(config) | rows)
        if bare(entry):
            return file
        tiny.write_json(folder / "config.json", config)
    elif kind == "lora":
        _write_lora(folder, entry, config)
    else:
        tensors = _llama(config) | _projector(config)
        tensors |= _clip(336, "model.vision_tower.vision_tower.") if entry["vision_tower_in_checkpoint"] is True else {}
        tensors |= {"model.image_newline": (sizes["hidden_size"],)} if start["family"] == "v1.6" else {}
        write_shards(folder, tensors, ones=() if kind == "delta" else ("model.norm.weight",))
        tiny.write_json(folder / "config.json", config)
        if added(entry):
            tiny.write_tokenizer(folder, added=added(entry))
            tiny.write_json(folder / "added_tokens.json", entry["added_tokens"])
        else:
            write_tokens(folder, entry)
    return folder


def _write_mpt(folder: Path, entry: Entry) -> None:
    config = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50282}
    tiny.write_mpt(folder, clip=folder, layout="safetensors-shards")
    tiny.edit_json(folder / "config.json", **config, mm_vision_tower=entry["vision_tower"], mm_hidden_size=1024)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["id"] = entry["added_tokens"].get(token["content"], token["id"])
    tiny.write_json(folder / "tokenizer.json", tokenizer)
    dim, tensors = 4096, {"transformer.wte.weight": (50282, 4096), "transformer.norm_f.weight": (4096,)}
    for i in range(32):
        block = f"transformer.blocks.{i}."
        tensors |= {f"{block}norm_{n}.weight": (dim,) for n in (1, 2)}
        tensors |= {f"{block}attn.Wqkv.weight": (3 * dim, dim), f"{block}attn.out_proj.weight": (dim, dim)}
        tensors |= {f"{block}ffn.up_proj.weight": (4 * dim, dim), f"{block}ffn.down_proj.weight": (dim, 4 * dim)}
    tensors |= {"transformer.mm_projector.weight": (dim, 1024), "transformer.mm_projector.bias": (dim,)}
    write_shards(folder, tensors)


def _write_lora(folder: Path, entry: Entry, config: dict[str, Any]) -> None:
    rank, wrapped = entry.get("lora", {"r": 64})["r"], "base_model.model."
    pairs: Shapes = {}
    for name, shape in _llama(config).items():
        if ".self_attn." in name or ".mlp." in name:
            module = wrapped + name.removesuffix(".weight")
            pairs |= {f"{module}.lora_A.weight": (rank, shape[1]), f"{module}.lora_B.weight": (shape[0], rank)}
    write_sparse(folder / "adapter_model.safetensors", pairs)
    tables = {name: shape for name, shape in _llama(config).items() if "embed_tokens" in name or "lm_head" in name}
    beside = _projector(config) | (tables if added(entry) else {})
    _write_bin(folder / "non_lora_trainables.bin", {wrapped + name: shape for name, shape in beside.items()})
    base = f"./checkpoints/{trained_from(entry).split('/')[-1].replace('.', '-')}"
    tiny.write_json(folder / "adapter_config.json", {"base_model_name_or_path": base, "r": rank, "lora_alpha": 16})
    tiny.write_json(folder / "config.json", config)


def _write_hf(folder: Path, entry: Entry, config: dict[str, Any]) -> None:
    next_ = entry["model_class"].startswith("LlavaNext")
    text = {key: config[key] for key in (*KEYS, "max_position_embeddings", "rms_norm_eps", "vocab_size")}
    text |= {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    vision = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16}
    vision |= {"num_hidden_layers": 24, "patch_size": 14, "model_type": "clip_vision_model"}
    whole = {"architectures": [entry["model_class"]], "model_type": "llava_next" if next_ else "llava"}
    whole |= {"text_config": text, "vision_config": vision, "vision_feature_layer": -2}
    tiny.write_json(folder / "config.json", whole | ({"image_grid_pinpoints": PINPOINTS} if next_ else {}))
    tensors = {f"language_model.{name}": shape for name, shape in _llama(config).items()} | _clip(336, "vision_tower.")
    for i, layer in enumerate((0, 2), 1):
        weight = _projector(config)[f"model.mm_projector.{layer}.weight"]
        tensors |= {f"multi_modal_projector.linear_{i}.weight": weight}
        tensors |= {f"multi_modal_projector.linear_{i}.bias": weight[:1]}
    tensors |= {"image_newline": (config["hidden_size"],)} if next_ else {}
    write_shards(folder, tensors)


def _llama(config: Mapping[str, Any]) -> Shapes:
    dim, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv, table = dim // heads * config["num_key_value_heads"], (config["vocab_size"], dim)
    made: Shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (dim,), "lm_head.weight": table}
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."
        made |= {f"{block}self_attn.{x}_proj.weight": (dim, dim) for x in "qo"}
        made |= {f"{block}self_attn.{x}_proj.weight": (kv, dim) for x in "kv"}
        made |= {f"{block}mlp.{x}_proj.weight": (mlp, dim) for x in ("gate", "up")}
        made |= {f"{block}mlp.down_proj.weight": (dim, mlp)}
        made |= {f"{block}{x}_layernorm.weight": (dim,) for x in ("input", "post_attention")}
    return made


def _projector(config: Mapping[str, Any]) -> Shapes:
    dim = config["hidden_size"]
    if config.get("mm_projector_type", "linear") == "linear":
        return {"model.mm_projector.weight": (dim, 1024), "model.mm_projector.bias": (dim,)}
    wide = {"model.mm_projector.0.weight": (dim, 1024), "model.mm_projector.2.weight": (dim, dim)}
    return wide | {"model.mm_projector.0.bias": (dim,), "model.mm_projector.2.bias": (dim,)}


def _clip(image_size: int, prefix: str) -> Shapes:
    small, large = tiny.CLIP_DIM, {tiny.CLIP_DIM: 1024, tiny.CLIP_MLP: 4096}
    shapes = {name: tuple(value.shape) for name, value in tiny.clip_tensors(1, prefix=prefix + "vision_model.").items()}
    shapes = {name: tuple(large.get(n, n) for n in shape) for name, shape in shapes.items()}
    assert shapes[f"{prefix}vision_model.embeddings.class_embedding"] == (large[small],)
    shapes[f"{prefix}vision_model.embeddings.position_embedding.weight"] = ((image_size // 14) ** 2 + 1, 1024)
    return shapes


def write_shards(folder: Path, shapes: Shapes, ones: tuple[str, ...] = ()) -> None:
    """Writes shards of 4 GB and their index. Readers map whole files, and not every machine can map 26 GB."""
    places, done = {}, 0
    for name, shape in shapes.items():
        places[name] = f"model-{done // 4_000_000_000 + 1:05d}.safetensors"
        done += 2 * torch.Size(shape).numel()
    for file in dict.fromkeys(places.values()):
        held = {name: shape for name, shape in shapes.items() if places[name] == file}
        write_sparse(folder / file, held, tuple(name for name in ones if name in held))
    tiny.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def write_sparse(file: Path, shapes: Shapes, ones: tuple[str, ...] = ()) -> None:
    """Writes a sparse safetensors file in float16, which takes no disk space: zeros, except ones for `ones`."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        first = out.tell()
        for name in ones:
            out.seek(first + header[name]["data_offsets"][0])
            out.write(torch.ones(shapes[name]).half().numpy().tobytes())
        out.truncate(first + end)


def _write_bin(file: Path, shapes: Shapes) -> None:
    """Writes a .bin of zeros."""
    torch.save({name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, file)
