"""LoRAs in the PEFT format (arXiv:2106.09685), and the fully fine-tuned weights that LLaVA saves alongside them.

O rows of a matrix   I columns of a matrix   r rank
"""

import logging
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llava.config import DecoderConfig, LlavaConfig, LoadOptions
from llava.errors import CheckpointError, ConfigError
from llava.formats.adapter_config import ADAPTER_CONFIG, LoraSettings, read_settings
from llava.formats.adapter_tensors import Adapter, FactorPair, adapter_weights, read_adapter, without_wrappers
from llava.formats.format import Checkpoint, CheckpointFiles, ReadConfig, Resolved
from llava.formats.llava import WRITERS, FileType, from_memory, llava_config, rules_for
from llava.formats.on_base import PartOfModel, adapter_rules, base_tensors, read_part
from llava.formats.tokenizer import copy_tokenizer, load_tokenizer
from llava.model.llava import shapes
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.atomic import new_folder
from llava.tensors.files import ADAPTER_FILES, NON_LORA_FILE, Weights
from llava.tensors.keymap import Rule, Target, disk_names, target_of
from llava.tensors.lazy import Concat, InMemory, LazyTensor, Slice
from llava.tensors.sums import LoraPair, WithLora
from llava.tensors.torch_zip import write_torch
from llava.tensors.writer import OutputTensor, byte_counter, no_progress, output, write_json

log = logging.getLogger(__name__)

_EMBEDDING_TABLES = ("embed_tokens.weight", "wte.weight")


class Lora(PartOfModel):
    """Format of LoRAs: adapter_config.json, adapter_model.*, and fine-tuned weights in non_lora_trainables.bin.

    Tensors have the names of LLaVA's own code or those of transformers' models, which llava-hf folders contain.
    """

    name = "lora"
    exact = False  # adapted tensors are computed as W + scale * B @ A in float32

    def detect(self, files: CheckpointFiles) -> list[str]:
        has_adapter = any((files.path / name).is_file() for name in ADAPTER_FILES)
        if not (files.path / ADAPTER_CONFIG).is_file() or (files.weights and not has_adapter):
            return []  # beside a whole model, an adapter_config.json without an adapter is left over from merging
        return ["adapter_config.json is present: a LoRA, to be added to a base model"]

    def resolve(self, files: CheckpointFiles, base: Checkpoint | None, tokenizer: Tokenizer) -> Resolved:
        """Adds the LoRA to the base model's matrices; fully fine-tuned tensors replace the base model's tensors."""
        assert base
        if files.weights:
            raise CheckpointError(
                f"{files.path}: contains a whole model ({next(iter(files.weights.headers.values())).file.name}) and a "
                f"LoRA ({ADAPTER_CONFIG}); move the files of one of them into a folder of their own"
            )
        rules, extra = adapter_rules(base), files.path / NON_LORA_FILE
        settings = read_settings(files.path / ADAPTER_CONFIG)
        weights = Weights([extra] if extra.is_file() else [])
        trained = read_part(weights, without_wrappers(weights), rules)
        adapter = read_adapter(adapter_weights(files.path), settings, rules)
        own = {**trained.tensors, **adapter.full.tensors}
        under = _Base(base.path, {**base_tensors(base), **own}, rules, base.config.decoder)
        if base.config.decoder.tied and any(_is_head(name, rules) for name in adapter.factors):
            under.tensors.setdefault("decoder.head.weight", base.tensors["decoder.embed.weight"])
        if "projector.0.weight" not in own:
            _warn_about_projector(under, adapter, files.path)
        tensors = {**under.tensors, **_with_replaced_parts(adapter.parts, under, files.path)}
        if base.config.decoder.tied and not settings.ties_weights:
            tensors = _with_the_bases_head(tensors, base)
        pairs: dict[str, list[LoraPair]] = {}
        unneeded: list[str] = []
        for name, factors in adapter.factors.items():
            if under.omits(name):
                unneeded += (name for tensor in factors.tensors.values() for name in tensor.names)
                continue
            ours, placed = _place(name, factors, settings, under, files.path)
            pairs.setdefault(ours, []).append(placed)
        tensors |= {ours: WithLora(tensors[ours], placed) for ours, placed in pairs.items()}
        dropped = (*trained.dropped, *adapter.full.dropped, *unneeded)
        return Resolved(tensors, dropped, trained.unknown | adapter.full.unknown)

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        assert base
        config = files.config or base.source_config
        describes_llava = bool(config.get("mm_vision_tower") or config.get("vision"))
        has_projector = "projector.0.weight" in tensors or config.get("mm_projector_type") == "identity"
        if options.vision and describes_llava and not has_projector:  # before its vision tower is looked for
            raise CheckpointError(
                f"{files.path}: describes a LLaVA, but has no {NON_LORA_FILE} with its projector, and the base "
                f"{base.path} is a language model without a projector; download {NON_LORA_FILE} from where the LoRA "
                "came from, or pass a LLaVA as base= (--base)"
            )
        return super().read_config(files, tensors, base, options)

    def new_tokens(self, files: CheckpointFiles, first_id: int) -> dict[str, int]:
        extra = files.path / NON_LORA_FILE
        if not files.config.get("mm_use_im_start_end") or not extra.is_file():
            return {}
        headers = Weights([extra]).headers
        rows = [header.shape[0] for name, header in headers.items() if name.endswith(_EMBEDDING_TABLES)]
        around = ("<im_start>", "<im_end>")
        names = {2: around, 3: ("<im_patch>", *around)}.get(max(rows, default=0) - first_id, ())
        return {name: first_id + i for i, name in enumerate(names)}


