"""llama.cpp's format: a file with the language model and, of a LLaVA, one with tower and projector (mmproj).

Names, keys and the order of rows are those that llama.cpp reads (release of llama-cpp-python 0.3.36). It rotates
neighbouring pairs of rows: q and k are put in that order. Matrices are float16, or bfloat16 where they were; all else,
of which llama.cpp's kernels take nothing narrower, is float32.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llava.checkpoint import keymap
from llava.checkpoint.joined import PIECE_BYTES
from llava.checkpoint.keymap import Rule
from llava.checkpoint.open import Checkpoint
from llava.checkpoint.source import Source, Typed
from llava.checkpoint.write import Item, Progress, counting, write_bytes
from llava.convert import ggufvocab
from llava.convert.gptfast import interleaved
from llava.convert.llama import part_rows
from llava.errors import CheckpointError, ConfigError

_BLOCKS = (
    Rule("token_embd.weight", "decoder.embed.weight"),
    Rule("blk.*.attn_norm.weight", "decoder.blocks.*.attn_norm.weight"),
    Rule("blk.*.attn_output.weight", "decoder.blocks.*.attn.out.weight"),
    Rule("blk.*.ffn_norm.weight", "decoder.blocks.*.mlp_norm.weight"),
    Rule("blk.*.ffn_gate.weight", "decoder.blocks.*.mlp.gate.weight"),
    Rule("blk.*.ffn_up.weight", "decoder.blocks.*.mlp.up.weight"),
    Rule("blk.*.ffn_down.weight", "decoder.blocks.*.mlp.down.weight"),
    Rule("output_norm.weight", "decoder.norm.weight"),
    Rule("output.weight", "decoder.head.weight"),
)
RULES = {  # of the language model, by its kind
    "llama": (*_BLOCKS, Rule("blk.*.attn_{q,k,v}.weight", "decoder.blocks.*.attn.qkv.weight")),
    "mpt": (*_BLOCKS, Rule("blk.*.attn_qkv.weight", "decoder.blocks.*.attn.qkv.weight")),
}
MMPROJ = (
    Rule("v.class_embd", "vision.cls"),
    Rule("v.patch_embd.weight", "vision.patch.weight"),
    Rule("v.position_embd.weight", "vision.pos"),
    Rule("v.image_newline", "newline"),
    *(
        Rule(f"{disk}.{kind}", f"{ours}.{kind}")
        for disk, ours in (
            ("v.pre_ln", "vision.pre_norm"),
            ("v.blk.*.ln1", "vision.blocks.*.attn_norm"),
            ("v.blk.*.attn_{q,k,v}", "vision.blocks.*.attn.qkv"),
            ("v.blk.*.attn_out", "vision.blocks.*.attn.out"),
            ("v.blk.*.ln2", "vision.blocks.*.mlp_norm"),
            ("v.blk.*.ffn_up", "vision.blocks.*.mlp.up"),
            ("v.blk.*.ffn_down", "vision.blocks.*.mlp.down"),
            ("mm.*", "projector.*"),
        )
        for kind in ("weight", "bias")
    ),
)
MODEL_FILE, MMPROJ_FILE = "model-{}.gguf", "mmproj-{}.gguf"  # with the type of the matrices


def package() -> ModuleType:
    """The package gguf, which is an extra. Raises ConfigError."""
    try:
        import gguf
    except ImportError:
        raise ConfigError("GGUF files need the package gguf: pip install 'llava-native[gguf]'") from None
    return gguf


def held(checkpoint: Checkpoint) -> Checkpoint:
    """The same model, each tensor in its type here. Raises CheckpointError for what llama.cpp has no form for."""
    package()
    _check_form(checkpoint)
    ggufvocab.read(checkpoint)  # raises
    return replace(checkpoint, sources={n: Typed(s, _dtype(n, s)) for n, s in checkpoint.sources.items()})


def _dtype(ours: str, source: Source) -> torch.dtype:
    matrix = len(source.shape) == 2 and ours != "vision.pos"
    return torch.float32 if not matrix else torch.bfloat16 if source.dtype == torch.bfloat16 else torch.float16


def _check_form(checkpoint: Checkpoint) -> None:
    config, alone = checkpoint.config, "; --no-vision writes the language model alone"
    scaling, vision, projector = config.decoder.rope_scaling, config.vision, config.projector
    why = ""
    if scaling and scaling.kind != "linear":
        why = f"rotary positions stretched as {scaling.kind!r}, which is not written here"
    elif vision is None or projector is None:
        return
    elif projector.depth != 2:
        kind = {0: "an identity", 1: "a linear layer"}.get(projector.depth, f"{projector.depth} layers")
        why = f"{kind} as projector, llama.cpp's `mlp` computes two layers with GELU between{alone}"
    elif config.start_end:
        why = f"<im_start> and <im_end> around pictures, which llama.cpp sets bare{alone}"
    elif vision.select_feature != "patch":
        why = f"the class token among the features, which llama.cpp leaves out{alone}"
    elif vision.mlp_dim == vision.dim:
        why = f"a tower whose MLP is as wide as itself, which llama.cpp reads upside down{alone}"
    if why:
        raise CheckpointError(f"{checkpoint.folder}: can not be a GGUF: it has {why}")


def items(checkpoint: Checkpoint) -> list[Item]:
    """All tensors under llama.cpp's names, those of the language model first."""
    config, written = checkpoint.config, list[Item]()
    for ours, source in checkpoint.sources.items():
        names = keymap.disk_names(ours, (*RULES[config.decoder.kind], *MMPROJ))
        ends = list(accumulate(part_rows(ours, source.shape[0], len(names), config), initial=0))
        for name, (start, stop) in zip(names, pairwise(ends), strict=True):
            head_dim = config.decoder.head_dim if _is_rotated(name) else 1
            written.append(
                Item(
                    name=name,
                    dtype=source.dtype,
                    shape=(stop - start, *source.shape[1:]),
                    where=source.where,
                    parts=partial(_parts, source, start, stop, head_dim),
                    ours=ours,
                )
            )
    return sorted(written, key=_is_mmproj)


