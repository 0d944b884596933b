"""Small random checkpoints with the file names, tensor names and config keys of the published ones.

Every tensor depends only on a seed and its name, so all layouts hold the same values. A model has 2 blocks of
width 64, a SentencePiece tokenizer trained on the text below, and a CLIP of 3 blocks for 56 x 56 pixels.

    python -m tests.tiny OUT    writes OUT/llava (like LLaVA-1.5, sharded .bin) and OUT/clip
"""

import functools
import io
import json
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

Layout = Literal["bin-shards", "bin", "safetensors-shards", "safetensors"]
LAYOUTS: tuple[Layout, ...] = ("bin-shards", "bin", "safetensors-shards", "safetensors")


class Absent:
    def __repr__(self) -> str:
        return "ABSENT"  # part of test ids, which must be the same in every worker


ABSENT: Any = Absent()  # a config value that leaves the key out of config.json
PIECES = 512  # vocabulary of the tokenizer; added tokens get the ids after it
IMAGE_SIZE, PATCH = 56, 14  # pixels
CLIP_DIM, CLIP_MLP, CLIP_BLOCKS, CLIP_HEADS = 64, 128, 3, 4
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
N_PATCHES = (IMAGE_SIZE // PATCH) ** 2
TOWER = "openai/clip-vit-large-patch14-336"  # mm_vision_tower in published configs
ANYRES: dict[str, Any] = {  # config keys of LLaVA-1.6, for write_llava
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    "mm_patch_merge_type": "spatial_unpad",
    "tokenizer_model_max_length": 4096,
    "unfreeze_mm_vision_tower": True,
    "mm_vision_tower_lr": 2e-06,
    "torch_dtype": "bfloat16",
}
LLAMA_1: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
}  # config keys of the base of a delta, for write_llama

TEXT = """\
A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and
polite answers to the human's questions. USER: What is in the picture? ASSISTANT: A boat lies at the shore of a lake.
Behind it a long wooden pier leads out to the water, and there are mountains, trees and a few white clouds in the sky.
USER: What is unusual about it? ASSISTANT: Nobody is there. The water is still, so the sky can be seen in it twice.
USER: Which colours do you see? ASSISTANT: Mostly blue and green, some brown where the wood is old, and grey stones.
Look at the left side of the photo, then at the right one, and compare the two. Which one is darker? Why do you say so?
The first shows a man who irons his shirt on the back of a yellow car; the second shows a street with people and shops.
How many people are there? I count 3 of them: one with a red hat, one with a bag and one child with a small brown dog.
Please describe the image in one sentence. Read the text on the sign. Where was this taken, and at what time of day?
It says "open from 9 to 17", which means that the shop is closed now; the lamps are lit, so it must be late evening.
Once upon a time there was a painter who would only ever paint the sea. Every morning she walked down to the beach with
her colours, and every evening she came home with a new picture, and no two of them were the same. When they asked her
why, she said: the sea has not been the same either. Name the three primary colours. Red, yellow and blue. Say hello.
def area(width, height):
    return width * height  # in pixels, for example 336 * 336 = 112896

Things to be careful about when you visit: the boards can be wet, the water is cold and deep, and the weather changes.
The quick answer is often wrong, the slow answer is often right, and the best answer says how sure it is about itself.
"""


@functools.cache
def sentencepiece_model() -> bytes:
    """A tokenizer like Llama's: BPE with byte fallback, no normalisation, spaces kept; <unk>, <s>, </s> are 0, 1, 2."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; the value ABSENT removes a key."""
    value = {**json.loads(path.read_text()), **changes}
    write_json(path, {key: item for key, item in value.items() if item is not ABSENT})


