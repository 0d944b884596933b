"""Detects a checkpoint's format and conversation template from its files, tensors and config, never from its name.

Each result includes the evidence for it.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.config import DecoderConfig, ProjectorConfig
from llava.errors import CheckpointError
from llava.formats import FORMATS
from llava.formats.format import RECORDED, TEMPLATE_KEY, CheckpointFiles, Detection, TemplateChoice
from llava.formats.gpt_fast import MODEL_FILE
from llava.formats.llama import is_mistral
from llava.formats.native import VERSION_KEY
from llava.formats.projector import read_single_file
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.files import PROJECTOR_FILE, parsing, read_json_if_present
from llava.tensors.hub import locate, locate_file
from llava.tensors.shards import numbered_shards, open_weights, weight_files

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
_PARTS = ("adapter_config.json", PROJECTOR_FILE)  # files of which either makes a folder loadable without weights
_LOADABLE = ("config.json", *_PARTS)
_EXPORTS = {"*.gguf": "llama.cpp", MODEL_FILE: "gpt-fast"}  # export-only files -> programs that load them


def read_files(source: str | Path, revision: str | None = None) -> CheckpointFiles:
    """Reads the config and tensor headers of a folder, hub id or projector file. Raises CheckpointError."""
    if file := locate_file(source, revision=revision):
        return read_single_file(file)
    folder = locate(source, revision=revision)
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is empty; expected config.json, weights and tokenizer files")
    if not any((folder / name).is_file() for name in _PARTS):
        if saved := _trainer_checkpoint(folder):
            return read_files(saved)
        if not (folder / "config.json").is_file() and not numbered_shards(folder):
            raise _incomplete(folder)
    return CheckpointFiles(folder, read_json_if_present(folder / "config.json"), open_weights(folder))


def _trainer_checkpoint(folder: Path) -> Path | None:
    """Returns the only `checkpoint-N` in the output folder of a trainer, or None if `folder` itself has weights.

    Raises CheckpointError if there are several: only the user knows which one is the best.
    """
    numbered = (path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit())
    loadable = (path for path in numbered if any((path / name).is_file() for name in _LOADABLE))
    saved = sorted(loadable, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    if not saved or weight_files(folder):
        return None
    names = ", ".join(path.name for path in saved[:5]) + (", …" if len(saved) > 5 else "")
    if len(saved) > 1:
        raise CheckpointError(
            f"{folder}: has no weights of its own; it is the output folder of a training run, with {names}; pass the "
            f"one to use, such as {saved[-1]}"
        )
    log.warning("%s: has no weights of its own; %s in it is loaded", folder, names)
    return saved[0]


def _incomplete(folder: Path) -> CheckpointError:
    for pattern, reader in _EXPORTS.items():
        if file := next(folder.glob(pattern), None):
            return CheckpointError(
                f"{file}: is an export for {reader} and cannot be loaded by llava; use the checkpoint that it "
                "was converted from"
            )
    patterns = [f"{depth}/{name}" for name in _LOADABLE for depth in ("*", "*/*")]
    if below := sorted({file.parent for pattern in patterns for file in folder.glob(pattern)}):
        return CheckpointError(
            f"{folder}: has no config.json itself, but contains checkpoints in folders; pass one of them, such as "
            f"{below[0]}"
        )
    return CheckpointError(f"{folder / 'config.json'}: is missing; the checkpoint is incomplete")


def no_weights(folder: Path) -> CheckpointError:
    """Returns the error to raise for a folder without weights that can be read. Names what it contains instead."""
    found = weight_files(folder)
    expected = "expected model*.safetensors or pytorch_model*.bin"
    if any(name.startswith("global_step") for name in found):
        return CheckpointError(
            f"{folder}: contains only the training state of DeepSpeed ({', '.join(found[:3])}); {expected}; run the "
            "zero_to_fp32.py that DeepSpeed put into the folder"
        )
    contains = f", but contains {', '.join(found[:5])}" if found else ""
    return CheckpointError(f"{folder}: has no weights{contains}; {expected}")


def detect(files: CheckpointFiles) -> Detection:
    """Returns the first format in `FORMATS` that matches the files. Raises CheckpointError on a malformed config."""
    with parsing(files.config_file):
        for name, format in FORMATS.items():
            if evidence := format.detect(files):
                return Detection(name, evidence)
    return Detection(UNKNOWN, ["no config.json and no weights in a known format"])


# For v1 to v1.5, which were trained with llava_v1 or with vicuna_v1. Nothing in their files says with which.
FALLBACK_TEMPLATE = TemplateChoice("llava_v1", "no other rule applies")


def choose_template(
    format: str,
    config: Mapping[str, Any],
    decoder: DecoderConfig | None,
    projector: ProjectorConfig | None,
    tokenizer: Tokenizer | None,
) -> TemplateChoice:
    """Chooses the conversation template using the first matching rule.

    config: parsed config.json of a LLaVA checkpoint, in the published or the native format.
    A repository id recorded in `config` is used only if the other rules do not match. The folder name is not used.
    """
    if VERSION_KEY in config:
        return TemplateChoice(config.get("template"), RECORDED)
    if named := config.get(TEMPLATE_KEY):
        return TemplateChoice(str(named), RECORDED)
    if config.get("model_type") == "llava_mpt":
        return TemplateChoice("mpt", "model_type is llava_mpt")
    if decoder and decoder.kind == "mpt" and config.get("mm_vision_tower"):
        return TemplateChoice("mpt", "an MPT decoder, and LLaVA's keys in config.json")
    if decoder and format != "internlm2" and is_mistral(decoder):
        return TemplateChoice("mistral_instruct", "8 key/value heads and rope theta 1e6: a Mistral decoder")
    if tokenizer and tokenizer.eos_id is not None and tokenizer.id_of("<|im_end|>") == tokenizer.eos_id:
        return TemplateChoice("chatml_direct", "the tokenizer's eos is <|im_end|>")
    if format == "projector":
        return TemplateChoice("plain", "the checkpoint is only a projector, which was trained on captions")
    if not config.get("mm_vision_tower"):
        return TemplateChoice(
            None, "no mm_vision_tower, so this is a plain language model; select a template when loading it"
        )
    if tokenizer and (tokenizer.pad == "[PAD]" or tokenizer.id_of("[PAD]") in tokenizer.special):
        return TemplateChoice("llava_v0", "[PAD] is among the tokenizer's special tokens")
    if "LlamaForCausalLM" in (config.get("architectures") or []):
        return TemplateChoice("llava_v0", "architectures is LlamaForCausalLM, but config.json has LLaVA's keys")
    if decoder and projector and projector.depth == 1 and decoder.max_seq == 4096:
        return TemplateChoice("llava_llama_2", "a linear projector and 4096 positions")
    if (base := config.get("_name_or_path")) and _is_llama_2_chat(str(base)):
        return TemplateChoice("llava_llama_2", f"config.json records {base} as the base")
    return FALLBACK_TEMPLATE


def _is_llama_2_chat(repository: str) -> bool:
    """Whether a repository id, such as meta-llama/Llama-2-7b-chat-hf, refers to a Llama-2-chat model."""
    name = repository.lower().rsplit("/", 1)[-1]
    return name.startswith("llama-2-") and "-chat" in name
