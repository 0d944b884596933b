"""A language model in Meta's own format: params.json, and `consolidated.NN.pth` shards with parts of the matrices.

Meta's model-parallel layers split some matrices by rows and others by columns; all shards contain the same norms. The
rows of q and k are ordered for rotary embeddings that rotate adjacent pairs; loading reorders them to match Hugging
Face checkpoints.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llava.config import LlavaConfig, LoadOptions
from llava.errors import CheckpointError, counted
from llava.formats import llama
from llava.formats.config_keys import ConfigKeys, words
from llava.formats.format import Checkpoint, CheckpointFiles, Format, ReadConfig, Resolved, shapes_of
from llava.formats.multimodal import read_model_config
from llava.formats.tokenizer import has_tokenizer
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.files import Weights, parsing, read_json
from llava.tensors.keymap import Rule, plan
from llava.tensors.lazy import Concat, FromFile, HalfSplit, LazyTensor

RULES = (
    Rule("tok_embeddings.weight", "decoder.embed.weight"),
    Rule("layers.*.attention_norm.weight", "decoder.blocks.*.attn_norm.weight"),
    Rule("layers.*.attention.w{q,k,v}.weight", "decoder.blocks.*.attn.qkv.weight"),
    Rule("layers.*.attention.wo.weight", "decoder.blocks.*.attn.out.weight"),
    Rule("layers.*.attention.inner_attention.rope.freqs", None),  # recomputed
    Rule("layers.*.ffn_norm.weight", "decoder.blocks.*.mlp_norm.weight"),
    Rule("layers.*.feed_forward.w1.weight", "decoder.blocks.*.mlp.gate.weight"),
    Rule("layers.*.feed_forward.w3.weight", "decoder.blocks.*.mlp.up.weight"),
    Rule("layers.*.feed_forward.w2.weight", "decoder.blocks.*.mlp.down.weight"),
    Rule("norm.weight", "decoder.norm.weight"),
    Rule("output.weight", "decoder.head.weight"),
    Rule("rope.freqs", None),
)
KEYS = ConfigKeys(  # of params.json
    used=words("dim n_layers n_heads n_kv_heads norm_eps rope_theta max_seq_len"),
    only={"use_scaled_rope": (False,)},
    no_effect=words("vocab_size multiple_of ffn_dim_multiplier max_batch_size model_parallel_size"),  # see the tensors
)
_ROTATED = ("attention.wq.weight", "attention.wk.weight")
_SPLIT_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
_EMBED = "tok_embeddings.weight"


class Meta(Format):
    """Format in which Meta distributes LLaMA-1, Llama 2 and later models."""

    name = "meta"
    tensor_keys = llama.TENSOR_KEYS

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        return RULES

    def detect(self, files: CheckpointFiles) -> list[str]:
        if not any(name.endswith(f".pth/{_EMBED}") for name in files.weights):
            return []
        n = len({header.file for header in files.weights.headers.values()})
        return [f"{n} shards named consolidated.NN.pth, in Meta's own format"]

    def published_config(self, files: CheckpointFiles) -> Mapping[str, Any]:
        """Returns the config.json keys of a Llama model, derived from params.json and the tensors.

        params.json usually does not contain the context length; see `_context_length`.
        """
        file, shards = files.path / "params.json", _shards(files.weights)
        params = read_json(file)
        KEYS.check(params, file)
        with parsing(file):
            dim, n_heads, n_layers = (int(params[key]) for key in ("dim", "n_heads", "n_layers"))
            _check_sizes(files, shards, dim, n_heads, n_layers)
            return {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": dim,
                "num_hidden_layers": n_layers,
                "num_attention_heads": n_heads,
                "num_key_value_heads": int(params.get("n_kv_heads") or n_heads),
                "intermediate_size": _n_rows(files.weights, shards, "layers.0.feed_forward.w1.weight"),
                "rms_norm_eps": float(params["norm_eps"]),
                "rope_theta": float(params.get("rope_theta") or 10000.0),
                "max_position_embeddings": _context_length(
                    params, files.weights.headers[shards.names[_EMBED][0]].dtype
                ),
            }

    def resolve(self, files: CheckpointFiles, base: Checkpoint | None, tokenizer: Tokenizer) -> Resolved:
        weights, shards = files.weights, _shards(files.weights)
        planned = plan(shards.names, RULES)
        params = read_json(files.path / "params.json")
        with parsing(files.path / "params.json"):
            dim, head_dim = int(params["dim"]), int(params["dim"]) // int(params["n_heads"])
        tensors: dict[str, LazyTensor] = {}
        for ours, names in planned.tensors.items():
            parts = [_join(weights, name, shards.names[name], dim, head_dim) for name in names]
            tensors[ours] = parts[0] if len(parts) == 1 else Concat(parts)
        dropped = tuple(part for name in planned.dropped for part in shards.names[name])
        unknown = {part: weights.headers[part].file for name in planned.unknown for part in shards.names[name]}
        return Resolved(tensors, dropped, unknown)

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        config = self.published_config(files)
        decoder = llama.decoder_config(config, shapes_of(tensors), files.path / "params.json")
        return read_model_config(files.path, config, decoder, tensors, options)

    def tokenizer_folder(self, files: CheckpointFiles) -> Path:
        """Returns the parent folder if only that has a tokenizer (Meta's sizes share one), else the weights folder."""
        folder, above = files.path, files.path.parent
        return folder if has_tokenizer(folder) or not has_tokenizer(above) else above


class _Shards(NamedTuple):
    files: list[Path]
    names: dict[str, list[str]]  # tensor name -> its names in `Weights`, one per shard


def _shards(weights: Weights) -> _Shards:
    """Groups the shards of each tensor. Raises CheckpointError if shards differ in tensor names, dtypes or shapes."""
    files = sorted({header.file for header in weights.headers.values()})
    names: dict[str, list[str]] = {}
    for name in weights:
        names.setdefault(name.partition("/")[2], []).append(name)
    for name, held in names.items():
        if len(held) != len(files):
            without = next(file for file in files if f"{file.name}/{name}" not in held)
            raise CheckpointError(f"{without}: has no {name}, but other shards do; download this shard again")
        first, *others = (weights.headers[part] for part in held)
        for other in others:
            if other[1:] != first[1:]:
                raise CheckpointError(
                    f"{other.file}: {name} is {other.dtype} {list(other.shape)}, but in {first.file.name} it is "
                    f"{first.dtype} {list(first.shape)}; these are not shards of one model"
                )
    return _Shards(files, names)


def _check_sizes(files: CheckpointFiles, shards: _Shards, dim: int, n_heads: int, n_layers: int) -> None:
    """Checks that params.json matches the tensors and that no shard is missing. Raises CheckpointError."""
    file = files.path / "params.json"
    if dim < 1 or n_heads < 1 or dim % n_heads:
        raise CheckpointError(f"{file}: dim is {dim}; expected a positive multiple of n_heads ({n_heads})")
    found = len({name.split(".")[1] for name in shards.names if name.startswith("layers.")})
    if n_layers != found:
        raise CheckpointError(
            f"{file}: n_layers is {n_layers}, but the shards contain {found} layers; use files of one model"
        )
    if (rows := _n_rows(files.weights, shards, "layers.0.attention.wq.weight")) != dim:
        raise CheckpointError(
            f"{files.path}: found {rows} rows of wq in {counted(len(shards.files), 'shard')}, but dim is {dim}; "
            "download the missing shards"
        )


def _context_length(params: Mapping[str, Any], stored: torch.dtype) -> int:
    """Returns `max_seq_len` (in tokens) if params.json contains it, else 2048 for LLaMA-1 and 4096 for Llama 2.

    Llama 2 is recognized by shared key/value heads (70B only), bfloat16 weights (LLaMA-1 uses float16) or norm_eps 1e-5
    instead of 1e-6. norm_eps is ignored at dim 8192 because LLaMA-1 65B also uses 1e-5.
    """
    if stated := params.get("max_seq_len"):
        return int(stated)
    shared_heads = (params.get("n_kv_heads") or params["n_heads"]) < params["n_heads"]
    wide = params["dim"] == 8192
    is_llama_2 = shared_heads or stored == torch.bfloat16 or (params["norm_eps"] > 5e-6 and not wide)
    return 4096 if is_llama_2 else 2048


def _n_rows(weights: Weights, shards: _Shards, name: str) -> int:
    if name not in shards.names:
        raise CheckpointError(f"{shards.files[0]}: has no {name}; download this shard again")
    return sum(weights.headers[part].shape[0] for part in shards.names[name])


def _join(weights: Weights, name: str, parts: list[str], dim: int, head_dim: int) -> LazyTensor:
    """Joins the shards of one tensor; for q and k, also reorders the rows."""
    shape = weights.headers[parts[0]].shape
    if len(shape) != 2 or len(parts) == 1:
        whole: LazyTensor = FromFile(weights, parts[0])
    else:
        # LLaMA-1 and Llama 2 split the embedding table by columns, Llama 3 by rows.
        by_columns = name.endswith(_SPLIT_BY_COLUMNS) or (name == _EMBED and shape[1] != dim)
        whole = Concat([FromFile(weights, part) for part in parts], dim=int(by_columns))
    return HalfSplit(whole, head_dim) if name.endswith(_ROTATED) else whole
