"""Determines which base model a LoRA, projector or delta checkpoint needs, and names it in errors about bases."""

from collections.abc import Iterator
from contextlib import contextmanager

from llava.errors import LlavaError
from llava.formats.base_model import BaseModelError, NeededBase, NoBaseError, comparable_name, named_base
from llava.formats.format import CheckpointFiles, Detection
from llava.formats.recorded_base import recorded_names
from llava.zoo import catalogue
from llava.zoo.match import Match, known_bases, match


def needed_base(files: CheckpointFiles, detection: Detection) -> NeededBase:
    """Returns the base recorded in the files, as a hub id if the catalogue contains it.

    If the files record no base, returns the bases of the matching catalogue entries.
    """
    for name, where, _ in recorded_names(files, detection.format):
        return named_base(name, where, known_bases().get(comparable_name(name)))
    try:
        found = match(files, detection)
    except LlavaError:  # must not replace the BaseModelError being reported
        return NeededBase([], "its files do not say which")
    entries = found.candidates or [near for near in found.nearest if near.entry["format"] == detection.format]
    names = list(dict.fromkeys(base for near in entries if (base := catalogue.base_id(near.entry))))
    return NeededBase(names, f"inferred from {_ids(entries)}" if names else "its files do not say which")


def _ids(matches: list[Match]) -> str:
    text = ", ".join(near.entry["id"] for near in matches)
    return text if not matches or not matches[0].differs else f"{text}, the nearest in the zoo"


@contextmanager
def advice() -> Iterator[None]:
    """Adds the result of `needed_base` to any error about a base raised in the block."""
    try:
        yield
    except (BaseModelError, NoBaseError) as error:
        raise error.naming(needed_base(error.files, error.detection)) from None
