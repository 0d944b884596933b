"""Our own format: a folder with config.json, a tokenizer, and the whole model in safetensors under our tensor names."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.config import LlavaConfig, LoadOptions
from llava.errors import CheckpointError
from llava.formats.format import Checkpoint, CheckpointFiles, Format, ReadConfig, TensorKeys
from llava.formats.multimodal import in_mode
from llava.formats.tokenizer import copy_tokenizer
from llava.preprocess.tokenizer import JsonTokenizer
from llava.tensors.keymap import Rule
from llava.tensors.lazy import LazyTensor
from llava.tensors.writer import OutputTensor, output

VERSION_KEY, VERSION = "llava_format", "native-1"
RULES = tuple(Rule(name, name) for name in ("decoder.**", "vision.**", "projector.**", "newline"))


class Native(Format):
    """The default format of `llava convert`. config.json contains every setting explicitly."""

    name = "native"
    writes = True
    tensor_keys = (
        *(TensorKeys(part, part, part) for part in ("decoder", "vision", "projector")),
        TensorKeys("newline", "image", "decoder"),
    )

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        return RULES

    def detect(self, files: CheckpointFiles) -> list[str]:
        value = files.config.get(VERSION_KEY)
        return [f"config.json: {VERSION_KEY} = {value}"] if value else []

    def published_config(self, files: CheckpointFiles) -> Mapping[str, Any]:
        decoder, image = files.config.get("decoder") or {}, files.config.get("image") or {}
        return {
            "num_hidden_layers": decoder.get("n_layers"),
            "num_key_value_heads": decoder.get("n_kv_heads"),
            "num_attention_heads": decoder.get("n_heads"),
            "max_position_embeddings": decoder.get("max_seq"),
            "rms_norm_eps": decoder.get("eps"),
            "rope_theta": decoder.get("rope_theta"),
            "image_aspect_ratio": image.get("aspect"),
            "mm_patch_merge_type": image.get("merge"),
            "mm_use_im_start_end": files.config.get("start_end", False),
            "mm_vision_tower": "the one inside" if files.config.get("vision") else None,
        }

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        return ReadConfig(native_config(files.config, options, files.config_file), files.config, files.path)

    def outputs(self, checkpoint: Checkpoint) -> list[OutputTensor]:
        """Returns all tensors to write, including unused vision tower layers if the checkpoint contains the tower."""
        tensors = checkpoint.tensors | (checkpoint.unused_tower if checkpoint.tower_inside else {})
        return [output(name, tensor, name) for name, tensor in tensors.items()]

    def write_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {VERSION_KEY: VERSION, **checkpoint.config.to_dict()}

    def write_extra(self, source: Checkpoint, folder: Path) -> None:
        """Copies the tokenizer files.

        If the model uses tokenizer.json, omits tokenizer.model, which would otherwise take precedence on load.
        """
        copy_tokenizer(source.tokenizer_folder, folder, source.new_tokens)
        if isinstance(source.tokenizer, JsonTokenizer):
            (folder / "tokenizer.model").unlink(missing_ok=True)


def native_config(values: Mapping[str, Any], options: LoadOptions, where: Path) -> LlavaConfig:
    """Reads our config.json. Raises CheckpointError for an unknown version, ConfigError for invalid keys or values."""
    if (found := values[VERSION_KEY]) != VERSION:
        raise CheckpointError(
            f"{where}: {VERSION_KEY} is {found!r}, but this llava reads only {VERSION!r}; upgrade llava"
        )
    config = LlavaConfig.from_dict({key: value for key, value in values.items() if key != VERSION_KEY})
    if not options.vision:
        return replace(config, vision=None, projector=None, image=None)
    if config.image and options.image_mode and options.image_mode != config.image.mode:
        return replace(config, image=in_mode(config.image, options.image_mode))
    return config