def write_tokenizer(
    folder: Path,
    *,
    added: tuple[str, ...] = (),
    legacy: bool | None = False,
    bos: str = "<s>",
    eos: str = "</s>",
    pad: str = "<unk>",
    add_bos: bool = True,
    blank: bool = False,
) -> Path:
    """Writes the files of a slow Llama tokenizer.

    added: tokens with the ids from PIECES on. legacy: None leaves the key out. blank: special tokens are empty strings
    in tokenizer_config.json, as in LLaVA v0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {"bos_token": bos, "eos_token": eos, "unk_token": "<unk>"}
    config: dict[str, Any] = {"add_bos_token": add_bos, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    config |= {name: {"__type": "AddedToken", "content": text, **flags} for name, text in special.items()}
    config |= dict.fromkeys(special, "") if blank else {}
    config |= {"model_max_length": 2048, "pad_token": None, "padding_side": "right", "sp_model_kwargs": {}}
    config |= {"tokenizer_class": "LlamaTokenizer"} | ({} if legacy is None else {"legacy": legacy})
    write_json(folder / "tokenizer_config.json", dict(sorted(config.items())))
    special_map = {name: {"content": text, **flags} for name, text in special.items()}
    write_json(folder / "special_tokens_map.json", {**special_map, "pad_token": pad})
    if added:
        write_json(folder / "added_tokens.json", {token: PIECES + i for i, token in enumerate(added)})
    return folder


def tensor(seed: int, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Tensor:
    """Random values that float16 represents exactly; they depend only on seed, name and shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return (torch.randn(shape, generator=generator) * std + mean).half()


def llama_tensors(config: Mapping[str, Any], seed: int, *, inv_freq: bool) -> dict[str, Tensor]:
    """A Llama under the hub's names. `inv_freq` adds the buffer of old files, rounded to float16."""
    dim, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim, vocab = dim // heads, config["vocab_size"]
    kv_dim = config.get("num_key_value_heads", heads) * head_dim
    tensors = {"model.embed_tokens.weight": tensor(seed, "embed", (vocab, dim), 0.6)}
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."
        for name, shape, std in (
            ("self_attn.q_proj", (dim, dim), 0.2),
            ("self_attn.k_proj", (kv_dim, dim), 0.2),
            ("self_attn.v_proj", (kv_dim, dim), 0.125),
            ("self_attn.o_proj", (dim, dim), 0.125),
            ("mlp.gate_proj", (mlp, dim), 0.125),
            ("mlp.up_proj", (mlp, dim), 0.125),
            ("mlp.down_proj", (dim, mlp), 0.076),
        ):
            tensors[f"{block}{name}.weight"] = tensor(seed, block + name, shape, std)
        if inv_freq:
            frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
            tensors[f"{block}self_attn.rotary_emb.inv_freq"] = frequencies.half()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{name}.weight"] = tensor(seed, block + name, (dim,), 0.15, 1.0)
    tensors["model.norm.weight"] = tensor(seed, "norm", (dim,), 0.15, 1.0)
    head = tensor(seed, "head", (vocab, dim), 0.25)
    head[2] = 0  # </s> never has the largest logit, so an answer is as long as a test asks for
    return {**tensors, "lm_head.weight": head}


