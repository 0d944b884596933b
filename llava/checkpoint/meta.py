"""A language model in Meta's own format: `consolidated.NN.pth`, each with a part of every matrix, and params.json.

What is split by rows in Meta's model-parallel layers lies under each other, what is split by columns beside each other,
norms are the same in all shards. q and k are rotated in neighbouring pairs of rows and are put in the hub's order.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llava.checkpoint import keymap
from llava.checkpoint.files import Weights, read_json, reading
from llava.checkpoint.joined import Columns, Stacked
from llava.checkpoint.onbase import Put
from llava.checkpoint.source import HalfSplit, Source, Stored
from llava.errors import CheckpointError
from llava.formats.tokenizer import has_tokenizer

_ROTATED = ("attention.wq.weight", "attention.wk.weight")
_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
_TABLE = "tok_embeddings.weight"


class Shards(NamedTuple):
    """The shards of a folder, and what stands in them under each name."""

    files: list[Path]
    names: dict[str, list[str]]  # plain name -> names in `Weights`, a shard each


def is_meta(weights: Weights) -> bool:
    """Whether a folder's weights are of this format, by its tensors."""
    return any(name.endswith(f".pth/{_TABLE}") for name in weights)


def shards(weights: Weights) -> Shards:
    """Raises CheckpointError where shards do not hold the same tensors in the same sizes."""
    files = sorted({entry.file for entry in weights.entries.values()})
    names: dict[str, list[str]] = {}
    for name in weights:
        names.setdefault(name.partition("/")[2], []).append(name)
    for name, held in names.items():
        if len(held) != len(files):
            lacking = next(file for file in files if f"{file.name}/{name}" not in held)
            raise CheckpointError(f"{lacking}: holds no {name}, other shards do; fetch it again")
        first, *others = (weights.entries[part] for part in held)
        for other in others:
            if other[1:] != first[1:]:
                raise CheckpointError(
                    f"{other.file}: holds {name} in {other.dtype} {list(other.shape)}, {first.file.name} in "
                    f"{first.dtype} {list(first.shape)}: not shards of one model"
                )
    return Shards(files, names)


def settings(folder: Path, weights: Weights) -> dict[str, Any]:
    """params.json and what the tensors show, with the keys of a Llama's config.json. Raises CheckpointError.

    params.json does not tell the positions that the model was trained for. See `positions`.
    """
    file, found = folder / "params.json", shards(weights)
    params = read_json(file)
    with reading(file):
        dim, n_heads, n_layers = (int(params[key]) for key in ("dim", "n_heads", "n_layers"))
        _check_sizes(folder, weights, found, dim, n_heads, n_layers)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": dim,
            "num_hidden_layers": n_layers,
            "num_attention_heads": n_heads,
            "num_key_value_heads": int(params.get("n_kv_heads") or n_heads),
            "intermediate_size": _height(weights, found, "layers.0.feed_forward.w1.weight"),
            "rms_norm_eps": float(params["norm_eps"]),
            "rope_theta": float(params.get("rope_theta") or 10000.0),
            "max_position_embeddings": positions(params, weights.entries[found.names[_TABLE][0]].dtype),
        }


def _check_sizes(folder: Path, weights: Weights, found: Shards, dim: int, n_heads: int, n_layers: int) -> None:
    """params.json and tensors are of one model, and all its shards are there. Raises CheckpointError."""
    file = folder / "params.json"
    if dim < 1 or n_heads < 1 or dim % n_heads:
        raise CheckpointError(f"{file}: dim is {dim} and n_heads {n_heads}; expected a multiple")
    held = len({name.split(".")[1] for name in found.names if name.startswith("layers.")})
    if n_layers != held:
        raise CheckpointError(f"{file}: n_layers is {n_layers}, the shards hold {held}: not of one model")
    if (rows := _height(weights, found, "layers.0.attention.wq.weight")) != dim:
        raise CheckpointError(
            f"{folder}: holds {len(found.files)} shards with {rows} rows of wq, dim is {dim}: not all shards are "
            "there; fetch the others"
        )


def positions(params: Mapping[str, Any], stored: torch.dtype) -> int:
    """2048 for LLaMA-1, 4096 for Llama 2.

    Llama 2 is seen by shared key/value heads (70B alone has them), else by bfloat16 weights (LLaMA-1's are float16),
    else by norm_eps 1e-5 where LLaMA-1 has 1e-6; but LLaMA-1's 65B, of width 8192 without shared heads, has 1e-5 too.
    """
    if stated := params.get("max_seq_len"):
        return int(stated)
    shared = (params.get("n_kv_heads") or params["n_heads"]) < params["n_heads"]
    wide = params["dim"] == 8192
    return 4096 if shared or stored == torch.bfloat16 or (params["norm_eps"] > 5e-6 and not wide) else 2048


def _height(weights: Weights, found: Shards, name: str) -> int:
    if name not in found.names:
        raise CheckpointError(f"{found.files[0]}: holds no {name}; fetch it again")
    return sum(weights.entries[part].shape[0] for part in found.names[name])


def put(folder: Path, weights: Weights) -> Put:
    """Our tensors, each joined from the shards."""
    params, found = read_json(folder / "params.json"), shards(weights)
    planned = keymap.plan(found.names, keymap.META)
    with reading(folder / "params.json"):
        dim = int(params["dim"])
        head_dim = dim // int(params["n_heads"])  # `settings` has seen that it goes
    joined: dict[str, Source] = {}
    for ours, names in planned.sources.items():
        parts = [_joined(weights, name, found.names[name], dim, head_dim) for name in names]
        joined[ours] = parts[0] if len(parts) == 1 else Stacked(parts)
    dropped = tuple(part for name in planned.dropped for part in found.names[name])
    unknown = {part: weights.entries[part].file for name in planned.unknown for part in found.names[name]}
    return Put(joined, dropped, unknown)


def _joined(weights: Weights, name: str, parts: list[str], dim: int, head_dim: int) -> Source:
    """One tensor of Meta's, whole."""
    shape = weights.entries[parts[0]].shape
    if len(shape) != 2:
        return Stored(weights=weights, names=(parts[0],))
    # LLaMA-1 and Llama 2 split the table by columns, Llama 3 by rows
    beside = name.endswith(_BY_COLUMNS) or (name == _TABLE and shape[1] != dim)
    if beside and len(parts) > 1:
        return Columns([Stored(weights=weights, names=(part,)) for part in parts])
    whole = Stored(weights=weights, names=tuple(parts))
    return HalfSplit(whole, head_dim) if name.endswith(_ROTATED) else whole


def tokenizer_folder(folder: Path) -> Path:
    """Where tokenizer.model lies: beside the weights, or above the folders of all sizes, as Meta ships it."""
    return folder if has_tokenizer(folder) or not has_tokenizer(folder.parent) else folder.parent
