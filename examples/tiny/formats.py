"""Writes llava-tiny in every published format: `python -m examples.tiny.formats --out DIR`.

All folders contain the same model and give the same answers. The bases that published models start from do not exist
here, so they are derived from the model: a base is the model minus what the LoRA, delta or projector adds back.

  folder              contents                                     opened with
  native              native format, everything in one file        -
  llava-bin           llava format like v1.5: .bin shards, index   vision_tower=clip
  llava-safetensors   llava format like v1.6: tower included       vision_tower=clip-before (only its config is read)
  lora                A and B, non_lora_trainables.bin             base=llama-before-lora, vision_tower=clip
  delta               difference from the base, float16            base=llama-before-delta, vision_tower=clip
  projector           mm_projector.bin                             base=llama, vision_tower=clip
  llava-hf            llava-hf format, for transformers            -
  llava               llava format, written by conversion          -
  llama               only the language model                      template=vicuna_v1

`FORMS` is this table. `FORMS[name].options(DIR)` returns the arguments of `llava.load(DIR / name, ...)`. Each
config.json also names its tower, by the path at the time of writing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import llava
from llava.assistant import LLAVA_TINY, Assistant
from llava.checkpoint.consistency import check_headers
from llava.checkpoint.open import open_checkpoint
from llava.convert.convert import convert
from llava.convert.split import make_delta
from llava.errors import LlavaError
from llava.formats.clip import write_tower
from llava.formats.llava import write_llava
from llava.formats.lora import Factors, write_lora
from llava.formats.projector import write_projector


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form of the model, and the other folders needed to open it."""

    base: str | None = None
    vision_tower: str | None = None
    template: str | None = None  # for a folder that does not record one
    exact: bool = True  # whether the weights are bit-exact; otherwise they were rounded to float16 once more
    lengthened: bool = False  # the embedding table has extra rows, and the tower ends at the selected layer
    sees: bool = True  # False: only a language model

    def options(self, out: Path) -> dict[str, Any]:
        """The arguments of `llava.load` if all forms are in `out`."""
        folders = {"base": self.base, "vision_tower": self.vision_tower}
        options: dict[str, Any] = {name: out / folder for name, folder in folders.items() if folder}
        return options | ({"template": self.template} if self.template else {})

    def load(self, folder: Path, **options: Any) -> Assistant:
        """Loads the model from `folder`, with the other folders it needs next to it. `options`: as for `llava.load`."""
        return llava.load(folder, **(self.options(folder.parent) | options))


FORMS = {
    "native": Form(),
    "llava-bin": Form(vision_tower="clip"),
    "llava-safetensors": Form(vision_tower="clip-before"),
    "lora": Form(base="llama-before-lora", vision_tower="clip", exact=False),
    "delta": Form(base="llama-before-delta", vision_tower="clip"),
    "projector": Form(base="llama", vision_tower="clip"),
    "llava-hf": Form(lengthened=True),
    "llava": Form(),
    "llama": Form(template="vicuna_v1", sees=False),
}

SHARD_BYTES = 3_000_000  # small, so that there are several shards
RANK, ALPHA = 8, 16.0
AWAY = 0.5  # distance of a base from the model in standard deviations, large enough to change the answers


def write(model: Path, out: Path) -> None:
    """Writes the full LLaVA in the folder `model` in every form, with the other folders needed. Raises LlavaError."""
    writer = Writer(model, out)
    for name, made in WRITERS.items():
        made(writer, out / name)


