"""GGUF, llama.cpp's format: a language model file and, for a LLaVA model, an mmproj file with the tower and projector.

Names, keys and row order follow llama.cpp (the release in llama-cpp-python 0.3.36). llama.cpp rotates adjacent pairs
of rows, but hub checkpoints pair the two halves of a head, so the rows of q and k are reordered. bfloat16 matrices keep
their dtype, and other matrices are stored as float16. All other tensors are float32, because llama.cpp's kernels do not
accept a narrower type for them.
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

from llava.config import LlavaConfig
from llava.errors import CheckpointError, ConfigError, counted
from llava.formats import gguf_vocab
from llava.formats.format import Checkpoint, Format, WriteJob
from llava.formats.llama import with_full_attention
from llava.tensors.keymap import Rule, disk_names
from llava.tensors.lazy import CHUNK_BYTES, Cast, LazyTensor, interleave
from llava.tensors.writer import OutputTensor, byte_counter, write_bytes

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
LANGUAGE = {  # decoder kind -> key table
    "llama": (*_BLOCKS, Rule("blk.*.attn_{q,k,v}.weight", "decoder.blocks.*.attn.qkv.weight")),
    "mpt": (*_BLOCKS, Rule("blk.*.attn_qkv.weight", "decoder.blocks.*.attn.qkv.weight")),
}
MMPROJ = (
    Rule("v.class_embd", "vision.cls"),
    Rule("v.patch_embd.weight", "vision.patch.weight"),
    Rule("v.position_embd.weight", "vision.pos"),
    Rule("v.image_newline", "newline"),
    *(
        Rule(f"{disk}.{param}", f"{ours}.{param}")
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
        for param in ("weight", "bias")
    ),
)
MODEL_FILE, MMPROJ_FILE = "model-{}.gguf", "mmproj-{}.gguf"  # {}: dtype of the matrices, f16 or bf16


class Gguf(Format):
    """GGUF files for llama.cpp. They are read back only to verify a conversion; `llava.load` does not open GGUF."""

    name = "gguf"
    reads = False
    writes = True
    exact = False  # float32 matrices are rounded to float16

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        return (*LANGUAGE[config.decoder.kind if config else "llama"], *MMPROJ)

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        """Casts every tensor to its dtype in the file. Raises CheckpointError if GGUF cannot represent the model."""
        package()
        _refuse_unsupported(checkpoint)
        gguf_vocab.read_vocab(checkpoint)  # raises CheckpointError if llama.cpp does not support the tokenizer
        checkpoint = with_full_attention(checkpoint, "llama.cpp")
        return replace(checkpoint, tensors={n: Cast(t, _dtype(n, t)) for n, t in checkpoint.tensors.items()})

    def outputs(self, checkpoint: Checkpoint) -> list[OutputTensor]:
        """Returns the tensors to write, language model first."""
        config, rules, outputs = checkpoint.config, self.rules(checkpoint.config), list[OutputTensor]()
        for ours, tensor in checkpoint.tensors.items():
            names, n_rows = disk_names(ours, rules), tensor.shape[0]
            heights = [n_rows // len(names)] * len(names)
            if len(names) > 1 and ours.startswith("decoder."):
                heights = list(config.decoder.qkv_rows)
            for name, (start, stop) in zip(names, pairwise(accumulate(heights, initial=0)), strict=True):
                head_dim = config.decoder.head_dim if _is_rotated(name) else 1
                outputs.append(
                    OutputTensor(
                        name=name,
                        dtype=tensor.dtype,
                        shape=(stop - start, *tensor.shape[1:]),
                        where=tensor.where,
                        chunks=partial(_chunks, tensor, start, stop, head_dim),
                        ours=ours,
                    )
                )
        return sorted(outputs, key=_is_mmproj)

    def write(self, job: WriteJob) -> None:
        """Writes the model file and, with vision, the mmproj file, one tensor at a time."""
        count = byte_counter(job.outputs, job.progress)
        kind = job.checkpoint.config.decoder.kind
        files = ((MODEL_FILE, _describe_model, kind), (MMPROJ_FILE, _describe_mmproj, "clip"))
        for i, (name, describe, architecture) in enumerate(files):
            if own := [out for out in job.outputs if _is_mmproj(out) == bool(i)]:
                type_name = "bf16" if any(out.dtype == torch.bfloat16 for out in own) else "f16"
                file = job.folder / name.format(type_name)
                _write_file(file, architecture, own, partial(describe, checkpoint=job.checkpoint), count)

    def read_back(self, folder: Path, checkpoint: Checkpoint) -> Checkpoint | None:
        from llava.formats.gguf_read import read_gguf

        return read_gguf(folder, checkpoint)

    def remarks(self, source: Checkpoint) -> list[str]:
        lines = ["Rows of q and k are in llama.cpp's order; matrices are float16 or bfloat16, the rest float32."]
        rounded = [t for n, t in source.tensors.items() if t.dtype == torch.float32 and _dtype(n, t) != torch.float32]
        if rounded:
            lines.append(f"Rounded from float32 to float16: {counted(len(rounded), 'tensor')}.")
        if window := source.config.decoder.sliding_window:
            lines.append(f"llama.cpp has no sliding window for this model, so the context ends at {window} tokens.")
        if source.config.image:
            lines += _ABOUT_IMAGES
        if source.config.image and source.config.image.aspect == "anyres":
            lines.append("llama.cpp concatenates an image's tiles and keeps padding; `image_newline` is not used.")
        return lines


_ABOUT_IMAGES = (
    "llama.cpp pads images to a square, resizes them with its own filter, and approximates GELU with tanh.",
    "Since May 2025, llama.cpp puts CLIP's class token after the patches and shifts their positions by one (its issue "
    "25814): until that is fixed, its answers about images are less accurate. The file itself is correct.",
)


def package() -> ModuleType:
    """Imports the optional gguf package. Raises ConfigError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ConfigError("GGUF requires the gguf package; install it with: pip install 'llava-native[gguf]'") from None
    return gguf


