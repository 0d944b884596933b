"""gpt-fast's `model.pth`: the language model as a single file in torch's zip format, with gpt-fast's tensor names.

gpt-fast rotates adjacent pairs of rows, but hub checkpoints pair the two halves of a head, so the rows of q and k
are reordered. q, k and v are concatenated. Names and row order follow gpt-fast's model.py (commit 03e10bc).
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from llava.config import DecoderConfig, LlavaConfig
from llava.formats import meta
from llava.formats.added_rows import copy_plain_tokenizer, without_added_rows
from llava.formats.format import Checkpoint, Format, WriteJob, require_llama
from llava.formats.llama import with_full_attention
from llava.tensors.files import Weights
from llava.tensors.keymap import Rule, disk_names, plan
from llava.tensors.lazy import Concat, FromFile, HalfSplit, LazyTensor, Slice, interleave
from llava.tensors.torch_zip import write_torch
from llava.tensors.writer import OutputTensor, byte_counter

MODEL_FILE = "model.pth"
RULES = tuple(replace(rule, disk=rule.disk.replace("w{q,k,v}", "wqkv")) for rule in meta.RULES if rule.ours)


class GptFast(Format):
    """A folder with model.pth and the tokenizer files."""

    name = "gpt-fast"
    reads = False
    writes = True
    holds_vision = False

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        return RULES

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        return with_full_attention(without_added_rows(checkpoint), "gpt-fast")

    def outputs(self, checkpoint: Checkpoint) -> list[OutputTensor]:
        """Returns the language model's tensors; a tied head is duplicated, because gpt-fast does not tie weights."""
        require_llama(checkpoint, "gpt-fast")
        tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("decoder.")}
        if checkpoint.config.decoder.tied:
            tensors["decoder.head.weight"] = tensors["decoder.embed.weight"]
        return [
            OutputTensor(
                name=disk_names(ours, RULES)[0],
                dtype=tensor.dtype,
                shape=tensor.shape,
                where=tensor.where,
                chunks=partial(_chunks, checkpoint.config.decoder, ours, tensor),
                ours=ours,
            )
            for ours, tensor in tensors.items()
        ]

    def write(self, job: WriteJob) -> None:
        write_torch(job.folder / MODEL_FILE, job.outputs, byte_counter(job.outputs, job.progress))
        copy_plain_tokenizer(job.source, job.folder)

    def read_back(self, folder: Path, checkpoint: Checkpoint) -> Checkpoint | None:
        weights, sizes = Weights([folder / MODEL_FILE]), checkpoint.config.decoder
        tensors: dict[str, LazyTensor] = {}
        for ours, (name,) in plan(weights, RULES).tensors.items():
            tensor = FromFile(weights, name)
            tensors[ours] = _split_halves(tensor, sizes) if ours.endswith("attn.qkv.weight") else tensor
        if sizes.tied:
            del tensors["decoder.head.weight"]
        return replace(checkpoint, path=folder, tensors=tensors, missing=(), unused={}, unused_names=())


def _chunks(sizes: DecoderConfig, ours: str, tensor: LazyTensor) -> Iterator[Tensor]:
    if not ours.endswith("attn.qkv.weight"):
        yield from tensor.chunks()
        return
    q, k, v = tensor.read().split(list(sizes.qkv_rows))
    yield interleave(q, sizes.head_dim)
    yield interleave(k, sizes.head_dim)
    yield v


def _split_halves(qkv: LazyTensor, sizes: DecoderConfig) -> LazyTensor:
    """Restores the row order of hub checkpoints: the inverse of `_chunks`."""
    q_end = sizes.qkv_rows[0]
    k_end = q_end + sizes.qkv_rows[1]
    q, k = HalfSplit(Slice(qkv, 0, q_end), sizes.head_dim), HalfSplit(Slice(qkv, q_end, k_end), sizes.head_dim)
    return Concat([q, k, Slice(qkv, k_end, qkv.shape[0])])