class Writer:
    """Writes one model to many folders."""

    def __init__(self, model: Path, out: Path):
        self.model, self.out = model, out
        checkpoint = open_checkpoint(model)
        check_headers(checkpoint)
        self.config, self.tokenizer = checkpoint.config, checkpoint.tokenizer_folder
        self.tensors = dict(checkpoint.read_tensors())

    def native(self, folder: Path) -> None:
        convert(self.model, folder)

    def llava_hf(self, folder: Path) -> None:
        convert(self.model, folder, to="llava-hf")

    def llava(self, folder: Path) -> None:
        convert(self.model, folder, to="llava")

    def llava_bin(self, folder: Path) -> None:
        self._merged(folder, file_type="bin", max_shard_bytes=SHARD_BYTES)

    def llava_safetensors(self, folder: Path) -> None:
        self._merged(folder, tower_inside=True, max_shard_bytes=SHARD_BYTES)

    def lora(self, folder: Path) -> None:
        """Writes a LoRA on all matrices of the language model, with a trained projector."""
        beside = {name: tensor for name, tensor in self.tensors.items() if name.startswith(("projector.", "newline"))}
        named: dict[str, Any] = {"base": self._beside(folder, "base"), "vision_tower": self._beside(folder)}
        write_lora(folder, self.config, self.adapters, r=RANK, alpha=ALPHA, dropout=0.05, non_lora=beside, **named)

    def delta(self, folder: Path) -> None:
        make_delta(self.out / "llava-bin", self.out / "llama-before-delta", folder, file_type="bin")

    def projector(self, folder: Path) -> None:
        named: dict[str, Any] = {"base": self._beside(folder, "base"), "vision_tower": self._beside(folder)}
        write_projector(folder, self.config, self.tensors, **named)

    def llama(self, folder: Path) -> None:
        self._llama(folder, self.tensors)

    def llama_before_lora(self, folder: Path) -> None:
        """W - scale * B @ A, computed in float64 and rounded to the model's dtype, so that merging gives almost W."""
        self._llama(folder, {name: self._without_adapter(name, tensor) for name, tensor in self.tensors.items()})

    def llama_before_delta(self, folder: Path) -> None:
        """Each weight times 0.51 to 1.49, a range in which the difference is exact (Sterbenz lemma)."""
        self._llama(folder, {name: _shaken(tensor, i) for i, (name, tensor) in enumerate(self.tensors.items())})

    def clip(self, folder: Path) -> None:
        write_tower(folder, self.config, self.tensors)

    def clip_before(self, folder: Path) -> None:
        """A tower of the same size with other weights, to detect a reader that ignores the tower in the shards."""
        write_tower(folder, self.config, {name: _shaken(t, i) for i, (name, t) in enumerate(self.tensors.items())})

    def _merged(self, folder: Path, **options: Any) -> None:
        tower = self._beside(folder)
        write_llava(folder, self.config, self.tensors, tokenizer_from=self.tokenizer, vision_tower=tower, **options)

    def _llama(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Writes a language model as it is usually published, without a template."""
        config = replace(self.config, vision=None, projector=None, image=None, template=None)
        decoder = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
        write_llava(folder, config, decoder, tokenizer_from=self.tokenizer, vision_tower=None)

    def _beside(self, folder: Path, part: str = "vision_tower") -> str:
        return str(FORMS[folder.name].options(self.out.absolute())[part])

    @cached_property
    def adapters(self) -> dict[str, dict[str, Factors]]:
        """Random A and B by module and part, in the form that `write_lora` expects."""
        sizes = self.config.decoder
        rows = {"q": sizes.n_heads, "k": sizes.n_kv_heads, "v": sizes.n_kv_heads}
        random = torch.Generator().manual_seed(0)
        made: dict[str, dict[str, Factors]] = {}
        for name, weight in self.tensors.items():
            if name.startswith("decoder.blocks.") and weight.ndim == 2:
                stacked = name.endswith("attn.qkv.weight")
                parts = {part: n * sizes.head_dim for part, n in rows.items()} if stacked else {"": len(weight)}
                module = name.removesuffix(".weight")
                made[module] = {part: _low_rank(weight, n, random) for part, n in parts.items()}
        return made

    def _without_adapter(self, name: str, weight: Tensor) -> Tensor:
        if (parts := self.adapters.get(name.removesuffix(".weight"))) is None:
            return weight
        product = torch.cat([b.double() @ a.double() for a, b in parts.values()])  # q, k and v are stacked
        return weight.double() - ALPHA / RANK * product


def _low_rank(weight: Tensor, rows: int, random: torch.Generator) -> Factors:
    """A [r, in] and B [rows, r] in the weight's dtype. scale * B @ A has about `AWAY` times the weight's deviation."""
    a = torch.randn(RANK, weight.shape[1], generator=random) / weight.shape[1] ** 0.5
    size = AWAY * weight.float().std() / (ALPHA / RANK) * (weight.shape[1] / RANK) ** 0.5
    return a.to(weight.dtype), (torch.randn(rows, RANK, generator=random) * size).to(weight.dtype)


def _shaken(tensor: Tensor, seed: int) -> Tensor:
    factors = 0.51 + 0.98 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return (tensor.float() * factors).to(tensor.dtype)


WRITERS: dict[str, Callable[[Writer, Path], None]] = {  # bases first, because a delta is computed from folders
    "clip": Writer.clip,
    "clip-before": Writer.clip_before,
    "llama": Writer.llama,
    "llama-before-lora": Writer.llama_before_lora,
    "llama-before-delta": Writer.llama_before_delta,
    "native": Writer.native,
    "llava-bin": Writer.llava_bin,
    "llava-safetensors": Writer.llava_safetensors,
    "lora": Writer.lora,
    "delta": Writer.delta,
    "projector": Writer.projector,
    "llava-hf": Writer.llava_hf,
    "llava": Writer.llava,
}


def main(
    out: Annotated[Path, typer.Option(help="folder to write one subfolder per form into")],
    model: Annotated[Path, typer.Option(help="folder of a full LLaVA with a Llama decoder")] = LLAVA_TINY,
) -> None:
    """Write a model in every published format, and print how to open each."""
    try:
        write(model, out)
    except LlavaError as error:
        typer.echo(f"forms: {error}", err=True)
        raise typer.Exit(2) from None
    for name, form in FORMS.items():
        options = "".join(f", {key}={str(value)!r}" for key, value in form.options(out).items())
        typer.echo(f"llava.load({str(out / name)!r}{options})")


if __name__ == "__main__":
    typer.run(main)