# ----------------------------------------------------------------------------------------------------------- reading


class _Base(NamedTuple):
    """What a LoRA is added to."""

    path: Path
    tensors: dict[str, LazyTensor]
    rules: tuple[Rule, ...]
    decoder: DecoderConfig

    def omits(self, name: str) -> bool:
        """Whether `name` belongs to a block of the vision tower that LLaVA does not use, and that the base omits."""
        target = target_of(name, self.rules)
        block = re.match(r"vision\.blocks\.\d+\.", target.ours) if target else None
        if block is None or "vision.cls" not in self.tensors:
            return False
        prefix = block[0]
        return not any(ours.startswith(prefix) for ours in self.tensors)

    def find(self, name: str, lora: Path) -> tuple[Target, LazyTensor]:
        """Returns the tensor of the base that the LoRA's tensor `name` changes. Raises CheckpointError."""
        target = target_of(name, self.rules)
        if target and target.ours in self.tensors:
            return target, self.tensors[target.ours]
        why = "pass the base model of this LoRA"
        if target and target.ours.startswith("vision."):
            why = (
                f"the base only refers to its vision tower; first write both into one folder with llava convert "
                f"{shlex.quote(str(self.path))} OUT --to native, and pass that folder as base= (--base)"
            )
        raise CheckpointError(f"{lora}: adapts {name}, which {self.path} lacks; {why}")


def _warn_about_projector(base: _Base, adapter: Adapter, lora: Path) -> None:
    """Warns that a LoRA has no projector, unless it was trained on a plain language model."""
    if "projector.0.weight" in base.tensors:
        log.warning("%s: has no projector of its own; uses the projector of the base %s", lora, base.path)
    elif any("language_model." in name for name in adapter.factors):
        log.warning(
            "%s: was made on a LLaVA, but the base %s is a language model without vision; pass a LLaVA as base= "
            "(--base) to use images",
            lora, base.path,
        )  # fmt: skip


def _is_head(name: str, rules: tuple[Rule, ...]) -> bool:
    target = target_of(name, rules)
    return target is not None and target.ours == "decoder.head.weight"


def _with_the_bases_head(tensors: dict[str, LazyTensor], base: Checkpoint) -> dict[str, LazyTensor]:
    """Returns the tensors with the table of a tied base as head, if the LoRA replaces the table but not the head.

    PEFT trains a copy of the table, and its base keeps the old one as head. A table with new rows was tied again.
    """
    table, own = tensors["decoder.embed.weight"], base.tensors["decoder.embed.weight"]
    if table is own or table.shape != own.shape or "decoder.head.weight" in tensors:
        return tensors
    return tensors | {"decoder.head.weight": own}


