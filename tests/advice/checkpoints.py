"""Advice about whole models: config.json against tensors, vision towers, tokenizers, and formats to convert to."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

from llava.formats.clip import OWN_TOWER, OWN_TOWER_NAME
from tests import tiny
from tests.advice.files import ask
from tests.advice.table import Run, Steps, World, advice, say

WEIGHTS = "model.safetensors"


def with_tensors(folder: Path, **more: torch.Tensor | None) -> Path:
    """Adds tensors to a single file, or removes those that are None."""
    tensors = {**load_file(folder / WEIGHTS), **{name.replace("__", "."): value for name, value in more.items()}}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def convert(model: object, out: Path, to: str, *more: object) -> Run:
    return ("convert", model, out, "--to", to, *more)


@advice("is only a vision tower; load a LLaVA model and set vision_tower= (--vision-tower) to this folder")
def a_vision_tower(w: World) -> Steps:
    yield ask(w.clip)
    yield ask(w.llava, "--vision-tower", w.clip)


@advice("which is the head of every MPT model; pass ignore_tensors= (--ignore-tensors {}) to use the table")
def an_mpt_with_a_head(w: World) -> Steps:
    folder = tiny.write_mpt(w / "mpt", layout="safetensors")
    rows = load_file(folder / WEIGHTS)["transformer.wte.weight"]
    with_tensors(folder, lm_head__weight=rows + 1)
    said = yield ask(folder, "--template", "mpt")
    option = said.text[said.text.index("--ignore-tensors") :].partition(" to use")[0]
    yield ask(folder, "--template", "mpt", *shlex.split(option))


@advice("; if the model can do without them, leave them out: llava convert {} OUT{}")
def unknown_tensors(w: World) -> Steps:
    folder = w.copy("single")
    folder = folder.rename(w / "a model")
    with_tensors(folder, extra__weight=torch.ones(2), other__weight=torch.ones(2))
    said = yield ask(folder)
    yield (*said.advised(OUT=w / "out"),)
    assert say(ask(w / "out")).well


@advice(" --ignore-tensors {}")
def unknown_tensors_that_are_ignored(w: World) -> Steps:
    folder = with_tensors(w.copy("single"), extra__weight=torch.ones(2))
    said = yield ask(folder)
    yield ask(folder, *said.advised()[-2:])


@advice("but the tokenizer has no <im_start>; put the tokenizer files from the training run into this folder")
def a_model_with_the_tokenizer_of_its_base(w: World) -> Steps:
    folder = tiny.write_llava(w / "model", clip=w.clip, added=("<im_start>", "<im_end>"), mm_use_im_start_end=True)
    tiny.write_tokenizer(folder)
    (folder / "added_tokens.json").unlink(missing_ok=True)
    yield ask(folder)
    tiny.write_tokenizer(folder, added=("<im_start>", "<im_end>"))


@advice("correct the config if the model has no such tensor, or download the files again if one is missing")
def a_tensor_that_is_missing(w: World) -> Steps:
    folder = with_tensors(w.copy("single"), model__norm__weight=None)
    yield ask(folder)
    shutil.copy(w.single / WEIGHTS, folder)


@advice("correct the config if the model has no such tensor, or download the files again if one is missing")
def a_layer_that_the_config_should_not_name(w: World) -> Steps:
    folder = w.copy("single")
    tiny.edit_json(folder / "config.json", num_hidden_layers=3)
    yield ask(folder)
    tiny.edit_json(folder / "config.json", num_hidden_layers=2)


@advice("set vision_tower= (--vision-tower) to the tower used to train the projector")
def a_tower_of_another_width(w: World) -> Steps:
    wide = tiny.write_clip(w / "wide", dim=2 * tiny.CLIP_DIM)
    yield ask(w.llava, "--vision-tower", wide)
    yield ask(w.llava, "--vision-tower", w.clip)


@advice("{}{}; set vision_tower= (--vision-tower) to a CLIP folder")
def a_tower_that_is_nowhere(w: World) -> Steps:
    folder = w.copy("single")
    tiny.edit_json(folder / "config.json", mm_vision_tower="someone/tower")
    yield ask(folder)
    yield ask(folder, "--vision-tower", w.clip)


@advice("contains no vision tower weights; set vision_tower= (--vision-tower) to a folder with weights")
def a_tower_without_weights(w: World) -> Steps:
    empty = w.copy("clip")
    (empty / "pytorch_model.bin").unlink()
    yield ask(w.llava, "--vision-tower", empty)
    yield ask(w.llava, "--vision-tower", w.clip)


@advice("is not a CLIP config ({} is missing); set vision_tower= (--vision-tower) to a CLIP folder")
def a_tower_without_sizes(w: World) -> Steps:
    other = w.copy("clip")
    tiny.write_json(other / "config.json", {"model_type": "clip", "vision_config": {"hidden_size": 32}})
    yield ask(w.llava, "--vision-tower", other)
    yield ask(w.llava, "--vision-tower", w.clip)


@advice("or vision=False (--no-vision) to load only the language model")
def a_llava_that_names_no_tower(w: World) -> Steps:
    folder = w.copy("single")
    tiny.edit_json(folder / "config.json", mm_vision_tower=tiny.ABSENT)
    yield ask(folder, "--template", "v1")
    yield ask(folder, "--template", "v1", "--vision-tower", w.clip)


@advice("or vision=False (--no-vision) to load only the language model")
def a_llava_without_a_tower_converted_without_vision(w: World) -> Steps:
    folder = w.copy("single")
    tiny.edit_json(folder / "config.json", mm_vision_tower=tiny.ABSENT)
    yield convert(folder, w / "out", "native")
    yield convert(folder, w / "out", "native", "--no-vision")


@advice("or vision=False (--no-vision) to load only the language model")
def a_llava_without_a_tower_converted_and_then_asked(w: World) -> Steps:
    folder = w.copy("single")
    tiny.edit_json(folder / "config.json", mm_vision_tower=tiny.ABSENT)
    said = yield ask(folder)
    assert "--no-vision (an option of llava convert)" in said.text
    assert say(convert(folder, w / "out", "native", "--no-vision")).well
    yield ask(w / "out", "--template", "v1")


@advice("has no {}, but other shards do; download this shard again")
def a_shard_of_meta_without_a_tensor(w: World) -> Steps:
    def drop(folder: Path) -> None:
        tensors = torch.load(folder / "consolidated.01.pth")
        del tensors["norm.weight"]
        torch.save(tensors, folder / "consolidated.01.pth")

    yield from meta(w, drop)


def meta(w: World, change: Callable[[Path], object]) -> Steps:
    """A model in Meta's format with a fault, and then a fresh copy of its files."""
    folder = w.copy("meta") / "7B"
    change(folder)
    yield ask(folder, "--template", "v1")
    shutil.copytree(w.meta / "7B", folder, dirs_exist_ok=True)