def _is_rotated(name: str) -> bool:
    return name.startswith("blk.") and name.endswith((".attn_q.weight", ".attn_k.weight"))


def _is_mmproj(item: Item) -> bool:
    return not item.ours.startswith("decoder.")


def _parts(source: Source, start: int, stop: int, head_dim: int) -> Iterator[Tensor]:
    """Rows from `start` to `stop`, some heads at a time; head_dim 1: in their own order."""
    row_bytes = torch.Size(source.shape[1:]).numel() * source.dtype.itemsize
    step = max(PIECE_BYTES // (row_bytes * head_dim), 1) * head_dim
    for first in range(start, stop, step):
        rows = source.rows(first, min(first + step, stop))
        yield interleaved(rows, head_dim) if head_dim > 1 else rows


# --------------------------------------------------------------------------------------------------------- files


def write(checkpoint: Checkpoint, folder: Path, target: Path, written: Sequence[Item], progress: Progress) -> None:
    """Both files, tensor by tensor. `checkpoint` and `written`: of `held` and `items`."""
    count = counting(written, progress)
    files = ((MODEL_FILE, _describe_model, checkpoint.config.decoder.kind), (MMPROJ_FILE, _describe_mmproj, "clip"))
    for i, (name, describe, arch) in enumerate(files):
        if own := [item for item in written if _is_mmproj(item) == bool(i)]:
            kind = "bf16" if any(item.dtype == torch.bfloat16 for item in own) else "f16"
            _write_file(folder / name.format(kind), arch, own, partial(describe, checkpoint=checkpoint), count)


def _write_file(
    file: Path, arch: str, written: Sequence[Item], describe: Callable[[Any], None], count: Callable[[int], None]
) -> None:
    gguf = package()
    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    wide = any(item.dtype == torch.bfloat16 for item in written)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if wide else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe(writer)
    for item in written:
        writer.add_tensor_info(item.name, item.shape, None, item.n_bytes, raw_dtype=kinds[item.dtype])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (out,) = writer.fout
        writer.write_padding(out, out.tell())
        for item in written:
            write_bytes(out, item, count)
            writer.write_padding(out, item.n_bytes)
    finally:
        writer.close()


def _describe_model(writer: Any, checkpoint: Checkpoint) -> None:
    gguf, sizes = package(), checkpoint.config.decoder
    writer.add_type("model")
    writer.add_vocab_size(sizes.vocab_size)
    writer.add_context_length(sizes.max_seq)
    writer.add_embedding_length(sizes.dim)
    writer.add_block_count(sizes.n_layers)
    writer.add_feed_forward_length(sizes.mlp_dim)
    writer.add_head_count(sizes.n_heads)
    writer.add_head_count_kv(sizes.n_kv_heads)
    if sizes.kind == "mpt":
        writer.add_layer_norm_eps(sizes.eps)
        writer.add_max_alibi_bias(sizes.alibi_bias_max)
        if sizes.clip_qkv:
            writer.add_clamp_kqv(sizes.clip_qkv)
    else:
        writer.add_layer_norm_rms_eps(sizes.eps)
        writer.add_key_length(sizes.head_dim)
        writer.add_value_length(sizes.head_dim)
        writer.add_rope_dimension_count(sizes.head_dim)
        writer.add_rope_freq_base(sizes.rope_theta)
        if sizes.rope_scaling:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(sizes.rope_scaling.factor)
    ggufvocab.write(writer, checkpoint)


def _describe_mmproj(writer: Any, checkpoint: Checkpoint) -> None:
    """`block_count` are the blocks held; `feature_layer` says that all of them run, else llama.cpp leaves one out."""
    vision, image = checkpoint.config.vision, checkpoint.config.image
    assert vision is not None
    assert image is not None
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)  # read by releases before May 2025
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(checkpoint.config.decoder.dim)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.dim)
    writer.add_vision_feed_forward_length(vision.mlp_dim)
    writer.add_vision_block_count(vision.n_blocks)
    writer.add_array("clip.vision.feature_layer", [vision.n_blocks])
    writer.add_vision_head_count(vision.n_heads)
    writer.add_vision_attention_layernorm_eps(vision.eps)
    writer.add_vision_image_mean(image.mean)
    writer.add_vision_image_std(image.std)
    writer.add_vision_use_gelu(vision.activation == "gelu")  # false: CLIP's own approximation
    if image.aspect == "anyres":
        writer.add_array("clip.vision.image_grid_pinpoints", [side for size in image.pinpoints for side in size])
        writer.add_string("clip.vision.mm_patch_merge_type", image.merge)


# -------------------------------------------------------------------------------------------------------- report


def remarks(source: Checkpoint) -> list[str]:
    """What a reader of these files should know."""
    lines = ["Rows of q and k are in llama.cpp's order; matrices are float16 or bfloat16, all else float32."]
    rounded = [s for n, s in source.sources.items() if s.dtype == torch.float32 and _dtype(n, s) != torch.float32]
    if rounded:
        lines.append(f"{len(rounded)} tensors were float32 and are rounded to float16.")
    if source.config.image:
        lines += _OF_PICTURES
    if source.config.image and source.config.image.aspect == "anyres":
        lines.append("Tiles of a picture are put behind each other there, padding stays; `image_newline` is not used.")
    return lines


_OF_PICTURES = (
    "llama.cpp pads pictures to a square, resizes them in its own way, and computes GELU by its tanh form.",
    "llama.cpp since May 2025 sets CLIP's class token behind the patches and shifts their positions by one (its issue "
    "25814): answers about pictures are less exact there until that is mended; the file is right.",
)
