"""Checks that the config, tensors, tokenizer and base of a resolved checkpoint belong to the same model."""

import logging
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from llava.config import LlavaConfig, LoadOptions
from llava.errors import CheckpointError, counted
from llava.formats import FORMATS, clip
from llava.formats.base_model import check_heads, check_raw, check_vocabulary, wrong_base
from llava.formats.format import Checkpoint, CheckpointFiles, Detection, Resolved
from llava.formats.projector import read_projector
from llava.formats.quantized import check_unknown
from llava.formats.tokenizer import stored_chat_template
from llava.model.llava import shapes
from llava.preprocess.conversation import Turn, render
from llava.preprocess.templates import TEMPLATES
from llava.tensors.files import NON_LORA_FILE, PROJECTOR_FILE
from llava.tensors.keymap import disk_names
from llava.tensors.lazy import LazyTensor, same_values

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """The result of all stages before `check`."""

    checkpoint: Checkpoint
    files: CheckpointFiles
    base: Checkpoint | None
    resolved: Resolved


def check(opened: Opened, options: LoadOptions) -> None:
    """Checks that the config, tensors, tokenizer and base belong to the same model. Raises CheckpointError."""
    checkpoint, resolved = opened.checkpoint, opened.resolved
    check_unknown(opened.files, resolved.unknown)
    if resolved.unknown:
        leave_out = "".join(f" --ignore-tensors {shlex.quote(name)}" for name in resolved.unknown)
        raise CheckpointError(
            f"{clip.unknown_tensors(resolved.unknown)}; if the model can do without them, leave them out: "
            f"llava convert {shlex.quote(str(checkpoint.path))} OUT{leave_out}"
        )
    _check_consistent(checkpoint, len(resolved.tensors))
    if opened.base:
        _check_base(checkpoint, opened.base, opened.files, resolved.tensors, options.force)
    else:
        _warn_about_leftovers(checkpoint)
    check_all_used(checkpoint, options)


def check_not_wrapped(files: CheckpointFiles) -> None:
    """Raises CheckpointError if a wrapper of the model, such as torch.compile, has put its prefix before all names."""
    for prefix in ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module."):
        if files.weights and all(name.startswith(prefix) for name in files.weights):
            raise CheckpointError(
                f"{files.path}: all tensor names start with {prefix!r}, because the wrapper of a model was saved; save "
                "the model inside it, or remove the prefix from the names"
            )


def _warn_about_leftovers(checkpoint: Checkpoint) -> None:
    """Warns about trained weights beside a whole model that differ from those in the model.

    Some published LLaVA folders contain mm_projector.bin as a copy.
    """
    folder, has = checkpoint.path, checkpoint.tensors | checkpoint.unused
    if (file := folder / PROJECTOR_FILE).is_file():
        try:
            copies = read_projector(file)
        except CheckpointError as error:
            log.warning("%s; it is not needed, because the model has its own projector", error)
            return
        if any(name not in has or not same_values(copy, has[name]) for name, copy in copies.items()):
            log.warning("%s: is not used; it differs from the projector in the weights of the model", file)
    if (file := folder / NON_LORA_FILE).is_file():
        log.warning("%s: is not used, because there is no LoRA beside it", file)


def warn_about_other_chat_template(checkpoint: Checkpoint) -> None:
    """Warns if the role marks in the folder's chat template are not those of the conversation template."""
    choice = checkpoint.template
    stored = stored_chat_template(checkpoint.tokenizer_folder)
    if not stored or choice.template not in TEMPLATES or not checkpoint.config.vision or choice.recorded:
        return
    spans = render(TEMPLATES[choice.template], [Turn("user", "x"), Turn("assistant", None)])
    chosen = "".join(span.text for span in spans)
    if marks := [mark for mark in _ROLE_MARKS if (mark in chosen) != (mark in stored)]:
        log.warning(
            "%s: its chat template and the conversation template %s (%s) differ in %s; if answers are poor, set "
            "template= (--template) to the one that the model was trained with",
            checkpoint.path, choice.template, choice.because, ", ".join(marks),
        )  # fmt: skip


_ROLE_MARKS = ("[INST]", "<|im_start|>", "<|start_header_id|>", "<start_of_turn>")


def _check_consistent(checkpoint: Checkpoint, n_found: int) -> None:
    config, where = checkpoint.config, checkpoint.path / "config.json"
    if config.vision and config.start_end and checkpoint.tokenizer.id_of("<im_start>") is None:
        raise CheckpointError(
            f"{checkpoint.path}: mm_use_im_start_end is true, but the tokenizer has no <im_start>; put "
            "the tokenizer files from the training run into this folder"
        )
    if config.decoder.n_layers > n_found > 0:
        raise CheckpointError(
            f"{where}: specifies {config.decoder.n_layers} layers, but the files contain only "
            f"{counted(n_found, 'tensor')}; config.json and the weights belong to different models"
        )


