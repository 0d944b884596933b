"""LoRAs in the PEFT format (arXiv:2106.09685), and the fully fine-tuned weights that LLaVA saves alongside them.

O rows of a matrix   I columns of a matrix   r rank
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.config import LlavaConfig
from llava.errors import CheckpointError, ConfigError
from llava.formats.format import Checkpoint, CheckpointFiles, Resolved
from llava.formats.llava import WRITERS, FileType, from_memory, llava_config, rules_for
from llava.formats.on_base import PartOfModel, PartTensors, base_tensors, llava_rules, non_empty, read_part
from llava.formats.tokenizer import copy_tokenizer, load_tokenizer
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.atomic import new_folder
from llava.tensors.files import ADAPTER_FILES, NON_LORA_FILE, Weights, parsing, read_json
from llava.tensors.keymap import Rule, disk_names, target_of
from llava.tensors.lazy import InMemory, LazyTensor
from llava.tensors.sums import LoraPair, WithLora
from llava.tensors.torch_zip import write_torch
from llava.tensors.writer import OutputTensor, byte_counter, no_progress, output, write_json

Scale = Callable[[str, int], float]  # (module name, rank) -> scaling factor of B @ A
_EMBEDDING_TABLES = ("embed_tokens.weight", "wte.weight")
_CONFIG_FILE = "adapter_config.json"


class Lora(PartOfModel):
    """Format of LoRAs: adapter_config.json, adapter_model.*, and fine-tuned weights in non_lora_trainables.bin."""

    name = "lora"
    exact = False  # adapted tensors are computed as W + scale * B @ A in float32

    def detect(self, files: CheckpointFiles) -> list[str]:
        found = (files.path / _CONFIG_FILE).is_file()
        return ["adapter_config.json is present: a LoRA, to be added to a base model"] * found

    def resolve(self, files: CheckpointFiles, base: Checkpoint | None, tokenizer: Tokenizer) -> Resolved:
        """Adds the LoRA to the base model's matrices; fully fine-tuned tensors replace the base model's tensors."""
        assert base
        rules, extra = llava_rules(base), files.path / NON_LORA_FILE
        weights = Weights([extra] if extra.is_file() else [])
        trained = read_part(weights, _without_wrappers(weights), rules)
        file = next((files.path / name for name in ADAPTER_FILES if (files.path / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{files.path}: has no {' or '.join(ADAPTER_FILES)}; download the LoRA again")
        factors, saved = _read_adapter(Weights([file]), rules)
        tensors = {**base_tensors(base), **trained.tensors, **saved.tensors}
        scale = _read_scale(files.path / _CONFIG_FILE)
        pairs: dict[str, list[LoraPair]] = {}
        for name, pair in factors.items():
            ours, placed = _place(name, pair, scale, tensors, rules, base.path, file)
            pairs.setdefault(ours, []).append(placed)
        tensors |= {ours: WithLora(tensors[ours], placed) for ours, placed in pairs.items()}
        return Resolved(tensors, trained.dropped + saved.dropped, trained.unknown | saved.unknown)

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


def _without_wrappers(names: Weights) -> dict[str, str]:
    """Maps each tensor name, stripped of PEFT and DeepSpeed wrapper prefixes, to its name in the file."""
    return {re.sub(_WRAPPERS, "", name): name for name in names}


_WRAPPERS = r"^(?:(?:base_model|module|_forward_module)\.|model\.(?=(?:model|module|transformer|lm_head)\.))+"


def _read_adapter(weights: Weights, rules: tuple[Rule, ...]) -> tuple[dict[str, dict[str, LazyTensor]], PartTensors]:
    """Returns the factors A and B, keyed by matrix name, and the tensors that PEFT saved in full (modules_to_save)."""
    factors: dict[str, dict[str, LazyTensor]] = {}
    full: dict[str, str] = {}
    for plain, name in _without_wrappers(weights).items():
        if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", plain):
            factors.setdefault(f"{match[1]}.weight", {})[match[2]] = non_empty(weights, name)
        else:
            full[re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", plain)] = name
    return factors, read_part(weights, full, rules)


def _read_scale(file: Path) -> Scale:
    """Returns a function that computes the scaling factor of B @ A. Raises CheckpointError for unsupported variants."""
    config = read_json(file)
    for key in ("fan_in_fan_out", "use_dora", "layer_replication", "lora_bias", "use_qalora"):
        if config.get(key):
            raise CheckpointError(
                f"{file}: {key} is {config[key]!r}, which is not supported; merge the LoRA into its base with peft"
            )
    if str(start := config.get("init_lora_weights")).lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, which changes the base weights, so the LoRA does not match the "
            "original base; save the LoRA with peft's path_initial_model_for_weight_conversion, or merge it with peft"
        )
    if (peft_type := config.get("peft_type", "LORA")) != "LORA":
        raise CheckpointError(f"{file}: peft_type is {peft_type!r}; expected LORA")
    with parsing(file):
        default, rslora = float(config["lora_alpha"]), bool(config.get("use_rslora"))
        own = {str(key): float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()}
    for key in own:
        try:
            re.compile(_module_pattern(key))
        except re.error as error:
            raise CheckpointError(
                f"{file}: alpha_pattern key {key!r} is not a regular expression ({error}); download the LoRA again"
            ) from None

    def scale(name: str, r: int) -> float:
        module = name.removesuffix(".weight")
        alpha = next((own[key] for key in own if re.fullmatch(_module_pattern(key), module)), default)
        return alpha / (r**0.5 if rslora else r)

    return scale


_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _module_pattern(key: str) -> str:
    """Returns a regex that matches module names whose last components match `key`, a key of alpha_pattern."""
    return rf"(.*\.)?({key})"


def _place(
    name: str,
    factors: Mapping[str, LazyTensor],
    scale: Scale,
    tensors: Mapping[str, LazyTensor],
    rules: tuple[Rule, ...],
    base: Path,
    file: Path,
) -> tuple[str, LoraPair]:
    """Returns our name for the matrix that `factors` adapt, and the `LoraPair` to add to it. Raises CheckpointError."""
    if missing := {"A", "B"} - set(factors):
        raise CheckpointError(f"{file}: has no lora_{missing.pop()} for {name}; download the LoRA again")
    target, a, b = target_of(name, rules), factors["A"], factors["B"]
    if target is None or target.ours not in tensors:
        raise CheckpointError(f"{file}: adapts {name}, which {base} lacks; pass the base model of this LoRA")
    shape = tensors[target.ours].shape
    if not len(shape) == len(a.shape) == len(b.shape) == 2:
        raise CheckpointError(f"{file}: adapts {name}, which is not a matrix; only LoRAs of matrices are supported")
    rows, columns = shape
    # k and v may have fewer rows than q (grouped-query attention), so their first rows are counted from the end of qkv
    first = rows - (target.n_parts - target.part) * b.shape[0] if target.part else 0
    n_all = target.n_parts * b.shape[0]
    fits = n_all <= rows if target.part else b.shape[0] <= rows <= n_all
    if a.shape[1] != columns or a.shape[0] != b.shape[1] or not fits:
        raise CheckpointError(
            f"{file}: adapts {name} as a {b.shape[0]} x {a.shape[1]} matrix, but in {base} it is {rows} x {columns}"
            f"{' (q, k and v together)' * (target.n_parts > 1)}; pass the base model of this LoRA"
        )
    return target.ours, LoraPair(first, a, b, scale(name, a.shape[0]))


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
        write_json(partial / _CONFIG_FILE, _adapter_config(adapter, r, alpha, dropout, base))
        write_json(partial / "config.json", settings)
        if tokenizer_from:
            copy_tokenizer(tokenizer_from, partial)
        if write_extra:
            write_extra(partial)
    return n_bytes


def _adapter_outputs(lora: Mapping[str, Mapping[str, Factors]], config: LlavaConfig, r: int) -> Iterator[OutputTensor]:
    rules = rules_for(config)
    for module, parts in lora.items():
        names = disk_names(f"{module}.weight", rules)
        for part, (a, b) in parts.items():
            if a.shape[0] != r or b.shape[1] != r:
                raise ConfigError(f"{module}: the LoRA has rank {a.shape[0]}; expected {r}")
            if (part == "") != (len(names) == 1):
                raise ConfigError(f"{module}: the part is {part!r}; expected q, k or v for attn.qkv and '' otherwise")
            name = _PREFIX + names["qkv".index(part)].removesuffix(".weight")
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
