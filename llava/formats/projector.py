"""Projector-only checkpoints, as saved by stage-1 training: mm_projector.bin and usually a config.json.

The oldest projectors were published as a single file without a config.json; their config is derived from the tensors.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.config import LlavaConfig, LoadOptions, projector_type
from llava.errors import CheckpointError, ConfigError
from llava.formats.added_rows import VOCAB_TABLES
from llava.formats.clip import tower_of_projector
from llava.formats.format import Checkpoint, CheckpointFiles, ReadConfig, Resolved
from llava.formats.llava import from_memory, llava_config
from llava.formats.multimodal import VISION, read_model_config
from llava.formats.on_base import PartOfModel, base_tensors, read_part
from llava.formats.tokenizer import copy_tokenizer, load_tokenizer
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.atomic import new_folder
from llava.tensors.files import PROJECTOR_FILE, Weights, read_json_if_present
from llava.tensors.keymap import Rule
from llava.tensors.lazy import LazyTensor, MeanRows, Slice, WithRows
from llava.tensors.torch_zip import write_torch
from llava.tensors.writer import byte_counter, no_progress, write_json

log = logging.getLogger(__name__)

_AROUND_IMAGES = ("<im_start>", "<im_end>")
RULES = (
    *VISION,
    Rule("embed_tokens.weight", "decoder.embed.weight"),
    Rule("wte.weight", "decoder.embed.weight"),  # name in MPT
)


class Projector(PartOfModel):
    """Format of projectors: mm_projector.bin, which also contains any trained <im_start> and <im_end> embeddings."""

    name = "projector"

    def detect(self, files: CheckpointFiles) -> list[str]:
        if files.path.is_file():
            return ["a single file with mm_projector.* tensors"]
        found = (files.path / PROJECTOR_FILE).is_file() and not files.weights
        return ["mm_projector.bin is present, but no language model weights"] * found

    def resolve(self, files: CheckpointFiles, base: Checkpoint | None, tokenizer: Tokenizer) -> Resolved:
        assert base
        file = _file(files)
        weights = Weights([file])
        part = read_part(weights, _without_prefixes(weights), RULES)
        rows = part.tensors.pop("decoder.embed.weight", None)
        own = {name: tensor for name, tensor in base_tensors(base).items() if not name.startswith("projector.")}
        tensors = {**own, **part.tensors}
        if rows is not None:
            tensors |= _with_token_rows(rows, base, tokenizer, file)
        return Resolved(tensors, part.dropped, part.unknown, start_end=rows is not None)

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        assert base
        if files.config or not files.path.is_file():
            return super().read_config(files, tensors, base, options)
        decoder = replace(base.config.decoder, vocab_size=tensors["decoder.embed.weight"].shape[0])
        config = _config_from_tensors(files, options.vision_tower)
        return read_model_config(files.path, config, decoder, tensors, options)

    def new_tokens(self, files: CheckpointFiles, first_id: int) -> dict[str, int]:
        trained = {"embed_tokens.weight", "wte.weight"} & set(_without_prefixes(Weights([_file(files)])))
        return {name: first_id + i for i, name in enumerate(_AROUND_IMAGES if trained else ())}


def read_projector(file: Path) -> dict[str, LazyTensor]:
    """Returns the tensors of a projector file under our names. Raises CheckpointError."""
    weights = Weights([file])
    return read_part(weights, _without_prefixes(weights), RULES).tensors


def read_single_file(file: Path) -> CheckpointFiles:
    """Reads a projector file, and the LLaVA config.json next to it, if any. Raises CheckpointError."""
    weights = Weights([file])
    layers = _layers(weights)
    if not layers:
        raise CheckpointError(
            f"{file}: has no mm_projector tensors, and only projectors can be loaded from a single file; "
            "pass the folder"
        )
    if odd := [name for name in layers if len(weights.headers[name].shape) != 2]:
        shape = list(weights.headers[odd[0]].shape)
        raise CheckpointError(f"{file}: {odd[0]} must be a matrix, but has shape {shape}; download the file again")
    config = read_json_if_present(file.parent / "config.json")
    return CheckpointFiles(file, config if "mm_vision_tower" in config else {}, weights)


def _layers(weights: Weights) -> list[str]:
    return [name for name in weights if re.search(r"mm_projector\.(\d+\.)?weight$", name)]


def _config_from_tensors(files: CheckpointFiles, vision_tower: str | Path | None) -> dict[str, Any]:
    """Builds LLaVA's config keys; `vision_tower` defaults to the tower used by published projectors of this shape."""
    widths = [files.weights.headers[name].shape[1] for name in sorted(_layers(files.weights))]
    tower = vision_tower or tower_of_projector(widths[0], len(widths))
    if tower and not vision_tower:
        log.warning(
            "%s: has the shape of projectors for %s; vision_tower= (--vision-tower) selects another tower",
            files.path,
            tower,
        )
    return {
        "mm_vision_tower": str(tower) if tower else None,
        "mm_hidden_size": widths[0],
        "mm_projector_type": projector_type(len(widths)),
        "mm_vision_select_layer": -2,  # as in every published LLaVA checkpoint
    }


