"""Facts that distinguish published checkpoints.

Sizes are taken from tensors if possible; most other facts come from the config and tokenizer. Names recorded inside
files count as evidence; the name of the folder is never used.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava.config import projector_type
from llava.errors import CheckpointError
from llava.formats import FORMATS, clip, llava
from llava.formats.base_model import comparable_name
from llava.formats.format import CheckpointFiles, Detection, Shapes
from llava.formats.recorded_base import recorded_names
from llava.tensors.files import ADAPTER_FILES, NON_LORA_FILE, PROJECTOR_FILE, Weights, read_json
from llava.tensors.keymap import Rule, plan
from llava.zoo.catalogue import FORMAT_WORDS


class Fact(NamedTuple):
    """One fact about a checkpoint and the evidence for it."""

    value: Any
    evidence: str


Fingerprint = dict[str, Fact]  # name of the fact -> fact
ZOO_FORMATS = {**FORMAT_WORDS, "mpt": "merged"}  # name in FORMATS -> name in zoo.json, where the two differ
SIZES = ("layers", "width", "key/value heads", "vocabulary", "image size", "rank")


def fingerprint(files: CheckpointFiles, detection: Detection) -> Fingerprint:
    """Collects all facts that can be determined from the files."""
    format = FORMATS.get(detection.format)
    config = format.published_config(files) if format else files.config
    shapes = _shapes(files, detection.format)
    found: Fingerprint = {"format": Fact(ZOO_FORMATS.get(detection.format, detection.format), detection.evidence[0])}
    found |= _decoder(config, shapes, detection.format) | _vision(config, shapes) | _numbers(config)
    if detection.format == "lora":
        found |= _lora(files.path)
    return found | _tokens(files.path) | _recorded(files, detection.format)


def _shapes(files: CheckpointFiles, format: str) -> Shapes:
    """Returns the shapes of the tensors in all weight files of the checkpoint, keyed by our names."""
    reader = FORMATS.get(format)
    rules = reader.rules() if reader and reader.reads and not reader.needs_base else llava.RULES
    found = _planned(files.weights, {name: name for name in files.weights}, rules)
    extra = [files.path / name for name in (NON_LORA_FILE, PROJECTOR_FILE)]
    for file in (extra if files.path.is_dir() else [files.path]) if format in ("lora", "projector") else ():
        if file.is_file():
            weights = Weights([file])
            found |= _planned(weights, _without_prefixes(weights), llava.RULES)
    return found


def _without_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Maps each name as in a merged LLaVA checkpoint to the prefixed name in a projector or LoRA file."""
    known = ((name, re.search(r"mm_projector\..+|embed_tokens\.weight", name)) for name in names)
    return {f"model.{match[0]}": name for name, match in known if match}


