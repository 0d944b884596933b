"""llava-tiny in every layout that LLaVAs are published in: `python -m examples.tiny.layouts --out DIR`.

All of them are one model and give the same answers. They are made from one folder with nothing else at hand, so what
the published LLaVAs were trained from is made up here: a base is the model with something taken away, which the layout
then brings back.

  layout              what it holds                                    opened with
  native              our own: everything in one file                  -
  merged-bin          as v1.5: shards of .bin, index                   vision_tower=clip
  merged-safetensors  as v1.6: a trained tower inside                  vision_tower=clip-before (its config only)
  lora                A and B, non_lora_trainables.bin                 base=llama-before-lora, vision_tower=clip
  delta               the difference in float16                        base=llama-before-delta, vision_tower=clip
  projector           mm_projector.bin                                 base=llama, vision_tower=clip
  hf                  as llava-hf's, which transformers opens          -
  original            the merged layout, made by converting            -
  llama               the language model alone, for any Llama loader   template=vicuna_v1

`LAYOUTS` is this table; `LAYOUTS[name].options(DIR)` are the arguments of `llava.load(DIR / name, ...)`. Towers are
also named in each config.json, with their paths as they were written.
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
from llava.checkpoint.open import check_headers, open_checkpoint
from llava.convert import native
from llava.convert.delta import write_delta
from llava.convert.lora import Pair, write_lora
from llava.convert.original import write_merged, write_tower
from llava.convert.projector import write_projector
from llava.errors import LlavaError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to store the model, and the folders beside it that it is opened with."""

    base: str | None = None
    vision_tower: str | None = None
    template: str | None = None  # for folders that record none
    exact: bool = True  # the weights come back bit for bit; else rounded to float16 once more
    lengthened: bool = False  # the embedding table has further rows, and the tower is told to end where it is read
    sees: bool = True  # False: a language model alone

    def options(self, out: Path) -> dict[str, Any]:
        """Arguments of `llava.load`, all layouts being in `out`."""
        folders = {"base": self.base, "vision_tower": self.vision_tower}
        options: dict[str, Any] = {name: out / folder for name, folder in folders.items() if folder}
        return options | ({"template": self.template} if self.template else {})

    def load(self, folder: Path, **options: Any) -> Assistant:
        """The model in `folder`, with the parts that lie beside it; `options` as for `llava.load`."""
        return llava.load(folder, **(self.options(folder.parent) | options))


LAYOUTS = {
    "native": Layout(),
    "merged-bin": Layout(vision_tower="clip"),
    "merged-safetensors": Layout(vision_tower="clip-before"),
    "lora": Layout(base="llama-before-lora", vision_tower="clip", exact=False),
    "delta": Layout(base="llama-before-delta", vision_tower="clip"),
    "projector": Layout(base="llama", vision_tower="clip"),
    "hf": Layout(lengthened=True),
    "original": Layout(),
    "llama": Layout(template="vicuna_v1", sees=False),
}

SHARD_BYTES = 3_000_000  # small: several shards
RANK, ALPHA = 8, 16.0
AWAY = 0.5  # size of what a base lacks, in standard deviations of the weights: enough to answer otherwise


def write(model: Path, out: Path) -> None:
    """Every layout of `model`, a folder that holds a whole LLaVA, and the parts they need. Raises LlavaError."""
    writer = Writer(model, out)
    for name, made in WRITERS.items():
        made(writer, out / name)