def _file(files: CheckpointFiles) -> Path:
    return files.path if files.path.is_file() else files.path / PROJECTOR_FILE


def _without_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Maps each tensor name, stripped of its prefix (which varies between files), to its name in the file."""
    return {re.sub(r"^.*?(mm_projector\.|embed_tokens\.|wte\.|image_newline)", r"\1", name): name for name in names}


def _with_token_rows(rows: LazyTensor, base: Checkpoint, tokenizer: Tokenizer, file: Path) -> dict[str, LazyTensor]:
    """Returns the base model's vocabulary tables, with the last two of `rows` as embeddings of <im_start> and <im_end>.

    All other new rows of a table are set to the mean of its existing rows. Raises CheckpointError.
    """
    start, end = (tokenizer.id_of(text) for text in _AROUND_IMAGES)
    if start is None or end != start + 1:
        raise CheckpointError(
            f"{file}: has embeddings of <im_start> and <im_end>, but the tokenizer lacks these tokens or their ids "
            "are not consecutive; put the tokenizer files from the training run into the folder"
        )
    embed = base.tensors["decoder.embed.weight"]
    if len(rows.shape) != 2 or rows.shape[0] < len(_AROUND_IMAGES) or rows.shape[1:] != embed.shape[1:]:
        raise CheckpointError(
            f"{file}: has embeddings of shape {list(rows.shape)}, but the table in {base.path} has "
            f"{list(embed.shape)}; pass the base model that they were trained with"
        )
    tables: dict[str, LazyTensor] = {}
    for name in VOCAB_TABLES:
        if (table := base.tensors.get(name)) is None:
            continue  # the head is tied
        if table.shape != embed.shape:
            raise CheckpointError(
                f"{table.where}: has shape {list(table.shape)}, but {embed.where} has {list(embed.shape)}"
            )
        if (n_new := end + 1 - table.shape[0]) > 0:
            table = WithRows(table, MeanRows(table, n_new), table.shape[0])
        tables[name] = table
    trained = Slice(rows, rows.shape[0] - 2, rows.shape[0])
    tables["decoder.embed.weight"] = WithRows(tables["decoder.embed.weight"], trained, start)
    return tables


def write_projector(
    folder: Path,
    config: LlavaConfig,
    tensors: Mapping[str, Tensor | LazyTensor],
    *,
    vision_tower: str,
    base: str | None,
    start_end: Tensor | LazyTensor | None = None,
    tokenizer_from: Path | None = None,
    recorded: Mapping[str, Any] | None = None,
    write_extra: Callable[[Path], None] | None = None,
    check_only: bool = False,
) -> int:
    """Writes config.json, and the tensors `projector.*` and `newline` to mm_projector.bin with unchanged dtypes.

    base: folder or hub id of the language model, recorded in config.json unless it is None. start_end: [2, D], trained
    embeddings of <im_start> and <im_end>; requires `tokenizer_from`, a folder whose tokenizer has both tokens.
    recorded: additional keys for config.json. write_extra: receives the folder being written and adds files to it.
    check_only: write nothing; the tensors may then be on the meta device. Returns
    the number of bytes of the weights. Raises ConfigError.
    """
    if start_end is not None and tokenizer_from is None:
        raise ConfigError(
            "start_end= requires a tokenizer with <im_start> and <im_end>; set tokenizer_from= to its folder"
        )
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("projector.") or name == "newline"}
    if start_end is not None:
        kept["decoder.embed.weight"] = start_end
    tokenizer = load_tokenizer(tokenizer_from) if tokenizer_from else None
    settings = llava_config(config, tokenizer, vision_tower)
    settings |= {**({"_name_or_path": base} if base else {}), "tune_mm_mlp_adapter": True, **(recorded or {})}
    outputs = from_memory(kept, config)
    n_bytes = sum(out.n_bytes for out in outputs)
    if check_only:
        return n_bytes
    with new_folder(folder, n_bytes) as partial:
        write_torch(partial / PROJECTOR_FILE, outputs, byte_counter(outputs, no_progress))
        write_json(partial / "config.json", settings)
        if tokenizer_from:
            copy_tokenizer(tokenizer_from, partial)
        if write_extra:
            write_extra(partial)
    return n_bytes
