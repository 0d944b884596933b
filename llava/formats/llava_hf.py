"""The llava-hf format of transformers: nested configs, its own tensor names, and vocabulary rows for <image> and <pad>.

Reads the tensor names of every version of transformers. Writes those of versions up to 4.51, which all versions can
open.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch

from llava.config import ImageConfig, ImageMode, LlavaConfig, LoadOptions, ProjectorConfig, VisionConfig
from llava.errors import CheckpointError, ConfigError
from llava.formats import clip, llama
from llava.formats.added_rows import IMAGE_TOKEN, PAD_TOKEN, VOCAB_KEY, VOCAB_TABLES, with_added_rows
from llava.formats.chat_template import chat_template
from llava.formats.clip import clip_config, clip_processor, processor_config
from llava.formats.config_keys import ConfigKeys, words
from llava.formats.format import (
    IMAGE_MODE_KEY,
    TEMPLATE_KEY,
    Checkpoint,
    CheckpointFiles,
    Format,
    ReadConfig,
    one_of,
    require_llama,
    section,
    shapes_of,
    to_disk,
)
from llava.formats.multimodal import read_model_config
from llava.formats.tokenizer import complete_tokenizer, copy_tokenizer, update_json
from llava.preprocess.templates import TEMPLATES
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.files import read_json_if_present
from llava.tensors.keymap import Rule, prefixed
from llava.tensors.lazy import InMemory, LazyTensor
from llava.tensors.writer import OutputTensor, write_json

_PROJECTOR = tuple(
    Rule(f"multi_modal_projector.linear_{i + 1}.{param}", f"projector.{2 * i}.{param}")
    for i in (0, 1)
    for param in ("weight", "bias")
)
RULES = (
    # up to transformers 4.51, and what `save_pretrained` of later versions writes
    *prefixed("language_model.", llama.RULES),
    *prefixed("vision_tower.vision_model.", clip.TOWER),
    *prefixed("vision_tower.", clip.TOWER),  # since 5.0, for a model that was not loaded from older files
    *_PROJECTOR,
    Rule("image_newline", "newline"),
    *prefixed("language_model.", llama.LAYERS),  # LlavaModel, without a head
    # the names of the modules since 4.52, as in `state_dict`
    *prefixed("model.language_model.", llama.LAYERS),
    Rule("lm_head.weight", "decoder.head.weight"),
    *prefixed("model.vision_tower.vision_model.", clip.TOWER),
    *prefixed("model.vision_tower.", clip.TOWER),
    *prefixed("model.", _PROJECTOR),
    Rule("model.image_newline", "newline"),
)
KEYS = ConfigKeys(  # of the top level of config.json
    used=words(
        "text_config vision_config vision_feature_layer vision_feature_select_strategy projector_hidden_act "
        "image_grid_pinpoints tie_word_embeddings quantization_config"
    ),
    only={
        "model_type": ("llava", "llava_next"),
        "multimodal_projector_bias": (True,),
        "use_image_newline_parameter": (True,),
    },
    no_effect=words(
        "image_token_index image_token_id image_seq_length vocab_size hidden_size ignore_index "
        "image_aspect_ratio tokenizer_model_max_length tokenizer_padding_side"  # added by this package
    ),
)
_MULTIPLE = 64  # vocabulary rows are padded to a multiple of this, as in transformers' conversion script


class LlavaHf(Format):
    """Checkpoints of LlavaForConditionalGeneration and LlavaNextForConditionalGeneration."""

    name = "llava-hf"
    writes = True
    fast_tokenizer = True
    tensor_keys = llama.TENSOR_KEYS

    # ------------------------------------------------------------------------------------------------- reading

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        return RULES

    def detect(self, files: CheckpointFiles) -> list[str]:
        names = [str(name) for name in files.config.get("architectures") or []]
        if names := [name for name in names if name.endswith("ForConditionalGeneration")]:
            return [f"config.json: architectures = {names[0]}"]
        is_clip = str(files.config.get("model_type", "")).startswith("clip")
        return ["config.json: has a text_config"] * ("text_config" in files.config and not is_clip)

    def published_config(self, files: CheckpointFiles) -> Mapping[str, Any]:
        return _flattened(files.config, processor_config(files.path), files.path)

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        config = self.published_config(files)
        decoder = llama.decoder_config(config, shapes_of(tensors), files.config_file)
        return read_model_config(files.path, config, decoder, tensors, options)

    # ------------------------------------------------------------------------------------------------- writing

    def outputs(self, checkpoint: Checkpoint) -> list[OutputTensor]:
        """Returns the tensors to write, with added vocabulary rows and every available block of the tower."""
        vision = _parts(checkpoint)[0]
        tensors: dict[str, LazyTensor] = checkpoint.tensors | checkpoint.unused_tower
        rows = _n_rows(checkpoint)
        for name in VOCAB_TABLES:
            if name in tensors:
                tensors[name] = with_added_rows(name, tensors[name], rows, checkpoint.path)
        # transformers expects a norm after the last block. LLaVA does not use it, so the checkpoint may lack it.
        like = tensors["vision.pre_norm.weight"].dtype
        for param, value in (("weight", 1.0), ("bias", 0.0)):
            filled = InMemory(tensor=torch.full((vision.dim,), value, dtype=like), origin="an unused norm")
            tensors.setdefault(f"vision.post_norm.{param}", filled)
        return to_disk(tensors, checkpoint.config, RULES)

    def write_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Returns config.json. Raises CheckpointError for a model that this format cannot represent."""
        vision, _, image = _parts(checkpoint)
        tokenizer, anyres = checkpoint.tokenizer, image.aspect == "anyres"
        rows = _n_rows(checkpoint)
        n_blocks = _n_tower_blocks(checkpoint)
        settings: dict[str, Any] = {
            "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
            "model_type": "llava_next" if anyres else "llava",
            "text_config": llama.llama_config(checkpoint.config, tokenizer) | {"vocab_size": rows},
            "vision_config": clip_config(vision) | {"num_hidden_layers": n_blocks, "projection_dim": vision.dim},
            "image_token_index": _token_ids(tokenizer)[IMAGE_TOKEN],
            "pad_token_id": _token_ids(tokenizer)[PAD_TOKEN],
            "projector_hidden_act": "gelu",
            # -1 if the blocks after the selected layer are not available
            "vision_feature_layer": vision.select_layer if n_blocks == vision.n_layers else -1,
            "vision_feature_select_strategy": _strategy(vision),
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
        return settings | {
            VOCAB_KEY: checkpoint.config.decoder.vocab_size,
            IMAGE_MODE_KEY: image.mode,
            "image_aspect_ratio": image.aspect,
            "tokenizer_model_max_length": checkpoint.config.trained_seq,
            "tokenizer_padding_side": checkpoint.config.padding_side,
        }

    def write_extra(self, source: Checkpoint, folder: Path) -> None:
        """Writes the tokenizer files, preprocessor_config.json, processor_config.json and the chat template."""
        vision, _, image = _parts(source)
        anyres = image.aspect == "anyres"
        _write_tokenizer(source, folder)
        processor = clip_processor(image)
        if anyres:
            processor |= {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
            processor |= {"image_grid_pinpoints": _stored_pinpoints(image)}
        elif image.aspect == "pad" and image.mode == "original":
            processor |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        write_json(folder / "preprocessor_config.json", processor)
        settings = {
            "processor_class": "LlavaNextProcessor" if anyres else "LlavaProcessor",
            "image_token": IMAGE_TOKEN,
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": _strategy(vision),
        }
        write_json(folder / "processor_config.json", settings)
        if (name := source.template.template) and (text := chat_template(TEMPLATES[name])):
            (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- reading


def _flattened(config: Mapping[str, Any], processor: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Returns config.json with the keys of published LLaVA checkpoints; `vision_config` stays nested.

    Raises ConfigError for settings that this implementation does not support.
    """
    text, vision = (section(config, key, where) for key in ("text_config", "vision_config"))
    KEYS.check(config, where)
    layer, strategy = config.get("vision_feature_layer", -2), config.get("vision_feature_select_strategy")
    if not isinstance(layer, int):
        raise ConfigError(f"{where}: vision_feature_layer is {layer!r}; expected a single layer index")
    if (act := config.get("projector_hidden_act", "gelu")) != "gelu":
        raise ConfigError(f"{where}: projector_hidden_act is {act!r}; expected gelu")
    features = {"default": "patch", "full": "cls_patch", None: "patch"}
    if strategy not in features:
        raise ConfigError(f"{where}: vision_feature_select_strategy is {strategy!r}; expected default or full")
    grid = config.get("image_grid_pinpoints") or processor.get("image_grid_pinpoints")
    aspect = "anyres" if grid else "pad"  # in image mode `hf`, `pad` means a center crop
    ours = ("tokenizer_model_max_length", "tokenizer_padding_side", TEMPLATE_KEY, VOCAB_KEY)  # our additional keys
    return {
        **{key: value for key, value in text.items() if key != "architectures"},
        "torch_dtype": config.get("torch_dtype") or config.get("dtype") or text.get("torch_dtype"),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        "vision_config": {**clip.DEFAULTS, **vision},
        "mm_vision_tower": clip.published_id(vision) or "the one inside",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": features[strategy],
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": config.get("image_aspect_ratio") or aspect,
        "image_grid_pinpoints": grid,
        "mm_patch_merge_type": "spatial_unpad" if grid else "flat",
        IMAGE_MODE_KEY: _image_mode(config, processor),
        **{key: config[key] for key in ours if key in config},
    }


def _image_mode(config: Mapping[str, Any], processor: Mapping[str, Any]) -> ImageMode:
    """Returns the recorded image mode. The default is `original` if the processor pads like LLaVA, else `hf`."""
    if (recorded := config.get(IMAGE_MODE_KEY)) is not None:
        return cast(ImageMode, one_of(recorded, get_args(ImageMode), f"config.json: {IMAGE_MODE_KEY}"))
    pads = processor.get("image_processor_type") == "LlavaImageProcessor" and processor.get("do_pad")
    return "original" if pads else "hf"


# ----------------------------------------------------------------------------------------------------------- writing


def _parts(checkpoint: Checkpoint) -> tuple[VisionConfig, ProjectorConfig, ImageConfig]:
    """Returns vision, projector and image configs. Raises CheckpointError if llava-hf cannot represent the model."""
    config, where = checkpoint.config, checkpoint.path
    if config.vision is None or config.projector is None or config.image is None:
        raise CheckpointError(f"{where}: has no vision tower, which llava-hf requires; use --to llama")
    require_llama(checkpoint, "llava-hf")
    if config.projector.depth != 2:
        raise CheckpointError(f"{where}: projector depth is {config.projector.depth}; llava-hf supports only 2")
    if config.start_end:
        raise CheckpointError(f"{where}: puts <im_start> and <im_end> around images, which llava-hf does not support")
    if config.image.aspect == "anyres" and config.image.merge != "spatial_unpad":
        raise CheckpointError(
            f"{where}: merges tiles with {config.image.merge!r}; llava-hf supports only spatial_unpad"
        )
    return config.vision, config.projector, config.image


def _n_tower_blocks(checkpoint: Checkpoint) -> int:
    names = (*checkpoint.tensors, *checkpoint.unused)
    return 1 + max(int(name.split(".")[2]) for name in names if name.startswith("vision.blocks"))


def _strategy(vision: VisionConfig) -> str:
    return "default" if vision.select_feature == "patch" else "full"


def _stored_pinpoints(image: ImageConfig) -> list[list[int]]:
    """Returns the pinpoints as stored on disk: [h, w] in image mode `hf`, as in transformers, and [w, h] otherwise."""
    return [[h, w] if image.mode == "hf" else [w, h] for w, h in image.pinpoints]


def _token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of <image> and <pad>, which are the next free ids if the tokenizer does not contain them."""
    ids: dict[str, int] = {}
    for text in (IMAGE_TOKEN, PAD_TOKEN):
        known = tokenizer.id_of(text)
        ids[text] = tokenizer.size + sum(id >= tokenizer.size for id in ids.values()) if known is None else known
    return ids


def _n_rows(checkpoint: Checkpoint) -> int:
    needed = max(checkpoint.config.decoder.vocab_size, 1 + max(_token_ids(checkpoint.tokenizer).values()))
    return needed + -needed % _MULTIPLE


def _write_tokenizer(source: Checkpoint, folder: Path) -> None:
    copy_tokenizer(source.tokenizer_folder, folder, source.new_tokens)
    ids = _token_ids(source.tokenizer)
    update_json(folder / "added_tokens.json", ids)
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "special": True, "single_word": False}
    entries = {str(id): {"content": text, **flags} for text, id in ids.items()}
    file = folder / "tokenizer_config.json"
    settings = read_json_if_present(file)
    decoder = {**settings.get("added_tokens_decoder", {}), **entries}
    write_json(file, settings | {"added_tokens_decoder": decoder, "pad_token": PAD_TOKEN})
    update_json(folder / "special_tokens_map.json", {"pad_token": PAD_TOKEN})
    complete_tokenizer(folder)
    if (folder / "tokenizer.json").is_file():
        _extend_fast_tokenizer(folder / "tokenizer.json", list(ids))


def _extend_fast_tokenizer(file: Path, texts: list[str]) -> None:
    import tokenizers

    model = tokenizers.Tokenizer.from_file(str(file))
    model.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in texts])
    model.save(str(file))