class Writer:
    """One model on its way into many folders."""

    def __init__(self, model: Path, out: Path):
        self.model, self.out = model, out
        checkpoint = open_checkpoint(model)
        check_headers(checkpoint)
        self.config, self.tokenizer = checkpoint.config, checkpoint.tokenizer_folder
        self.tensors = dict(checkpoint.tensors())

    def native(self, folder: Path) -> None:
        native.convert(self.model, folder)

    def hf(self, folder: Path) -> None:
        native.convert(self.model, folder, to="hf")

    def original(self, folder: Path) -> None:
        native.convert(self.model, folder, to="original")

    def merged_bin(self, folder: Path) -> None:
        self._merged(folder, form="bin", max_shard_bytes=SHARD_BYTES)

    def merged_safetensors(self, folder: Path) -> None:
        self._merged(folder, tower_inside=True, max_shard_bytes=SHARD_BYTES)

    def lora(self, folder: Path) -> None:
        """Of all matrices of the language model; the projector was trained beside."""
        beside = {name: tensor for name, tensor in self.tensors.items() if name.startswith(("projector.", "newline"))}
        named: dict[str, Any] = {"base": self._beside(folder, "base"), "vision_tower": self._beside(folder)}
        write_lora(folder, self.config, self.adapters, r=RANK, alpha=ALPHA, dropout=0.05, non_lora=beside, **named)

    def delta(self, folder: Path) -> None:
        write_delta(folder, self.out / "merged-bin", self.out / "llama-before-delta")

    def projector(self, folder: Path) -> None:
        named: dict[str, Any] = {"base": self._beside(folder, "base"), "vision_tower": self._beside(folder)}
        write_projector(folder, self.config, self.tensors, **named)

    def llama(self, folder: Path) -> None:
        self._llama(folder, self.tensors)

    def llama_before_lora(self, folder: Path) -> None:
        """W - scale * B @ A, computed in float64 and rounded to the model's type: adding B @ A gives W nearly."""
        self._llama(folder, {name: self._without_adapter(name, tensor) for name, tensor in self.tensors.items()})

    def llama_before_delta(self, folder: Path) -> None:
        """Each weight times 0.51 to 1.49: the difference of such near neighbours is exact (Sterbenz)."""
        self._llama(folder, {name: _shaken(tensor, i) for i, (name, tensor) in enumerate(self.tensors.items())})

    def clip(self, folder: Path) -> None:
        write_tower(folder, self.config, self.tensors)

    def clip_before(self, folder: Path) -> None:
        """The same sizes with other weights: a reader that takes these for the ones inside the shards is found out."""
        write_tower(folder, self.config, {name: _shaken(t, i) for i, (name, t) in enumerate(self.tensors.items())})

    def _merged(self, folder: Path, **options: Any) -> None:
        tower = self._beside(folder)
        write_merged(folder, self.config, self.tensors, tokenizer_from=self.tokenizer, vision_tower=tower, **options)

    def _llama(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """A language model as others publish it: it knows no template."""
        config = replace(self.config, vision=None, projector=None, image=None, template=None)
        decoder = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
        write_merged(folder, config, decoder, tokenizer_from=self.tokenizer, vision_tower=None)

    def _beside(self, folder: Path, part: str = "vision_tower") -> str:
        return str(LAYOUTS[folder.name].options(self.out.absolute())[part])

    @cached_property
    def adapters(self) -> dict[str, dict[str, Pair]]:
        """Random A and B, by module and part, as `write_lora` takes them."""
        sizes = self.config.decoder
        rows = {"q": sizes.n_heads, "k": sizes.n_kv_heads, "v": sizes.n_kv_heads}
        random = torch.Generator().manual_seed(0)
        made: dict[str, dict[str, Pair]] = {}
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
        product = torch.cat([b.double() @ a.double() for a, b in parts.values()])  # q, k, v lie under each other
        return weight.double() - ALPHA / RANK * product


def _low_rank(weight: Tensor, rows: int, random: torch.Generator) -> Pair:
    """A [r, in] and B [rows, r] in the weight's type; their product times the scale is about `AWAY` weights in size."""
    a = torch.randn(RANK, weight.shape[1], generator=random) / weight.shape[1] ** 0.5
    size = AWAY * weight.float().std() / (ALPHA / RANK) * (weight.shape[1] / RANK) ** 0.5
    return a.to(weight.dtype), (torch.randn(rows, RANK, generator=random) * size).to(weight.dtype)


def _shaken(tensor: Tensor, seed: int) -> Tensor:
    factors = 0.51 + 0.98 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return (tensor.float() * factors).to(tensor.dtype)


WRITERS: dict[str, Callable[[Writer, Path], None]] = {  # parts first: a delta is taken of folders
    "clip": Writer.clip,
    "clip-before": Writer.clip_before,
    "llama": Writer.llama,
    "llama-before-lora": Writer.llama_before_lora,
    "llama-before-delta": Writer.llama_before_delta,
    "native": Writer.native,
    "merged-bin": Writer.merged_bin,
    "merged-safetensors": Writer.merged_safetensors,
    "lora": Writer.lora,
    "delta": Writer.delta,
    "projector": Writer.projector,
    "hf": Writer.hf,
    "original": Writer.original,
}


def main(
    out: Annotated[Path, typer.Option(help="folder to write the layouts into, each in one of its own")],
    model: Annotated[Path, typer.Option(help="folder of a whole LLaVA with a Llama decoder")] = LLAVA_TINY,
) -> None:
    """Writes one model in every published layout, and prints how each is opened."""
    try:
        write(model, out)
    except LlavaError as error:
        typer.echo(f"layouts: {error}", err=True)
        raise typer.Exit(2) from None
    for name, layout in LAYOUTS.items():
        options = "".join(f", {key}={str(value)!r}" for key, value in layout.options(out).items())
        typer.echo(f"llava.load({str(out / name)!r}{options})")


if __name__ == "__main__":
    typer.run(main)