def projector_tensors(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    kind = config.get("mm_projector_type", "linear")
    depth = {"linear": 1, "identity": 0}.get(kind) if not kind.startswith("mlp") else int(kind[3 : kind.index("x")])
    assert depth is not None, kind
    tensors, width = {}, config["mm_hidden_size"]
    for i in range(depth):
        name = "model.mm_projector." if kind == "linear" else f"model.mm_projector.{2 * i}."
        tensors[name + "weight"] = tensor(seed, name + "weight", (config["hidden_size"], width), 0.12)
        tensors[name + "bias"] = tensor(seed, name + "bias", (config["hidden_size"],), 0.1)
        width = config["hidden_size"]
    return tensors


def clip_tensors(
    seed: int, *, prefix: str = "vision_model.", image_size: int = IMAGE_SIZE, dim: int = CLIP_DIM
) -> dict[str, Tensor]:
    """The vision part of CLIP. The values do not depend on the prefix."""
    d, places = dim, (image_size // PATCH) ** 2 + 1
    made = {
        "embeddings.class_embedding": tensor(seed, "class", (d,), 0.5),
        "embeddings.patch_embedding.weight": tensor(seed, "patch", (d, 3, PATCH, PATCH), 0.04),
        "embeddings.position_embedding.weight": tensor(seed, "position", (places, d), 0.3),
    }

    def norm(name: str) -> None:
        made[name + ".weight"] = tensor(seed, name + ".weight", (d,), 0.15, 1.0)
        made[name + ".bias"] = tensor(seed, name + ".bias", (d,), 0.1)

    norm("pre_layrnorm")
    for i in range(CLIP_BLOCKS):
        block = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            std = 0.2 if name in ("q_proj", "k_proj") else 0.125
            made[f"{block}self_attn.{name}.weight"] = tensor(seed, block + name, (d, d), std)
            made[f"{block}self_attn.{name}.bias"] = tensor(seed, f"{block}{name}.bias", (d,), 0.1)
        for name, shape in (("fc1", (CLIP_MLP, d)), ("fc2", (d, CLIP_MLP))):
            made[f"{block}mlp.{name}.weight"] = tensor(seed, block + name, shape, 0.1)
            made[f"{block}mlp.{name}.bias"] = tensor(seed, f"{block}{name}.bias", shape[:1], 0.1)
        norm(block + "layer_norm1")
        norm(block + "layer_norm2")
    norm("post_layernorm")
    return {prefix + name: value for name, value in made.items()}


def save(tensors: Mapping[str, Tensor], folder: Path, layout: Layout) -> None:
    """Writes one file, or three shards of similar size with their index, like transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    kind, _, sharded = layout.partition("-")
    stem = "pytorch_model" if kind == "bin" else "model"

    def write(part: dict[str, Tensor], name: str) -> None:
        if kind == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})

    if not sharded:
        return write(dict(tensors), f"{stem}.{kind}")
    total = sum(value.nbytes for value in tensors.values())
    parts: list[dict[str, Tensor]] = [{}, {}, {}]
    done = 0
    for key, value in tensors.items():
        parts[done * 3 // total][key] = value
        done += value.nbytes
    weight_map = {}
    for i, part in enumerate(parts, 1):
        name = f"{stem}-{i:05d}-of-00003.{kind}"
        write(part, name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return write_json(folder / f"{stem}.{kind}.index.json", index)


def write_clip(
    folder: Path, *, layout: Layout = "bin", seed: int = 2, image_size: int = IMAGE_SIZE, dim: int = CLIP_DIM
) -> Path:
    """Writes a CLIP repository: the tower, a few tensors of the text model to be ignored, config and preprocessor.

    With `.bin` the preprocessor has integer sizes, like clip-vit-large-patch14-336; with safetensors, the newer dicts.
    """
    tensors = {key: value.float() for key, value in clip_tensors(seed, image_size=image_size, dim=dim).items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange((image_size // PATCH) ** 2 + 1)[None]
    tensors["text_model.embeddings.token_embedding.weight"] = tensor(seed, "text", (16, 32), 0.1).float()
    tensors["visual_projection.weight"] = tensor(seed, "visual_projection", (32, dim), 0.1).float()
    tensors["logit_scale"] = torch.tensor(4.6052)
    save(tensors, folder, layout)
    vision = {"hidden_act": "quick_gelu", "hidden_size": dim, "image_size": image_size, "layer_norm_eps": 1e-05}
    vision |= {"intermediate_size": CLIP_MLP, "model_type": "clip_vision_model", "num_attention_heads": CLIP_HEADS}
    vision |= {"num_hidden_layers": CLIP_BLOCKS, "patch_size": PATCH, "projection_dim": 32}
    config: dict[str, Any] = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 32}
    config |= {"text_config": {"hidden_size": 32, "model_type": "clip_text_model"}, "vision_config": vision}
    write_json(folder / "config.json", {**config, "torch_dtype": "float32"})
    size, crop = (image_size, image_size) if layout.startswith("bin") else ({"shortest_edge": image_size}, None)
    preprocessor = {"crop_size": crop or {"height": image_size, "width": image_size}, "size": size, "resample": 3}
    preprocessor |= {"do_center_crop": True, "do_normalize": True, "do_resize": True}
    preprocessor |= {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    return folder


def llama_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2}
    config |= {"hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 172}
    config |= {"max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2}
    config |= {"num_key_value_heads": 4, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05}
    config |= {"rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True}
    config |= {"transformers_version": "4.31.0", "vocab_size": PIECES}
    return {key: value for key, value in sorted({**config, **changes}.items()) if value is not ABSENT}


def llava_config(**changes: Any) -> dict[str, Any]:
    """The config.json of LLaVA-1.5 with small sizes."""
    config: dict[str, Any] = {"_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"]}
    config |= {"freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "image_aspect_ratio": "pad"}
    config |= {"max_length": 4096, "mm_hidden_size": CLIP_DIM, "mm_projector_type": "mlp2x_gelu"}
    config |= {"mm_resampler_type": None, "mm_use_im_patch_token": False, "mm_use_im_start_end": False}
    config |= {"mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "mm_vision_tower": TOWER}
    config |= {"model_type": "llava", "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False}
    config |= {"unfreeze_mm_vision_tower": False, "use_mm_proj": True}
    return llama_config(**{**config, **changes})


def write_model(folder: Path, tensors: Mapping[str, Tensor], layout: Layout, config: Mapping[str, Any]) -> Path:
    """Writes weights in the config's dtype, config.json and generation_config.json."""
    dtype = getattr(torch, config.get("torch_dtype", "float16"))
    floats = {key: value if key.endswith("inv_freq") else value.to(dtype) for key, value in tensors.items()}
    save(floats, folder, layout)
    write_json(folder / "config.json", config)
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_json(folder / "generation_config.json", {**generation, "max_length": 4096, "transformers_version": "4.31.0"})
    return folder


def write_llama(folder: Path, *, layout: Layout = "safetensors", seed: int = 1, **config: Any) -> Path:
    """Writes a plain Llama: the language model of `write_llava` with the same seed."""
    final = llama_config(**config)
    write_tokenizer(folder)
    return write_model(folder, llama_tensors(final, seed, inv_freq=layout.startswith("bin")), layout, final)


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Interleaves the two halves of each head in the rows of q or k, as in Meta's code and llama.cpp."""
    pairs = [[h + i, h + head_dim // 2 + i] for h in range(0, len(rows), head_dim) for i in range(head_dim // 2)]
    return rows[[row for pair in pairs for row in pair]]


def write_meta(
    folder: Path, *, shards: int = 2, seed: int = 1, params: Mapping[str, Any] | None = None, **config: Any
) -> Path:
    """Writes the language model of `write_llama` in Meta's own format, with the tokenizer in the parent folder.

    Matrices are split into model-parallel shards like Meta's layers. params: further keys of params.json.
    """
    final = llama_config(**config)
    dim, n_heads, dtype = final["hidden_size"], final["num_attention_heads"], getattr(torch, final["torch_dtype"])
    names = {"embed_tokens": "tok_embeddings", "lm_head": "output", "norm": "norm", "o_proj": "attention.wo"}
    names |= {f"{part}_proj": f"attention.w{part}" for part in "qkv"}
    names |= {"gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3"}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for name, value in llama_tensors(final, seed, inv_freq=False).items():
        words = name.split(".")
        layer = f"layers.{words[2]}." if "layers" in words else ""
        meta, value = f"{layer}{names[words[-2]]}.weight", value.to(dtype)
        if words[-2] in ("q_proj", "k_proj"):
            value = interleaved(value, dim // n_heads)
        by_columns = words[-2] in ("embed_tokens", "o_proj", "down_proj")
        split = value.chunk(shards, dim=int(by_columns)) if value.dim() == 2 else [value] * shards
        for part, piece in zip(parts, split, strict=True):
            part[meta] = piece.clone()
    folder.mkdir(parents=True)
    for i, part in enumerate(parts):
        torch.save({**part, "rope.freqs": torch.ones(dim // n_heads // 2)}, folder / f"consolidated.{i:02}.pth")
    known = {"dim": dim, "multiple_of": 4, "n_heads": n_heads, "n_layers": final["num_hidden_layers"]}
    known |= {"norm_eps": final["rms_norm_eps"], "vocab_size": -1}
    if (shared := final["num_key_value_heads"]) != n_heads:
        known |= {"n_kv_heads": shared}
    write_json(folder / "params.json", {**known, **(params or {})})
    (folder.parent / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder


def write_internlm2(folder: Path, *, seed: int = 1, **config: Any) -> Path:
    """Writes the language model of `write_llama` as InternLM2 stores it."""
    final = llama_config(model_type="internlm2", bias=False, **config)
    head_dim, n_kv_heads = final["hidden_size"] // final["num_attention_heads"], final["num_key_value_heads"]
    names = {"embed_tokens": "tok_embeddings", "lm_head": "output", "norm": "norm", "o_proj": "attention.wo"}
    names |= {"gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3"}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    tensors, heads = {}, dict[str, Tensor]()
    for name, value in llama_tensors(final, seed, inv_freq=False).items():
        words = name.split(".")
        layer = f"layers.{words[2]}." if "layers" in words else ""
        if words[-2] in ("q_proj", "k_proj", "v_proj"):
            heads[words[-2]] = value.view(n_kv_heads, -1, head_dim, value.shape[1])  # by key/value head
            if len(heads) == 3:
                tensors[f"model.{layer}attention.wqkv.weight"] = torch.cat(list(heads.values()), dim=1).flatten(0, 2)
                heads = {}
            continue
        prefix = "" if words[-2] == "lm_head" else "model."
        tensors[f"{prefix}{layer}{names[words[-2]]}.weight"] = value
    write_tokenizer(folder)
    return write_model(folder, tensors, "safetensors", final)


MPT_ADDED = ("<|im_start|>", "<|im_end|>", "<im_patch>", "<im_start>", "<im_end>")


def write_neox_tokenizer(folder: Path) -> int:
    """Writes a tokenizer like GPT-NeoX's (<|endoftext|> is 0) with MPT's added tokens. Returns the number of ids."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(list(MPT_ADDED))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    write_json(folder / "special_tokens_map.json", names)
    more = {"add_prefix_space": False, "model_max_length": 2048, "tokenizer_class": "GPTNeoXTokenizer"}
    write_json(folder / "tokenizer_config.json", {**names, **more})
    return tokenizer.get_vocab_size()


def mpt_tensors(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """An MPT under the hub's names, with a tied head. Tokens that end an answer never have the largest logit."""
    dim = config["d_model"]
    table = tensor(seed, "wte", (config["vocab_size"], dim), 0.25)
    table[[0, -4]] = 0  # <|endoftext|>, <|im_end|>
    tensors = {"transformer.wte.weight": table}
    for i in range(config["n_layers"]):
        block = f"transformer.blocks.{i}."
        for name, shape, std, mean in (
            ("norm_1", (dim,), 0.15, 1.0),
            ("attn.Wqkv", (3 * dim, dim), 0.2, 0.0),
            ("attn.out_proj", (dim, dim), 0.125, 0.0),
            ("norm_2", (dim,), 0.15, 1.0),
            ("ffn.up_proj", (config["expansion_ratio"] * dim, dim), 0.125, 0.0),
            ("ffn.down_proj", (dim, config["expansion_ratio"] * dim), 0.0625, 0.0),
        ):
            tensors[f"{block}{name}.weight"] = tensor(seed, block + name, shape, std, mean)
    return {**tensors, "transformer.norm_f.weight": tensor(seed, "norm_f", (dim,), 0.15, 1.0)}


def write_mpt(
    folder: Path, *, layout: Layout = "bin-shards", clip: Path | None = None, seed: int = 1, **config: Any
) -> Path:
    """Writes a model like LLaVA-Lightning-MPT-7B-preview, or, without `clip`, its base, a plain MPT."""
    attention = {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_type": "multihead_attention"}
    attention |= {"clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None}
    final: dict[str, Any] = {"architectures": ["MPTForCausalLM"], "attn_config": attention, "d_model": 64}
    final |= {"expansion_ratio": 4, "learned_pos_emb": True, "logit_scale": None, "max_seq_len": 2048}
    final |= {"model_type": "mpt", "n_heads": 4, "n_layers": 2, "no_bias": True}
    final |= {
        "norm_type": "low_precision_layernorm",
        "torch_dtype": "bfloat16",
        "vocab_size": write_neox_tokenizer(folder),
    }
    if clip:
        final |= {"architectures": ["LlavaMPTForCausalLM"], "model_type": "llava_mpt", "hidden_size": 64}
        final |= {"mm_hidden_size": CLIP_DIM, "mm_use_im_start_end": True, "mm_vision_select_layer": -2}
        final |= {"mm_vision_tower": str(clip), "use_mm_proj": True}
    final = {key: value for key, value in {**final, **config}.items() if value is not ABSENT}
    tensors = mpt_tensors(final, seed)
    if clip:
        projector = projector_tensors(final, seed)
        tensors |= {name.replace("model.", "transformer.", 1): value for name, value in projector.items()}
    write_model(folder, tensors, layout, final)
    edit_json(
        folder / "generation_config.json",
        bos_token_id=ABSENT,
        pad_token_id=ABSENT,
        eos_token_id=[0, final["vocab_size"] - 4],
    )
    return folder


def write_llava(
    folder: Path,
    *,
    layout: Layout = "bin-shards",
    clip: Path | None = None,
    tower_seed: int | None = None,
    seed: int = 1,
    added: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """Writes a LLaVA in the original's layout. As in v1.5, `.bin` files also hold `rotary_emb.inv_freq`.

    clip: the folder that `mm_vision_tower` names; default: the published hub id. tower_seed: also puts a CLIP of that
    seed into the shards, as in v1.6 (the seed of write_clip is 2). added: tokens after the tokenizer's pieces, each
    with a row in the tables. config: keys of config.json; ABSENT leaves one out.
    """
    changes = {"vocab_size": PIECES + len(added), **({"mm_vision_tower": str(clip)} if clip else {}), **config}
    final = llava_config(**changes)
    write_tokenizer(folder, added=added)
    tensors = llama_tensors(final, seed, inv_freq=layout.startswith("bin")) | projector_tensors(final, seed)
    if "unpad" in final.get("mm_patch_merge_type", "flat"):
        tensors["model.image_newline"] = tensor(seed, "image_newline", (final["hidden_size"],), 0.6)
    if tower_seed is not None:
        tensors |= clip_tensors(tower_seed, prefix="model.vision_tower.vision_tower.vision_model.")
    return write_model(folder, tensors, layout, final)


LORA_RANK, LORA_ALPHA = 4, 8
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_tensors(config: Mapping[str, Any], seed: int, targets: tuple[str, ...] = LORA_TARGETS) -> dict[str, Tensor]:
    """A and B for each matrix of `llama_tensors` whose name ends in a target, without the wrapper's prefix."""
    made = {}
    for name, weight in llama_tensors(config, seed, inv_freq=False).items():
        module = name.removesuffix(".weight")
        if module.endswith(targets):
            out, width = weight.shape
            made[f"{module}.lora_A.weight"] = tensor(seed, module + ".A", (LORA_RANK, width), 0.1)
            made[f"{module}.lora_B.weight"] = tensor(seed, module + ".B", (out, LORA_RANK), 0.1)
    return made


def write_lora(
    folder: Path,
    *,
    clip: Path,
    seed: int = 3,
    targets: tuple[str, ...] = LORA_TARGETS,
    wrapper: str = "base_model.model.",
    adapter: str = "",
    form: Literal["bin", "safetensors"] = "bin",
    base: str = "lmsys/vicuna-13b-v1.3",
    rows: bool = False,
    added: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """Writes a LoRA of `write_llama` with its projector, in bfloat16, as published.

    wrapper: prefix of all names. adapter: ".default" as in the state of a running peft model. rows: also saves the
    embedding table and the head, like the LoRAs of June 2023. added: adds a tokenizer with these tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = llava_config(**{"_name_or_path": base, "mm_vision_tower": str(clip), "vocab_size": PIECES, **config})
    pairs = {
        wrapper + name.replace(".weight", f"{adapter}.weight"): value.bfloat16()
        for name, value in lora_tensors(final, seed, targets).items()
    }
    if form == "bin":
        torch.save(pairs, folder / "adapter_model.bin")
    else:
        save_file(pairs, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    beside = {wrapper + name: value.bfloat16() for name, value in projector_tensors(final, seed).items()}
    if rows:
        whole = llama_tensors(final, seed, inv_freq=False)
        beside |= {wrapper + name: whole[name].bfloat16() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    torch.save(beside, folder / "non_lora_trainables.bin")
    if added:
        write_tokenizer(folder, added=added)
    settings: dict[str, Any] = {"base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False}
    settings |= {"inference_mode": True, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.05, "peft_type": "LORA"}
    settings |= {"r": LORA_RANK, "target_modules": list(targets), "task_type": "CAUSAL_LM"}
    write_json(folder / "adapter_config.json", settings)
    write_json(folder / "config.json", final)
    return folder


def write_mpt_lora(folder: Path, *, base: Path, seed: int = 3, wrapper: str = "base_model.model.") -> Path:
    """Writes a LoRA of all matrices of a `write_mpt`, with that model's config and a projector."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    pairs, beside = {}, projector_tensors(config, seed)
    for name, weight in mpt_tensors(config, seed).items():
        module = wrapper + name.removesuffix(".weight")
        if weight.dim() == 2 and "wte" not in name:
            pairs[f"{module}.lora_A.weight"] = tensor(seed, name + ".A", (LORA_RANK, weight.shape[1]), 0.1).bfloat16()
            pairs[f"{module}.lora_B.weight"] = tensor(seed, name + ".B", (weight.shape[0], LORA_RANK), 0.1).bfloat16()
    torch.save(pairs, folder / "adapter_model.bin")
    named = {wrapper + name.replace("model.", "transformer.", 1): value for name, value in beside.items()}
    torch.save(named, folder / "non_lora_trainables.bin")
    settings = {"base_model_name_or_path": "mosaicml/mpt-7b-chat", "lora_alpha": LORA_ALPHA, "r": LORA_RANK}
    write_json(folder / "adapter_config.json", {**settings, "peft_type": "LORA"})
    write_json(folder / "config.json", config)
    return folder


def write_projector(
    folder: Path, *, clip: Path, seed: int = 1, prefix: str = "model.", start_end: bool = False, **config: Any
) -> Path:
    """Writes a projector of stage 1; with `start_end`, also the rows of its two tokens and a tokenizer with them."""
    folder.mkdir(parents=True, exist_ok=True)
    final = llava_config(
        architectures=["LlamaForCausalLM"],
        tune_mm_mlp_adapter=True,
        **{"_name_or_path": "lmsys/vicuna-7b-v1.3", "mm_vision_tower": str(clip), "vocab_size": PIECES, **config},
        mm_use_im_start_end=start_end,
    )
    tensors = {name.replace("model.", prefix, 1): value for name, value in projector_tensors(final, seed).items()}
    if start_end:
        tensors[prefix + "embed_tokens.weight"] = tensor(seed, "start_end", (2, final["hidden_size"]), 0.6)
        write_tokenizer(folder, added=("<im_start>", "<im_end>"))
    torch.save(tensors, folder / "mm_projector.bin")
    write_json(folder / "config.json", final)
    return folder


def write_delta(
    folder: Path, *, clip: Path, seed: int = 1, base_seed: int = 7, added: tuple[str, ...] = (), **config: Any
) -> Path:
    """Writes `write_llava` of `seed` minus `write_llama` of `base_seed`, in float16."""
    final = llava_config(**{"vocab_size": PIECES + len(added), "mm_vision_tower": str(clip), **config})
    tensors = llama_tensors(final, seed, inv_freq=True)
    for name, base in llama_tensors(llama_config(), base_seed, inv_freq=True).items():
        tensors[name][: len(base)] -= base
    write_tokenizer(folder, added=added)
    return write_model(folder, tensors | projector_tensors(final, seed), "bin-shards", final)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.tiny OUT")
    out = Path(sys.argv[1])
    write_llava(out / "llava", clip=write_clip((out / "clip").resolve()))
    print(f"wrote random weights in the layout of LLaVA-1.5: {out / 'llava'}, its CLIP: {out / 'clip'}")


# Whole models by the name of their format.
WHOLE: dict[str, Callable[[Path, Path], Path]] = {
    "llava": lambda folder, clip: write_llava(folder, clip=clip),
    "llama": lambda folder, clip: write_llama(folder),
    "mpt": lambda folder, clip: write_mpt(folder, clip=clip),
    "meta": lambda folder, clip: write_meta(folder / "7B"),
    "internlm2": lambda folder, clip: write_internlm2(folder),
}
# Parts of a model by the name of their format, to be applied to `write_llama(…, seed=7)`.
PARTS: dict[str, Callable[[Path, Path], Path]] = {
    "lora": lambda folder, clip: write_lora(folder, clip=clip),
    "projector": lambda folder, clip: write_projector(folder, clip=clip),
    "delta": lambda folder, clip: write_delta(folder, clip=clip, **LLAMA_1),
}