def _first_row(target: Target, n_rows: int, n_own: int, decoder: DecoderConfig) -> int | None:
    """Returns the row at which a part with `n_own` rows starts in a concatenated tensor, or None if it does not fit."""
    heights = decoder.qkv_rows if target.ours.startswith("decoder.") else (n_rows // target.n_parts,) * target.n_parts
    if target.n_parts == 1:
        heights = (n_rows,)
    return sum(heights[: target.part]) if n_own == heights[target.part] else None


def _with_replaced_parts(parts: Mapping[str, LazyTensor], base: _Base, folder: Path) -> dict[str, LazyTensor]:
    """Returns the base's tensors of which only some parts, such as the biases of q and v, were saved in full."""
    found: dict[str, LazyTensor] = {}
    for name, part in parts.items():
        if base.omits(name):
            continue
        target, whole = base.find(name, folder)
        first = _first_row(target, whole.shape[0], part.shape[0], base.decoder)
        if first is None or part.shape[1:] != whole.shape[1:]:
            raise CheckpointError(
                f"{part.where}: has shape {list(part.shape)}, but in {base.path} q, k and v together have "
                f"{list(whole.shape)}; pass the base model of this LoRA"
            )
        whole, end = found.get(target.ours, whole), first + part.shape[0]
        rest = [Slice(whole, low, high) for low, high in ((0, first), (end, whole.shape[0])) if low < high]
        found[target.ours] = Concat([*rest[: first > 0], part, *rest[first > 0 :]])
    return found


def _place(name: str, factors: FactorPair, settings: LoraSettings, base: _Base, folder: Path) -> tuple[str, LoraPair]:
    """Returns our name for the matrix that `factors` adapt, and the `LoraPair` to add to it. Raises CheckpointError."""
    if missing := {"A", "B"} - set(factors.tensors):
        raise CheckpointError(f"{folder}: has no lora_{missing.pop()} for {name}; download the LoRA again")
    target, matrix = base.find(name, folder)
    a, b = factors.tensors["A"], factors.tensors["B"]
    if not len(matrix.shape) == len(a.shape) == len(b.shape) == 2:
        raise CheckpointError(f"{folder}: adapts {name}, which is not a matrix; only LoRAs of matrices are supported")
    rows, columns = matrix.shape
    first = _first_row(target, rows, b.shape[0], base.decoder)
    if a.shape[1] != columns or a.shape[0] != b.shape[1] or first is None:
        raise CheckpointError(
            f"{folder}: adapts {name} as a {b.shape[0]} x {a.shape[1]} matrix, but in {base.path} it is "
            f"{rows} x {columns}{' (q, k and v together)' * (target.n_parts > 1)}; pass the base model of this LoRA"
        )
    return target.ours, LoraPair(first, a, b, settings.scale(factors.module, a.shape[0]))


# ----------------------------------------------------------------------------------------------------------- writing

Factors = tuple[Tensor, Tensor]  # A [r, I], B [O, r]
_PREFIX = "base_model.model."  # PEFT adds this prefix to the tensor names of the wrapped model


def write_lora(
    folder: Path,
    config: LlavaConfig,
    lora: Mapping[str, Mapping[str, Factors]],
    *,
    r: int,
    alpha: float,
    dropout: float,
    base: str,
    vision_tower: str | None,
    non_lora: Mapping[str, Tensor | LazyTensor],
    tokenizer_from: Path | None = None,
    file_type: FileType = "safetensors",
    recorded: Mapping[str, Any] | None = None,
    write_extra: Callable[[Path], None] | None = None,
    check_only: bool = False,
) -> int:
    """Writes adapter_config.json, adapter_model, non_lora_trainables.bin and config.json; tensors keep their dtypes.

    lora: factors keyed by our module name and part, e.g. {"decoder.blocks.3.attn.qkv": {"q": (A, B), "v": (A, B)},
    "decoder.blocks.3.mlp.gate": {"": (A, B)}}. non_lora: tensors keyed by our names. base: the base model,
    recorded in the configs; if `tokenizer_from` is None, loading uses the base model's tokenizer. recorded: additional
    keys for config.json. write_extra: receives the folder being written and adds files to it. check_only: write
    nothing; the tensors may then be on the meta device. Returns the number of bytes of the weights. Raises ConfigError.
    """
    adapter = list(_adapter_outputs(lora, config, r))
    trained = [replace(out, name=_PREFIX + out.name) for out in from_memory(non_lora, config)]
    tokenizer = load_tokenizer(tokenizer_from) if tokenizer_from else None
    settings = llava_config(config, tokenizer, vision_tower) | {"_name_or_path": base, **(recorded or {})}
    n_bytes = sum(out.n_bytes for out in (*adapter, *trained))
    if check_only:
        return n_bytes
    with new_folder(folder, n_bytes) as partial:
        WRITERS[file_type](partial / f"adapter_model.{file_type}", adapter, byte_counter(adapter, no_progress))
        write_torch(partial / NON_LORA_FILE, trained, byte_counter(trained, no_progress))
        write_json(partial / ADAPTER_CONFIG, _adapter_config(adapter, r, alpha, dropout, base))
        write_json(partial / "config.json", settings)
        if tokenizer_from:
            copy_tokenizer(tokenizer_from, partial)
        if write_extra:
            write_extra(partial)
    return n_bytes


def _adapter_outputs(lora: Mapping[str, Mapping[str, Factors]], config: LlavaConfig, r: int) -> Iterator[OutputTensor]:
    rules, sizes = rules_for(config), shapes(config)
    for module, parts in lora.items():
        if (weight := f"{module}.weight") not in sizes:
            raise ConfigError(f"{module}: is no matrix of this model; expected a name like decoder.blocks.0.attn.out")
        names = disk_names(weight, rules)
        known = dict(zip("qkv", config.decoder.qkv_rows, strict=True)) if len(names) > 1 else {"": sizes[weight][0]}
        for part, (a, b) in parts.items():
            if part not in known:
                raise ConfigError(f"{module}: the part is {part!r}; expected one of {', '.join(map(repr, known))}")
            expected = [r, sizes[weight][1]], [known[part], r]
            if (found := (list(a.shape), list(b.shape))) != expected:
                raise ConfigError(
                    f"{module}: A and B of part {part!r} have shapes {found[0]} and {found[1]}; expected {expected[0]} "
                    f"and {expected[1]} for rank {r}"
                )
            name = _PREFIX + names[list(known).index(part)].removesuffix(".weight")
            for letter, tensor in (("A", a), ("B", b)):
                full_name = f"{name}.lora_{letter}.weight"
                yield output(full_name, InMemory(tensor=tensor, origin=full_name))


def _adapter_config(adapter: list[OutputTensor], r: int, alpha: float, dropout: float, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({out.name.split(".")[-3] for out in adapter}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
