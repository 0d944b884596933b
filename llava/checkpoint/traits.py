"""What a folder's files say that tells rows of the zoo apart: sizes from tensors, the rest from config and tokenizer.

Names recorded inside files are evidence. The folder's own name is never looked at.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava.checkpoint import keymap, settings
from llava.checkpoint.detect import Facts, Finding, Kind
from llava.checkpoint.files import ADAPTER_FILES, PROJECTOR_FILE, TRAINED_BESIDE, Weights, read_json
from llava.checkpoint.published import CLIP_CONFIGS
from llava.checkpoint.settings import Shapes
from llava.errors import CheckpointError


class Trait(NamedTuple):
    """One thing that files say, and where it was seen."""

    value: Any
    seen: str


Traits = dict[str, Trait]
FORMATS: dict[Kind, str] = {"mpt": "merged", "llava-hf": "hf-reexport"}  # other kinds are called as in the zoo
SIZES = ("layers", "width", "key/value heads", "vocabulary", "image size", "rank")


def traits_of(facts: Facts, finding: Finding) -> Traits:
    """All that could be seen, by its name."""
    config = _config(facts, finding.kind)
    shapes = _shapes(facts, finding.kind)
    found: Traits = {"format": Trait(FORMATS.get(finding.kind, finding.kind), finding.evidence[0])}
    found |= _decoder(config, shapes, finding.kind) | _vision(config, shapes) | _numbers(config)
    if finding.kind == "lora":
        found |= _lora(facts.folder)
    return found | _tokens(facts.folder) | _recorded(facts, finding.kind)


def _config(facts: Facts, kind: Kind) -> Mapping[str, Any]:
    """config.json with the keys of the published layout."""
    if kind == "llava-hf":
        return settings.flat(facts.settings, _json(facts.folder / "preprocessor_config.json"), str(facts.folder))
    if kind != "native":
        return facts.settings
    decoder, image = facts.settings.get("decoder") or {}, facts.settings.get("image") or {}
    return {
        "num_hidden_layers": decoder.get("n_layers"),
        "num_key_value_heads": decoder.get("n_kv_heads"),
        "num_attention_heads": decoder.get("n_heads"),
        "max_position_embeddings": decoder.get("max_seq"),
        "rms_norm_eps": decoder.get("eps"),
        "rope_theta": decoder.get("rope_theta"),
        "image_aspect_ratio": image.get("aspect"),
        "mm_patch_merge_type": image.get("merge"),
        "mm_use_im_start_end": facts.settings.get("start_end", False),
        "mm_vision_tower": "the one inside" if facts.settings.get("vision") else None,
    }


def _shapes(facts: Facts, kind: Kind) -> Shapes:
    """Shapes by our names, of all files that the folder may hold."""
    rules = {"native": keymap.NATIVE, "mpt": keymap.LLAVA_MPT, "llava-hf": keymap.LLAVA_HF}.get(kind, keymap.LLAVA)
    found = _planned(facts.weights, {name: name for name in facts.weights}, rules)
    lone = (
        [facts.folder] if facts.folder.is_file() else [facts.folder / name for name in (TRAINED_BESIDE, PROJECTOR_FILE)]
    )
    for file in lone if kind in ("lora", "projector") else ():
        if file.is_file():
            weights = Weights([file])
            found |= _planned(weights, _unwrapped(weights), keymap.LLAVA)
    return found


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Tensors beside an adapter or alone, whatever stands before their names."""
    known = ((name, re.search(r"mm_projector\..+|embed_tokens\.weight", name)) for name in names)
    return {f"model.{match[0]}": name for name, match in known if match}


def _planned(weights: Weights, names: Mapping[str, str], rules: Iterable[keymap.Rule]) -> dict[str, tuple[int, ...]]:
    found = {}
    for ours, parts in keymap.plan(names, tuple(rules)).sources.items():
        shapes = [weights.entries[names[part]].shape for part in parts]
        found[ours] = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()
    return found


def _decoder(config: Mapping[str, Any], shapes: Shapes, kind: Kind) -> Traits:
    """Sizes of the language model; tensors before config."""
    found: Traits = {}
    layers = {int(match[1]) for name in shapes if (match := re.match(r"decoder\.blocks\.(\d+)\.", name))}
    _add(found, "layers", max(layers) + 1 if layers else None, "tensors", config, "num_hidden_layers", "n_layers")
    widest = shapes.get("decoder.norm.weight") or shapes.get("projector.0.weight")
    _add(found, "width", widest[0] if widest else None, "tensors", config, "hidden_size", "d_model")
    heads = config.get("num_attention_heads")
    qkv, out = shapes.get("decoder.blocks.0.attn.qkv.weight"), shapes.get("decoder.blocks.0.attn.out.weight")
    if heads and qkv and out and qkv[0] > out[1]:
        n = (qkv[0] - out[1]) // 2 * heads // out[1]
        found["key/value heads"] = Trait(n, f"tensors: {n} key/value heads")
    elif heads:
        n = config.get("num_key_value_heads") or heads
        found["key/value heads"] = Trait(n, f"config.json: {n} key/value heads")
    if "model_type" in config or "n_layers" in config:
        mpt = "n_layers" in config or any(".Wqkv" in name for name in shapes)
        key = "model_type" if "model_type" in config else "n_layers"
        found["architecture"] = Trait("mpt" if mpt else "llama", f"config.json: {key} = {config[key]}")
    table = shapes.get("decoder.embed.weight")
    rows = table[0] if table and kind != "projector" else None  # that of a projector holds the new tokens' rows
    _add(found, "vocabulary", rows, "tensors", config, "vocab_size")
    if kind == "projector":
        more = f"rows of <im_start>, <im_end> {'' if table else 'not '}beside the projector"
        found["token rows"] = Trait(table is not None, f"tensors: {more}")
    return found


