"""A model as its difference to a base, so that it can be published without the base. It is read by `onbase.py`."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from llava.checkpoint import bases
from llava.checkpoint.files import read_json
from llava.checkpoint.onbase import fits
from llava.checkpoint.open import Checkpoint, open_checkpoint
from llava.checkpoint.source import Source, Typed
from llava.checkpoint.sums import Summed
from llava.checkpoint.write import Progress, new_folder, silent, write_shards
from llava.convert import llama
from llava.convert.original import WRITERS, Form, rules_of
from llava.convert.tokenizer import copy_tokenizer
from llava.errors import CheckpointError


def write_delta(
    folder: Path, model: str | Path, base: str | Path, *, form: Form = "bin", progress: Progress = silent
) -> None:
    """model - base in float16, streamed; what the base has not is written as it is: the projector, rows of new tokens.

    model: a merged folder, whose config and tokenizer go along. Adding the base again gives the model back up to one
    rounding of the difference. Raises CheckpointError.
    """
    target, under = open_checkpoint(model, vision=False), open_checkpoint(base, vision=False)
    if target.kind != "merged":
        raise CheckpointError(f"{target.folder}: is of kind {target.kind}; a delta is taken of a merged folder")
    own = under.folder / "config.json"
    recorded = read_json(own) if own.is_file() else {}
    # readers of deltas refuse such a base: said now, in one line
    bases.check_raw(under.folder, under.kind, under.config.decoder, target.config.decoder, recorded, force=True)
    sources = {name: _difference(name, source, under) for name, source in (target.sources | target.spare).items()}
    rules = rules_of(target.config, linear="projector.2.weight" not in sources)
    named = llama.taken_apart(sources, target.config, rules)
    items = [replace(item, dtype=torch.float16) for item in named]
    with new_folder(folder, sum(item.n_bytes for item in items)) as partial:
        write_shards(partial, items, progress, writer=WRITERS[form])
        shutil.copyfile(target.folder / "config.json", partial / "config.json")
        copy_tokenizer(target.folder, partial)


def _difference(name: str, source: Source, under: Checkpoint) -> Source:
    if (own := under.sources.get(name)) is None:
        return Typed(source, torch.float16)
    if not fits(name, source, own):
        raise CheckpointError(f"{own.where}: has shape {list(own.shape)}, {source.where} has {list(source.shape)}")
    return Summed(source, own, torch.float16, sign=-1)