def _check_base(
    checkpoint: Checkpoint,
    base: Checkpoint,
    files: CheckpointFiles,
    found: Mapping[str, LazyTensor],
    force: bool,
) -> None:
    """Checks that the base has the sizes that the LoRA, projector or delta requires."""
    detection = Detection(checkpoint.format, checkpoint.evidence)
    expected, wrong = shapes(checkpoint.config), f"not the base of this {checkpoint.format}"
    for ours in sorted({*found, *expected}):
        has, asked = found[ours].shape if ours in found else None, expected.get(ours)
        if ours.startswith("decoder.") and has != asked and ours != "decoder.head.weight":
            found_and_asked = f"{ours} has shape {_sizes(has)}, but {files.path} needs {_sizes(asked)}"
            raise wrong_base(base.path, found_and_asked, files, detection)
    check_heads(base.config.decoder, checkpoint.config.decoder, base.path, f"{files.path} needs", wrong)
    if checkpoint.format == "delta":
        check_raw(base, checkpoint.config.decoder, force)
    else:
        check_vocabulary(base, checkpoint.config.decoder.vocab_size, files, f"{base.path}: {wrong}", force)


def _sizes(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else " x ".join(map(str, shape))


def check_all_used(checkpoint: Checkpoint, options: LoadOptions) -> None:
    """Checks that the model computes with every tensor that the checkpoint contains. Raises CheckpointError.

    Exceptions are tensors that cannot change the result: the head of a tied decoder (`_untied_if_stored` has compared
    it), tower layers after the selected one, and the vision part if it was not asked for.
    """
    config = checkpoint.config
    for ours, tensor in checkpoint.unused.items():
        if ours == "decoder.head.weight" or (ours in checkpoint.unused_tower and _is_late_layer(ours, config)):
            continue
        if not ours.startswith("decoder.") and not options.vision:
            continue
        if ours == "newline" and config.image and config.image.aspect != "anyres":
            log.warning(
                "%s: is not used, because image_aspect_ratio is %s; it belongs to anyres images",
                tensor.where, config.image.aspect,
            )  # fmt: skip
            continue
        raise CheckpointError(
            f"{tensor.where}: is not used by the model that config.json describes "
            f"({_existence_keys(ours, checkpoint)}); config.json and the weights belong to different models"
        )


def _is_late_layer(ours: str, config: LlavaConfig) -> bool:
    """Whether a tower tensor belongs to the layers after the one whose features LLaVA uses."""
    assert config.vision
    block = re.match(r"vision\.blocks\.(\d+)\.", ours)
    return ours.startswith("vision.post_norm.") or (
        block is not None and config.vision.n_blocks <= int(block[1]) < config.vision.n_layers
    )


def check_headers(checkpoint: Checkpoint) -> None:
    """Checks that every tensor exists and has the shape that the config requires. Raises CheckpointError."""
    if checkpoint.missing:
        first = checkpoint.missing[0]
        names = disk_names(first, (*FORMATS[checkpoint.format].rules(checkpoint.config), *clip.RULES))
        raise CheckpointError(
            f"{checkpoint.path}: lacks {counted(len(checkpoint.missing), 'tensor')} (the first is {names[0]}), which "
            f"config.json requires ({_existence_keys(first, checkpoint)}); correct the config if the model has no such "
            "tensor, or download the files again if one is missing"
        )
    expected = shapes(checkpoint.config)
    for name, tensor in checkpoint.tensors.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{tensor.where}: has shape {list(tensor.shape)}, but the config requires {list(expected[name])} "
                f"({_shape_keys(name, checkpoint)}); config.json and the weights belong to different models"
            )


def _existence_keys(ours: str, checkpoint: Checkpoint) -> str:
    return _with_values(FORMATS[checkpoint.format].keys_of(ours).existence, checkpoint)


def _shape_keys(ours: str, checkpoint: Checkpoint) -> str:
    return _with_values(FORMATS[checkpoint.format].keys_of(ours).shape, checkpoint)


def _with_values(keys: str, checkpoint: Checkpoint) -> str:
    """Returns the keys with the values that they have in config.json."""
    config = checkpoint.source_config
    return ", ".join(f"{key} = {config[key]!r:.40}" if key in config else key for key in keys.split())