def _add(found: Traits, name: str, held: Any, where: str, config: Mapping[str, Any], *keys: str) -> None:
    """What tensors show, else the first of these keys of config.json."""
    if held is not None:
        found[name] = Trait(held, f"{where}: {name} {held}")
        return
    for key in keys:
        if config.get(key) is not None:
            found[name] = Trait(config[key], f"config.json: {key} = {config[key]}")
            return


def _vision(config: Mapping[str, Any], shapes: Shapes) -> Traits:
    """Projector, tower, and what is done to pictures."""
    found: Traits = {}
    layers = [name for name in shapes if name.startswith("projector.") and name.endswith(".weight")]
    if layers:
        kind = "linear" if len(layers) == 1 else f"mlp{len(layers)}x_gelu"
        found["projector"] = Trait(kind, f"tensors: projector {kind}")
    if config.get("mm_vision_tower"):
        aspect = config.get("image_aspect_ratio") or "square"
        found["aspect"] = Trait(aspect, f"config.json: image_aspect_ratio {aspect}")
        marks = bool(config.get("mm_use_im_start_end"))
        found["start/end tokens"] = Trait(marks, f"config.json: mm_use_im_start_end {str(marks).lower()}")
    inside = "vision.cls" in shapes
    if layers and any(name.startswith("decoder.") for name in shapes):
        found["tower inside"] = Trait(inside, f"tensors: the vision tower is {'' if inside else 'not '}in the shards")
    if size := _image_size(config, shapes):
        found["image size"] = size
    return found


def _image_size(config: Mapping[str, Any], shapes: Shapes) -> Trait | None:
    """Pixels of the tower's pictures: from its own tensors, else as its name in config.json says."""
    patch, places = shapes.get("vision.patch.weight"), shapes.get("vision.pos")
    if patch and places:
        pixels = round((places[0] - 1) ** 0.5) * patch[-1]
        return Trait(pixels, f"tensors: the vision tower takes {pixels} pixels")
    named = str(config.get("mm_vision_tower"))
    for id, known in CLIP_CONFIGS.items():
        if recorded_name(named) == recorded_name(id):
            return Trait(known["image_size"], f"config.json: mm_vision_tower = {named}")
    return None


def _numbers(config: Mapping[str, Any]) -> Traits:
    found: Traits = {}
    _add(found, "positions", None, "", config, "max_position_embeddings", "max_sequence_length", "max_seq_len")
    _add(found, "eps", None, "", config, "rms_norm_eps")
    _add(found, "rope theta", None, "", config, "rope_theta")
    _add(found, "merge", None, "", config, "mm_patch_merge_type")
    return found


def _lora(folder: Path) -> Traits:
    config = _json(folder / "adapter_config.json")
    found: Traits = {}
    if "r" in config:
        found["rank"] = Trait(config["r"], f"adapter_config.json: r = {config['r']}")
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    names = list(Weights([file])) if file else []
    layers = {int(match[1]) for name in names if (match := re.search(r"(?:layers|blocks)\.(\d+)\.", name))}
    if layers:
        found["layers"] = Trait(max(layers) + 1, f"tensors: adapters of {max(layers) + 1} layers")
    return found


def _tokens(folder: Path) -> Traits:
    """What was added to the vocabulary, for folders that bring a tokenizer."""
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return {}
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    added = {str(token.get("content")): int(id) for id, token in decoder.items()}
    added |= _json(folder / "added_tokens.json")
    added |= {
        str(token["content"]): token["id"] for token in _json(folder / "tokenizer.json").get("added_tokens") or ()
    }
    known = {text: added[text] for text in ("[PAD]", "<im_patch>", "<im_start>", "<im_end>") if text in added}
    return {"added tokens": Trait(known, f"tokenizer: added {', '.join(known) or 'none of [PAD], <im_start> …'}")}


def _recorded(facts: Facts, kind: Kind) -> Traits:
    """The name of the base that the folder records, in the adapter's config or its own."""
    for name, where in recorded_names(facts, kind):
        return {"base": Trait(name, f"{where} = {name}")}
    return {}


def recorded_names(facts: Facts, kind: Kind) -> Iterator[tuple[str, str]]:
    """Names of a base inside the files, the surest first, each with its file and key.

    A delta's own name stands in its config's key, as does a merged folder's: no base.
    """
    if kind == "lora" and (named := _json(facts.folder / "adapter_config.json").get("base_model_name_or_path")):
        yield str(named), "adapter_config.json: base_model_name_or_path"
    if kind in ("lora", "projector") and (named := facts.settings.get("_name_or_path")):
        yield str(named), "config.json: _name_or_path"


def recorded_name(name: str) -> str:
    """A recorded name for comparing: its last part, `-`, `.`, `_` and capitals alike, a hub cache's path undone."""
    parts = [part for part in re.split(r"[/\\]", name.lower()) if part not in ("", ".")]
    for part in parts:
        if part.startswith("models--"):
            parts = [part.split("--")[-1]]
            break
    last = re.sub(r"[-._]+", "-", parts[-1]) if parts else ""
    return last.removesuffix("-hf")


def _json(file: Path) -> dict[str, Any]:
    """An object, {} where the file is missing or broken: for looking only."""
    try:
        return read_json(file)
    except CheckpointError:
        return {}
