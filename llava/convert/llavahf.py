"""The layout of llava-hf: one config.json with three parts, other names, rows for <image> and <pad>.

Read: as transformers wrote it up to 4.51 and from 4.52 on. Written: the older one, which all its versions open.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava.checkpoint.detect import MODE_KEY, TEMPLATE_KEY
from llava.checkpoint.files import Weights, read_json
from llava.checkpoint.keymap import LLAVA_HF
from llava.checkpoint.onbase import LENGTHENED
from llava.checkpoint.open import Checkpoint
from llava.checkpoint.source import Cut, Given, Mean, Rows, Source, Stored
from llava.checkpoint.write import Item, write_json, write_safetensors
from llava.config import ImageConfig, ProjectorConfig, VisionConfig
from llava.convert import llama
from llava.convert.jinja import chat_template
from llava.convert.original import clip_settings, processor_settings
from llava.convert.tokenizer import complete_tokenizer, copy_tokenizer, extend
from llava.errors import CheckpointError
from llava.preprocess.templates import TEMPLATES
from llava.preprocess.tokenizer import Tokenizer

MULTIPLE = 64  # rows of the embedding table are filled up to one of it, as transformers' conversion does
VOCAB_KEY = "llava_vocab_size"  # our own key: rows before the table was lengthened
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
HAVE_ROWS = ("llava-hf", "native")  # kinds of folders whose tables may have rows for the two
ADDED_ROWS = "llava_hf_rows.safetensors"  # beside the original's layout: what it has no place for, for the way back


def items(checkpoint: Checkpoint) -> list[Item]:
    """All tensors under llava-hf's names; the table lengthened, the tower with every block that is at hand."""
    vision = _parts(checkpoint)[0]
    sources: dict[str, Source] = checkpoint.sources | checkpoint.rest_of_tower
    rows = _vocab_size(checkpoint)
    for name in LENGTHENED:
        if name in sources:
            sources[name] = _lengthened(name, sources[name], rows, checkpoint.folder / ADDED_ROWS)
    # transformers builds the norm behind the last block, which LLaVA does not use
    like = sources["vision.pre_norm.weight"].dtype
    for part, value in (("weight", 1.0), ("bias", 0.0)):
        filled = Given(tensor=torch.full((vision.dim,), value, dtype=like), what="an unused norm")
        sources.setdefault(f"vision.post_norm.{part}", filled)
    return llama.taken_apart(sources, checkpoint.config, LLAVA_HF)


def _lengthened(name: str, table: Source, rows: int, kept: Path) -> Source:
    """A table with further rows: those that were kept when they were cut off, else the mean of the others."""
    first = table.shape[0]
    if (more := rows - first) <= 0:
        return table
    weights = Weights([kept] if kept.is_file() else [])
    if name in weights.entries and weights.entries[name].shape == (more, *table.shape[1:]):
        return Rows(table, Stored(weights=weights, names=(name,)), first)
    return Rows(table, Mean(table, more), first)


def config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json in its three parts. Raises CheckpointError for a model that llava-hf has no form for."""
    vision, _projector, image = _parts(checkpoint)
    tokenizer, anyres = checkpoint.tokenizer, image.aspect == "anyres"
    rows = _vocab_size(checkpoint)
    held = 1 + max(
        int(name.split(".")[2]) for name in (*checkpoint.sources, *checkpoint.spare) if name.startswith("vision.blocks")
    )
    whole = held == vision.n_layers
    settings: dict[str, Any] = {
        "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if anyres else "llava",
        "text_config": llama.settings(checkpoint.config, tokenizer) | {"vocab_size": rows},
        "vision_config": clip_settings(vision) | {"num_hidden_layers": held, "projection_dim": vision.dim},
        "image_token_index": added(tokenizer)[IMAGE_TOKEN],
        "pad_token_id": added(tokenizer)[PAD_TOKEN],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": vision.select_layer if whole else -1,  # blocks behind that layer are not at hand
        "vision_feature_select_strategy": "default" if vision.select_feature == "patch" else "full",
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2 + (vision.select_feature != "patch"),
        "multimodal_projector_bias": True,
        "tie_word_embeddings": checkpoint.config.decoder.tied,
        "torch_dtype": checkpoint.config.dtype,
        "vocab_size": rows,
    }
    if anyres:
        settings |= {"image_grid_pinpoints": _stored_pinpoints(image), "use_image_newline_parameter": True}
    if checkpoint.template.template:
        settings[TEMPLATE_KEY] = checkpoint.template.template
    own: dict[str, Any] = {VOCAB_KEY: checkpoint.config.decoder.vocab_size, MODE_KEY: image.mode}
    own["image_aspect_ratio"] = image.aspect
    own["tokenizer_model_max_length"] = checkpoint.config.trained_seq
    own["tokenizer_padding_side"] = checkpoint.config.padding_side
    return settings | own


def write_beside(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer with the two tokens, and how transformers prepares pictures and prompts."""
    vision, _, image = _parts(checkpoint)
    anyres = image.aspect == "anyres"
    _write_tokenizer(checkpoint, folder)
    processor = processor_settings(image)
    if anyres:
        kind = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": _stored_pinpoints(image)}
        processor |= kind | {"do_pad": True}
    elif image.aspect == "pad" and image.mode == "original":
        processor |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    write_json(folder / "preprocessor_config.json", processor)
    beside = {
        "processor_class": "LlavaNextProcessor" if anyres else "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default" if vision.select_feature == "patch" else "full",
    }
    write_json(folder / "processor_config.json", beside)
    if (name := checkpoint.template.template) and (text := chat_template(TEMPLATES[name])):
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def _parts(checkpoint: Checkpoint) -> tuple[VisionConfig, ProjectorConfig, ImageConfig]:
    config, where = checkpoint.config, checkpoint.folder
    if config.vision is None or config.projector is None or config.image is None:
        raise CheckpointError(f"{where}: has no vision part; llava-hf's layout holds whole LLaVAs, use --to llama")
    llama.require_llama(checkpoint)
    if config.projector.depth != 2:
        raise CheckpointError(
            f"{where}: its projector has {config.projector.depth} layers; llava-hf's layout has room for 2 alone"
        )
    if config.start_end:
        raise CheckpointError(
            f"{where}: sets <im_start> and <im_end> around pictures, which llava-hf's layout does not"
        )
    if config.image.aspect == "anyres" and config.image.merge != "spatial_unpad":
        raise CheckpointError(f"{where}: merges tiles as {config.image.merge!r}; llava-hf knows spatial_unpad alone")
    return config.vision, config.projector, config.image