def _dtype(ours: str, tensor: LazyTensor) -> torch.dtype:
    is_matrix = len(tensor.shape) == 2 and ours != "vision.pos"
    return torch.float32 if not is_matrix else torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float16


def _refuse_unsupported(checkpoint: Checkpoint) -> None:
    config, advice = checkpoint.config, "; use --no-vision to write only the language model"
    scaling, vision, projector = config.decoder.rope_scaling, config.vision, config.projector
    why = ""
    if scaling and scaling.kind != "linear":
        why = f"rope scaling {scaling.kind!r}, which is not supported"
    elif vision is None or projector is None:
        return
    elif projector.depth != 2:
        found = {0: "an identity", 1: "a linear layer"}.get(projector.depth, f"{projector.depth} layers")
        why = f"{found} as its projector, but llama.cpp's `mlp` projector has two layers with GELU in between{advice}"
    elif config.start_end:
        why = f"<im_start> and <im_end> around images, which llama.cpp omits{advice}"
    elif vision.select_feature != "patch":
        why = f"a class token in its image features, which llama.cpp omits{advice}"
    elif vision.mlp_dim == vision.dim:
        why = f"a vision tower whose MLP width equals its model width, which makes llama.cpp transpose the MLP{advice}"
    if why:
        raise CheckpointError(f"{checkpoint.path}: cannot be written as GGUF: the model has {why}")


def _is_rotated(name: str) -> bool:
    return name.startswith("blk.") and name.endswith((".attn_q.weight", ".attn_k.weight"))


def _is_mmproj(out: OutputTensor) -> bool:
    return not out.ours.startswith("decoder.")


def _chunks(tensor: LazyTensor, start: int, stop: int, head_dim: int) -> Iterator[Tensor]:
    """Yields rows [start, stop) in chunks of whole heads, reordered for llama.cpp (not reordered if head_dim is 1)."""
    row_bytes = torch.Size(tensor.shape[1:]).numel() * tensor.dtype.itemsize
    step = max(CHUNK_BYTES // (row_bytes * head_dim), 1) * head_dim
    for first in range(start, stop, step):
        rows = tensor.rows(first, min(first + step, stop))
        yield interleave(rows, head_dim) if head_dim > 1 else rows


# ------------------------------------------------------------------------------------------------------------- files


def _write_file(
    file: Path,
    architecture: str,
    outputs: Sequence[OutputTensor],
    describe: Callable[[Any], None],
    count: Callable[[int], None],
) -> None:
    gguf = package()
    types = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    has_bfloat16 = any(out.dtype == torch.bfloat16 for out in outputs)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if has_bfloat16 else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe(writer)
    for out in outputs:
        writer.add_tensor_info(out.name, out.shape, None, out.n_bytes, raw_dtype=types[out.dtype])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (raw,) = writer.fout
        writer.write_padding(raw, raw.tell())
        for out in outputs:
            write_bytes(raw, out, count)
            writer.write_padding(raw, out.n_bytes)
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
    gguf_vocab.write_vocab(writer, checkpoint)


def _describe_mmproj(writer: Any, checkpoint: Checkpoint) -> None:
    """Adds the keys of the mmproj file. `feature_layer` makes llama.cpp run all `block_count` stored blocks."""
    vision, image = checkpoint.config.vision, checkpoint.config.image
    assert vision is not None
    assert image is not None
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)  # required by llama.cpp before May 2025
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
    writer.add_vision_use_gelu(vision.activation == "gelu")  # False: CLIP's quick GELU
    if image.aspect == "anyres":
        writer.add_array("clip.vision.image_grid_pinpoints", [side for size in image.pinpoints for side in size])
        writer.add_string("clip.vision.mm_patch_merge_type", image.merge)