def _planned(weights: Weights, names: Mapping[str, str], rules: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
    found = {}
    for ours, parts in plan(names, tuple(rules)).tensors.items():
        shapes = [weights.headers[names[part]].shape for part in parts]
        found[ours] = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()
    return found


def _decoder(config: Mapping[str, Any], shapes: Shapes, format: str) -> Fingerprint:
    """Returns the facts about the language model; sizes come from tensor shapes if possible, else from config.json."""
    found: Fingerprint = {}
    layers = {int(match[1]) for name in shapes if (match := re.match(r"decoder\.blocks\.(\d+)\.", name))}
    _add(found, "layers", max(layers) + 1 if layers else None, "tensors", config, "num_hidden_layers", "n_layers")
    widest = shapes.get("decoder.norm.weight") or shapes.get("projector.0.weight")
    _add(found, "width", widest[0] if widest else None, "tensors", config, "hidden_size", "d_model")
    heads = config.get("num_attention_heads")
    qkv, out = shapes.get("decoder.blocks.0.attn.qkv.weight"), shapes.get("decoder.blocks.0.attn.out.weight")
    if heads and qkv and out and qkv[0] > out[1]:
        n = (qkv[0] - out[1]) // 2 * heads // out[1]
        found["key/value heads"] = Fact(n, f"tensors: {n} key/value heads")
    elif heads:
        n = config.get("num_key_value_heads") or heads
        found["key/value heads"] = Fact(n, f"config.json: {n} key/value heads")
    if "model_type" in config or "n_layers" in config:
        mpt = "n_layers" in config or any(".Wqkv" in name for name in shapes)
        key = "model_type" if "model_type" in config else "n_layers"
        found["architecture"] = Fact("mpt" if mpt else "llama", f"config.json: {key} = {config[key]}")
    table = shapes.get("decoder.embed.weight")
    rows = table[0] if table and format != "projector" else None  # a projector file has rows only for new tokens
    _add(found, "vocabulary", rows, "tensors", config, "vocab_size")
    if format == "projector":
        text = f"{'' if table else 'no '}embeddings of <im_start>, <im_end> in the projector file"
        found["token rows"] = Fact(table is not None, f"tensors: {text}")
    return found


def _add(found: Fingerprint, name: str, shown: Any, where: str, config: Mapping[str, Any], *keys: str) -> None:
    """Adds a fact whose value is `shown` or, if that is None, the first value found in config.json under `keys`."""
    if shown is not None:
        found[name] = Fact(shown, f"{where}: {name} {shown}")
        return
    for key in keys:
        if config.get(key) is not None:
            found[name] = Fact(config[key], f"config.json: {key} = {config[key]}")
            return


def _vision(config: Mapping[str, Any], shapes: Shapes) -> Fingerprint:
    """Returns the facts about the projector, vision tower and image options."""
    found: Fingerprint = {}
    layers = [name for name in shapes if name.startswith("projector.") and name.endswith(".weight")]
    if layers:
        type = projector_type(len(layers))
        found["projector"] = Fact(type, f"tensors: projector {type}")
    if config.get("mm_vision_tower"):
        aspect = config.get("image_aspect_ratio") or "square"
        found["aspect"] = Fact(aspect, f"config.json: image_aspect_ratio {aspect}")
        marks = bool(config.get("mm_use_im_start_end"))
        found["start/end tokens"] = Fact(marks, f"config.json: mm_use_im_start_end {str(marks).lower()}")
    inside = "vision.cls" in shapes
    if layers and any(name.startswith("decoder.") for name in shapes):
        found["tower inside"] = Fact(inside, f"tensors: the vision tower is {'' if inside else 'not '}in the shards")
    if size := _image_size(config, shapes):
        found["image size"] = size
    return found


def _image_size(config: Mapping[str, Any], shapes: Shapes) -> Fact | None:
    """Returns the tower's image size in pixels, from its tensors if possible, else from its name in config.json."""
    patch, positions = shapes.get("vision.patch.weight"), shapes.get("vision.pos")
    if patch and positions:
        pixels = round((positions[0] - 1) ** 0.5) * patch[-1]
        return Fact(pixels, f"tensors: the vision tower takes {pixels} pixels")
    named = str(config.get("mm_vision_tower"))
    for id, known in clip.PUBLISHED.items():
        if comparable_name(named) == comparable_name(id):
            return Fact(known["image_size"], f"config.json: mm_vision_tower = {named}")
    return None


def _numbers(config: Mapping[str, Any]) -> Fingerprint:
    found: Fingerprint = {}
    _add(found, "positions", None, "", config, "max_position_embeddings", "max_sequence_length", "max_seq_len")
    _add(found, "eps", None, "", config, "rms_norm_eps")
    _add(found, "rope theta", None, "", config, "rope_theta")
    _add(found, "merge", None, "", config, "mm_patch_merge_type")
    return found


def _lora(folder: Path) -> Fingerprint:
    config = _json(folder / "adapter_config.json")
    found: Fingerprint = {}
    if "r" in config:
        found["rank"] = Fact(config["r"], f"adapter_config.json: r = {config['r']}")
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    names = list(Weights([file])) if file else []
    layers = {int(match[1]) for name in names if (match := re.search(r"(?:layers|blocks)\.(\d+)\.", name))}
    if layers:
        found["layers"] = Fact(max(layers) + 1, f"tensors: adapters for {max(layers) + 1} layers")
    return found


def _tokens(folder: Path) -> Fingerprint:
    """Returns the tokens added to the vocabulary, if the checkpoint contains a tokenizer."""
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return {}
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    added = {str(token.get("content")): int(id) for id, token in decoder.items()}
    added |= _json(folder / "added_tokens.json")
    added |= {
        str(token["content"]): token["id"] for token in _json(folder / "tokenizer.json").get("added_tokens") or ()
    }
    known = {text: added[text] for text in ("[PAD]", "<im_patch>", "<im_start>", "<im_end>") if text in added}
    return {"added tokens": Fact(known, f"tokenizer: added {', '.join(known) or 'none of [PAD], <im_start> …'}")}


def _recorded(files: CheckpointFiles, format: str) -> Fingerprint:
    """Returns the base model name recorded in the checkpoint, if any."""
    for name, where, _ in recorded_names(files, format):
        return {"base": Fact(name, f"{where} = {name}")}
    return {}


def _json(file: Path) -> dict[str, Any]:
    """Reads a JSON object. Returns {} if the file is missing or broken; such errors are reported elsewhere."""
    try:
        return read_json(file)
    except CheckpointError:
        return {}
