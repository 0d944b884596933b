"""A projector alone, as stage 1 leaves it: mm_projector.bin and config.json. It is read by `onbase.py`."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.checkpoint.files import PROJECTOR_FILE
from llava.checkpoint.open import check_headers, open_checkpoint
from llava.checkpoint.write import counting, new_folder, silent, write_json
from llava.config import LlavaConfig
from llava.convert.original import llava_settings, named, tower_name, write_own_tower
from llava.convert.tokenizer import copy_tokenizer
from llava.convert.torchzip import write_torch
from llava.errors import CheckpointError, ConfigError
from llava.formats.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


def write_projector(
    folder: Path,
    config: LlavaConfig,
    tensors: Mapping[str, Tensor],
    *,
    vision_tower: str,
    base: str,
    start_end: Tensor | None = None,
    tokenizer_from: Path | None = None,
    recorded: Mapping[str, Any] | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """`projector.*` and `newline` of `tensors`, in the type they have.

    base: the language model, recorded in config.json. start_end: [2, D], rows of <im_start> and <im_end> where they
    were trained; it takes `tokenizer_from`, a folder with a tokenizer that has the two. beside: writes what else goes
    into the folder. Raises ConfigError.
    """
    if start_end is not None and tokenizer_from is None:
        raise ConfigError("rows of <im_start> and <im_end> need the tokenizer that has them: pass tokenizer_from=")
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("projector.") or name == "newline"}
    if start_end is not None:
        kept["decoder.embed.weight"] = start_end
    tokenizer = load_tokenizer(tokenizer_from) if tokenizer_from else None
    settings = llava_settings(config, tokenizer, vision_tower)
    settings |= {"_name_or_path": base, "tune_mm_mlp_adapter": True, **(recorded or {})}
    items = named(kept, config)
    with new_folder(folder, sum(item.n_bytes for item in items)) as partial:
        write_torch(partial / PROJECTOR_FILE, items, counting(items, silent))
        write_json(partial / "config.json", settings)
        if tokenizer_from:
            copy_tokenizer(tokenizer_from, partial)
        if beside:
            beside(partial)


def extract_projector(source: str | Path, folder: Path, **options: Any) -> int:
    """The projector of any LLaVA, written as above with the model itself as its base; options as for `open_checkpoint`.

    Rows of <im_start> and <im_end> go with it where the model sets them, and the tower that a model holds itself, which
    may be tuned. Returns how many tensors. Raises
    CheckpointError, ConfigError.
    """
    found = open_checkpoint(source, image_mode="original", fetch_tower=False, **options)
    config = found.config
    kept = {
        name: source for name, source in found.sources.items() if name.startswith("projector.") or name == "newline"
    }
    if config.vision is None or not kept:
        raise CheckpointError(f"{found.folder}: is of kind {found.kind} ({found.evidence[0]}): has no projector")
    check_headers(replace(found, missing=tuple(name for name in found.missing if not name.startswith("vision."))))
    rows = None
    if config.start_end:
        start = found.tokenizer.id_of("<im_start>")
        if found.new_tokens or start is None:
            raise CheckpointError(
                f"{found.folder}: its tokenizer files lack <im_start>; put it on its base first, take it from that: "
                f"llava convert {found.folder} OUT --to original --base BASE"
            )
        rows = found.sources["decoder.embed.weight"].rows(start, start + 2)
    write_projector(
        folder,
        config,
        {name: source.read() for name, source in kept.items()},
        vision_tower=tower_name(found, folder, beside=True) or "",
        base=str(options.get("base") if found.kind == "projector" else source),
        start_end=rows,
        tokenizer_from=found.tokenizer_folder if config.start_end else None,
        beside=lambda partial: write_own_tower(found, partial, beside=True),
    )
    if found.kind in ("lora", "delta"):
        log.warning("%s: belongs to the language model of %s, which its base alone is not: merge that", folder, source)
    return len(kept) + (rows is not None)