@advice("n_layers is {}, but the shards contain {} layers; use files of one model")
def params_of_another_model(w: World) -> Steps:
    yield from meta(w, lambda folder: tiny.edit_json(folder / "params.json", n_layers=3))


@advice("rows of wq in {}, but dim is {}; download the missing shards")
def the_first_shard_of_meta_alone(w: World) -> Steps:
    yield from meta(w, lambda folder: (folder / "consolidated.01.pth").unlink())


@advice("the other parts of this tensor are missing: download the files again")
def shards_of_meta_without_part_of_a_matrix(w: World) -> Steps:
    def drop(folder: Path) -> None:
        for file in folder.glob("*.pth"):
            torch.save({name: value for name, value in torch.load(file).items() if "wq" not in name}, file)

    yield from meta(w, drop)


@advice("has no {}; download this shard again")
def shards_of_meta_without_a_matrix(w: World) -> Steps:
    def drop(folder: Path) -> None:
        for file in folder.glob("*.pth"):
            tensors = torch.load(file)
            torch.save({name: value for name, value in tensors.items() if "layers.0.attention.w" not in name}, file)

    yield from meta(w, drop)


@advice("but this llava reads only {}; upgrade llava")
def a_folder_of_a_later_version(w: World) -> Steps:
    assert say(convert(w.llava, w / "native", "native")).well
    tiny.edit_json(w / "native" / "config.json", llava_format="9")
    yield ask(w / "native")
    from llava.formats import native

    with mock.patch.object(native, "VERSION", "9"):
        yield ask(w / "native")


@advice("has no tokenizer.model or tokenizer.json; add the base model's tokenizer")
def a_model_without_a_tokenizer(w: World) -> Steps:
    folder = w.copy("single")
    (folder / "tokenizer.model").unlink()
    yield ask(folder)
    shutil.copy(w.llama / "tokenizer.model", folder)


@advice("or load this one with transformers, call dequantize() and save it")
def a_quantized_model(w: World) -> Steps:
    folder = with_tensors(w.copy("single"), model__layers__0__mlp__up_proj__SCB=torch.ones(2))
    yield ask(folder)
    yield ask(w.single)


# -------------------------------------------------------------------------------------------------- other formats


@advice("has no vision tower, which llava-hf requires; use --to llama")
def a_language_model_as_llava_hf(w: World) -> Steps:
    yield convert(w.llama, w / "out", "llava-hf")
    yield convert(w.llama, w / "out", "llama")


