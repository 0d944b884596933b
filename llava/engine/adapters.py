"""Runs several adapters of one base in the same batch: their decoders are joined where they differ only in LoRAs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from llava.config import DecoderConfig
from llava.model.decoder import Decoder
from llava.model.llava import Llava
from llava.model.lora import LoraLinear, RoutedLora, Routing
from llava.model.shallow import shallow_copy
from llava.preprocess.inputs import Preprocessor


class Variant(NamedTuple):
    """A model and its preprocessor: the base, or the base with an adapter."""

    model: Llava
    preprocessor: Preprocessor


class Joined(NamedTuple):
    """A decoder for the tokens of several variants."""

    decoder: Decoder
    routing: Routing
    names: Sequence[str | None]


def join(variants: Mapping[str | None, Variant]) -> list[Joined]:
    """Groups variants whose blocks and final norms share all weights except LoRAs, and joins each group's decoders.

    Embedding tables and heads may differ, since `Joined.decoder` is only used from embeddings to hidden states. An
    adapter's own config.json can change how these are computed, such as the RoPE scaling; it is then in another group.
    """
    groups: dict[tuple[DecoderConfig, tuple[int, ...]], list[str | None]] = {}
    for name, variant in variants.items():
        model = variant.model
        config = replace(model.config.decoder, vocab_size=1, max_seq=1, tied=False)  # these do not affect the blocks
        groups.setdefault((config, _weights(model.decoder)), []).append(name)
    return [_join({name: variants[name].model.decoder for name in names}) for names in groups.values()]


def _weights(decoder: Decoder) -> tuple[int, ...]:
    """Returns the addresses of the weights in the blocks and the final norm, without those of LoRAs."""
    return tuple(
        weight.data_ptr()
        for part in (decoder.blocks, decoder.norm)
        for name, weight in part.named_parameters()
        if ".adapters." not in name
    )


def _join(decoders: Mapping[str | None, Decoder]) -> Joined:
    routing = Routing()
    first = next(iter(decoders.values()))
    loras: dict[str, dict[str | None, LoraLinear]] = {}
    for name, decoder in decoders.items():
        for path, module in decoder.named_modules():
            if isinstance(module, LoraLinear):
                loras.setdefault(path, {})[name] = module
    if not loras:
        return Joined(first, routing, list(decoders))
    joined = shallow_copy(first)
    for path, by_name in loras.items():
        parent, _, leaf = path.rpartition(".")
        base = next(iter(by_name.values())).base
        setattr(joined.get_submodule(parent), leaf, RoutedLora(base, by_name, routing))
    return Joined(joined, routing, list(decoders))