def _stored_pinpoints(image: ImageConfig) -> list[list[int]]:
    """Pairs as the published file has them: transformers takes them for (h, w), LLaVA for (w, h)."""
    return [[h, w] if image.mode == "hf" else [w, h] for w, h in image.pinpoints]


def added(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of <image> and <pad>: the tokenizer's own, else the next ones."""
    ids: dict[str, int] = {}
    for text in (IMAGE_TOKEN, PAD_TOKEN):
        known = tokenizer.id_of(text)
        ids[text] = tokenizer.size + sum(id >= tokenizer.size for id in ids.values()) if known is None else known
    return ids


def _vocab_size(checkpoint: Checkpoint) -> int:
    needed = max(checkpoint.config.decoder.vocab_size, 1 + max(added(checkpoint.tokenizer).values()))
    return needed + -needed % MULTIPLE


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    copy_tokenizer(checkpoint.tokenizer_folder, folder, checkpoint.new_tokens)
    ids = added(checkpoint.tokenizer)
    extend(folder / "added_tokens.json", ids)
    entries = {
        str(id): {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "special": True,
                  "single_word": False}
        for text, id in ids.items()
    }  # fmt: skip
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    decoder = {**settings.get("added_tokens_decoder", {}), **entries}
    write_json(file, settings | {"added_tokens_decoder": decoder, "pad_token": PAD_TOKEN})
    extend(folder / "special_tokens_map.json", {"pad_token": PAD_TOKEN})
    complete_tokenizer(folder)
    if (folder / "tokenizer.json").is_file():
        _extend_json_tokenizer(folder / "tokenizer.json", list(ids))


def _extend_json_tokenizer(file: Path, texts: list[str]) -> None:
    import tokenizers

    model = tokenizers.Tokenizer.from_file(str(file))
    model.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in texts])
    model.save(str(file))


def without_added_rows(checkpoint: Checkpoint) -> Checkpoint:
    """The same model without the rows of <image>, <pad> and the filling behind them, which are not trained."""
    if checkpoint.kind not in HAVE_ROWS:
        return checkpoint
    recorded = read_json(checkpoint.folder / "config.json").get(VOCAB_KEY)
    rows = recorded if isinstance(recorded, int) else checkpoint.tokenizer.id_of(IMAGE_TOKEN)
    if rows is None or not 0 < rows <= checkpoint.config.decoder.vocab_size:
        return checkpoint
    cut = {name: Cut(checkpoint.sources[name], 0, rows) for name in LENGTHENED if name in checkpoint.sources}
    config = replace(checkpoint.config, decoder=replace(checkpoint.config.decoder, vocab_size=rows))
    return replace(checkpoint, sources={**checkpoint.sources, **cut}, config=config)


def keep_added_rows(opened: Checkpoint, folder: Path) -> None:
    """Writes the rows that `without_added_rows` cuts off, so that the way back gives the same file."""
    rows = without_added_rows(opened).config.decoder.vocab_size
    tables = {name: opened.sources[name] for name in LENGTHENED if name in opened.sources}
    cut = {name: Cut(table, rows, table.shape[0]) for name, table in tables.items() if table.shape[0] > rows}
    items = [
        Item(name=name, dtype=part.dtype, shape=part.shape, where=part.where, parts=part.pieces)
        for name, part in cut.items()
    ]
    if items:
        write_safetensors(folder / ADDED_ROWS, items, lambda n: None)


def copy_plain_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer's files without <image> and <pad>, where it is a SentencePiece model that they were added to."""
    copy_tokenizer(checkpoint.tokenizer_folder, folder, checkpoint.new_tokens)
    has_rows = checkpoint.kind in HAVE_ROWS and checkpoint.tokenizer.id_of(IMAGE_TOKEN) is not None
    if not has_rows or not (folder / "tokenizer.model").is_file():
        return
    ours = {IMAGE_TOKEN, PAD_TOKEN}
    (folder / "tokenizer.json").unlink(missing_ok=True)
    if (file := folder / "added_tokens.json").is_file():
        write_json(file, {text: id for text, id in read_json(file).items() if text not in ours})
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (file := folder / name).is_file():
            continue
        settings = {key: value for key, value in read_json(file).items() if not _speaks_of(value, ours)}
        if decoder := settings.get("added_tokens_decoder"):
            settings["added_tokens_decoder"] = {id: t for id, t in decoder.items() if t["content"] not in ours}
        write_json(file, settings)
    complete_tokenizer(folder)


def _speaks_of(value: Any, texts: set[str]) -> bool:
    """A setting such as {"pad_token": "<pad>"}, or one with the token's flags."""
    text = value.get("content") if isinstance(value, dict) else value
    return isinstance(text, str) and text in texts