@advice("; first run: {}, and pass the folder OUT")
def a_delta_of_another_format(w: World) -> Steps:
    command = ("make-delta", "--base", w.llama, "--delta", w / "delta", "--target")
    said = yield (*command, w.llava_hf)
    line = said.text[said.text.index("llava convert") :].partition(", and pass")[0]
    assert say([word.replace("OUT", str(w / "whole")) for word in shlex.split(line)[1:]]).well
    yield (*command, w / "whole")


@advice("GGUF requires the gguf package; install it with: pip install 'llava-native[gguf]'")
def gguf_without_its_package(w: World) -> Steps:
    with mock.patch.dict("sys.modules", gguf=None):
        yield convert(w.llama, w / "out", "gguf")


@advice("; use --no-vision to write only the language model")
def a_linear_projector_as_gguf(w: World) -> Steps:
    linear = tiny.write_llava(w / "linear", clip=w.clip, mm_projector_type="linear")
    yield convert(linear, w / "out", "gguf")
    yield convert(linear, w / "out", "gguf", "--no-vision")


@advice("put the base model's tokenizer.model into the folder")
def a_tokenizer_that_llama_cpp_lacks(w: World) -> Steps:
    folder = w.copy("llama")
    tokenizer = Path(shutil.move(folder / "tokenizer.model", w / "tokenizer.model"))
    other = w / "neox"
    tiny.write_neox_tokenizer(other)
    shutil.copy(other / "tokenizer.json", folder)
    tiny.edit_json(folder / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    yield convert(folder, w / "out", "gguf", "--no-check")
    shutil.copy(tokenizer, folder)


@advice("piece {} is not UTF-8; download the file again")
def a_damaged_tokenizer(w: World) -> Steps:
    folder = w.copy("llama")
    file = folder / "tokenizer.model"
    data = file.read_bytes()
    piece = SentencePieceProcessor(model_proto=data).id_to_piece(400).encode()
    at = data.index(piece, data.index(piece) + 1) if data.count(piece) > 1 else data.index(piece)
    file.write_bytes(data[:at] + b"\xff" * len(piece) + data[at + len(piece) :])
    yield convert(folder, w / "out", "gguf", "--no-check")
    file.write_bytes(data)


def with_its_own_tower(w: World) -> Path:
    """A LLaVA whose tower is in a folder of its own inside, without that folder."""
    folder = w.copy("single")
    tiny.edit_json(folder / "config.json", mm_vision_tower=OWN_TOWER_NAME)
    return folder


@advice("copy the whole folder again, or set vision_tower= (--vision-tower) to a CLIP folder or hub id")
def a_folder_that_was_copied_without_its_tower(w: World) -> Steps:
    folder = with_its_own_tower(w)
    yield ask(folder)
    shutil.copytree(w.clip, folder / OWN_TOWER)


@advice("copy the whole folder again, or set vision_tower= (--vision-tower) to a CLIP folder or hub id")
def a_folder_without_its_tower_and_another_tower(w: World) -> Steps:
    folder = with_its_own_tower(w)
    yield ask(folder)
    yield ask(folder, "--vision-tower", w.clip)


def renamed(folder: Path, change: Callable[[str], str]) -> Path:
    tensors = {change(name): value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@advice("because the wrapper of a model was saved; save the model inside it, or remove the prefix from the names")
def a_model_saved_with_its_wrapper(w: World) -> Steps:
    folder = renamed(w.copy("single"), lambda name: f"module.{name}")
    yield ask(folder)
    renamed(folder, lambda name: name.removeprefix("module."))


@advice("if model. is missing, save the model together with its language model head")
def a_model_saved_without_its_head(w: World) -> Steps:
    folder = tiny.write_llama(w / "llama")
    renamed(folder, lambda name: name.removeprefix("model."))
    yield ask(folder, "--template", "v1")
    renamed(folder, lambda name: name if name.startswith("lm_head") else f"model.{name}")


@advice("if answers are poor, set template= (--template) to the one that the model was trained with")
def a_chat_template_of_another_model(w: World) -> Steps:
    folder = w.copy("single")
    tiny.edit_json(folder / "tokenizer_config.json", chat_template="[INST] {{ messages[0].content }} [/INST]")
    yield ask(folder)
    yield ask(folder, "--template", "llava_llama_2")


@advice("but contains checkpoints in folders; pass one of them, such as {}")
def a_folder_above_a_checkpoint(w: World) -> Steps:
    above = w / "above"
    above.mkdir()
    w.copy("single").rename(above / "model")
    said = yield ask(above)
    yield ask(said.text.strip().rpartition("such as ")[2])


@advice("put the tokenizer.json that belongs to the model here")
def an_added_token_without_a_place(w: World) -> Steps:
    folder = w.copy("mpt")
    tiny.write_json(folder / "added_tokens.json", {"<|new|>": 5000})
    yield ask(folder)
    (folder / "added_tokens.json").unlink()  # those of the model
