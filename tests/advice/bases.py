"""Advice about LoRAs, projectors and deltas: what they lack, and which base they need."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from llava.checkpoint.open import open_checkpoint
from llava.convert import merge
from llava.convert.convert import convert
from llava.formats.format import TEMPLATE_KEY
from llava.formats.multimodal import vision_keys
from llava.formats.projector import write_projector
from tests import tiny
from tests.advice.files import ask
from tests.advice.table import Run, Steps, World, advice, say

ADAPTER = "adapter_model.bin"
SETTINGS = "adapter_config.json"


def ask_on(base: object, part: object, *more: object) -> Run:
    return ask(part, "--base", base, *more)


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = torch.load(file)
    change(tensors)
    torch.save(tensors, file)


def first(tensors: dict[str, torch.Tensor], end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


@advice("{}run: {}")
def a_lora_without_its_base(w: World) -> Steps:
    said = yield ask(w.lora)
    *line, option, _ = said.advised()
    yield (*line, option, w.llama)


@advice("{}; pass its folder or hub id as base= (--base), e.g. base={}{}")
def a_lora_without_its_base_in_python(w: World) -> Steps:
    import llava

    yield lambda: llava.load(w.lora)
    yield lambda: llava.load(w.lora, base=w.llama)


@advice("{}run: {}")
def a_command_without_its_base(w: World) -> Steps:
    said = yield ("convert", w.delta, w / "out", "--to", "llava")
    line = said.advised()
    assert "huggyllama/llama-7b" in line or "--base" in line
    yield (*line[:-1], w.raw)


@advice("first run: {}; then ")
def a_base_that_must_be_made_first(w: World) -> Steps:
    lora = tiny.write_lora(w / "lora", clip=w.clip, base="lmsys/vicuna-7b-delta-v0")
    said = yield ask(lora)
    before, _, after = said.text.partition("; then run: ")
    assert (
        "llava apply-delta --base huggyllama/llama-7b --target vicuna-7b-v0 --delta lmsys/vicuna-7b-delta-v0" in before
    )
    assert after.strip().endswith("--base vicuna-7b-v0")
    yield ask_on(w.llama, lora)


@advice("llava apply-delta --base {} --target {} --delta {}")
def a_base_that_was_published_as_a_delta(w: World) -> Steps:
    lora = tiny.write_lora(w / "lora", clip=w.clip, base="lmsys/vicuna-7b-delta-v0")
    said = yield ask(lora)
    _, command, _, raw, _, target, *_ = said.text[said.text.index("llava apply-delta") :].split()
    assert (command, raw, target) == ("apply-delta", "huggyllama/llama-7b", "vicuna-7b-v0")
    language = tiny.write_delta(w / "vicuna-delta", clip=w.clip, mm_vision_tower=tiny.ABSENT, **tiny.LLAMA_1)
    yield (command, "--base", w.raw, "--target", w / target, "--delta", language)


@advice("{}combine both with: {}, and pass the folder OUT instead of {}")
def a_command_that_takes_only_whole_models(w: World) -> Steps:
    said = yield ("make-delta", "--base", w.llama, "--target", w.lora, "--delta", w / "delta")
    convert = said.advised(OUT=w / "whole")
    convert = convert[: convert.index("--base") + 1]
    assert say((*convert, w.llama)).well
    yield ("make-delta", "--base", w.llama, "--target", w / "whole", "--delta", w / "delta")


@advice("which needs no base; omit base= (--base)")
def a_base_for_a_whole_model(w: World) -> Steps:
    yield ask_on(w.llama, w.llava)
    yield ask(w.llava)


@advice("which cannot be the base of a {} checkpoint ({}); pass {} as base= (--base)")
def a_lora_as_the_base(w: World) -> Steps:
    yield ask_on(w.lora, w.projector)
    yield ask_on(w.llama, w.projector)


@advice("so it is not the base of this {}; pass {}")
def an_mpt_as_the_base_of_a_lora(w: World) -> Steps:
    yield ask_on(w.mpt, w.lora)
    yield ask_on(w.llama, w.lora)


@advice("pass the raw LLaMA-1, such as huggyllama/llama-7b or huggyllama/llama-13b, as base= (--base)")
def a_vicuna_as_the_base_of_a_delta(w: World) -> Steps:
    vicuna = tiny.write_llama(w / "v", seed=7, **{**tiny.LLAMA_1, "_name_or_path": "lmsys/vicuna-7b-v1.1"})
    yield ask_on(vicuna, w.delta)
    yield ask_on(w.raw, w.delta)


@advice("{}; pass force=True (--force) to continue anyway")
def another_vocabulary_than_the_base(w: World) -> Steps:
    lora = tiny.write_lora(w / "lora", clip=w.clip, vocab_size=tiny.PIECES + 64)
    yield ask_on(w.llama, lora)
    yield ask_on(w.llama, lora, "--force")


@advice("pass the base that the delta was computed against")
def a_delta_on_a_wider_base(w: World) -> Steps:
    wide = tiny.write_llama(w / "wide", hidden_size=128)
    yield ask_on(wide, w.delta)
    yield ask_on(w.raw, w.delta)


@advice("so it is not its base; pass the base model of this checkpoint as base= (--base)")
def a_wrong_base_of_a_checkpoint_on_the_hub(w: World) -> Steps:
    hub = w.in_the_hub_cache("someone/lora", w.lora)
    wide = tiny.write_llama(w / "wide", hidden_size=128)
    yield ask_on(wide, hub)
    yield ask_on(w.llama, hub)


@advice("which cannot be a base; pass a language model as base= (--base)")
def a_lora_as_the_base_of_a_checkpoint_on_the_hub(w: World) -> Steps:
    hub = w.in_the_hub_cache("someone/lora", w.lora)
    yield ask_on(w.projector, hub)
    yield ask_on(w.llama, hub)


@advice("move the files of one of them into a folder of their own")
def a_lora_beside_a_model(w: World) -> Steps:
    folder = w.copy("lora")
    shutil.copy(w.single / "model.safetensors", folder)
    yield ask_on(w.llama, folder)
    (folder / "model.safetensors").rename(w / "model.safetensors")


@advice("download {} from where the LoRA came from, or pass a LLaVA as base= (--base)")
def a_lora_without_a_projector_that_is_downloaded(w: World) -> Steps:
    folder = w.copy("lora")
    (folder / "non_lora_trainables.bin").unlink()
    yield ask_on(w.llama, folder)
    shutil.copy(w.lora / "non_lora_trainables.bin", folder)


@advice("download {} from where the LoRA came from, or pass a LLaVA as base= (--base)")
def a_lora_without_a_projector_on_a_llava(w: World) -> Steps:
    folder = w.copy("lora")
    (folder / "non_lora_trainables.bin").unlink()
    yield ask_on(w.llama, folder)
    yield ask_on(w.llava, folder)


@advice("pass the base model of this LoRA")
def a_lora_of_more_layers(w: World) -> Steps:
    deep = tiny.write_llama(w / "deep", num_hidden_layers=3)
    lora = tiny.write_lora(w / "deep-lora", clip=w.clip, num_hidden_layers=3)
    yield ask_on(w.llama, lora)
    yield ask_on(deep, lora)


@advice("has no {}; download the LoRA again")
def a_lora_without_its_tensors(w: World) -> Steps:
    folder = w.copy("lora")
    (folder / ADAPTER).unlink()
    yield ask_on(w.llama, folder)
    shutil.copy(w.lora / ADAPTER, folder)


@advice("has no lora_{} for {}; download the LoRA again")
def half_a_pair_of_factors(w: World) -> Steps:
    folder = w.copy("lora")
    edit(folder / ADAPTER, lambda tensors: tensors.pop(first(tensors, "lora_A.weight")))
    yield ask_on(w.llama, folder)
    shutil.copy(w.lora / ADAPTER, folder)


@advice("but in {} it is {} x {}{}; pass the base model of this LoRA")
def a_lora_of_a_wider_model(w: World) -> Steps:
    folder = w.copy("lora")
    tiny.edit_json(folder / "config.json", hidden_size=tiny.ABSENT)
    (folder / "config.json").unlink()
    wide = tiny.write_llama(w / "wide", intermediate_size=300)
    yield ask_on(wide, folder, "--template", "v1")
    yield ask_on(w.llava, folder, "--template", "v1")


def lora_of_a_tower(w: World, name: str, dim: int) -> Path:
    """A LoRA that also changes a bias of the vision tower."""
    folder = w.copy("lora")
    bias = "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias"
    edit(folder / ADAPTER, lambda tensors: tensors.update({bias: torch.zeros(dim)}))
    tiny.edit_json(folder / "config.json", mm_hidden_size=dim)
    return folder


@advice(
    "the base only refers to its vision tower; first write both into one folder with llava convert {} OUT --to native"
)
def a_lora_of_a_tower_in_its_own_folder(w: World) -> Steps:
    lora = lora_of_a_tower(w, "lora", tiny.CLIP_DIM)
    said = yield ask_on(w.llava, lora)
    command = said.text[said.text.index("llava convert") :].partition(", and pass")[0]
    assert say([word.replace("OUT", str(w / "whole")) for word in shlex.split(command)[1:]]).well
    yield ask_on(w / "whole", lora)


@advice("but in {} q, k and v together have {}; pass the base model of this LoRA")
def biases_of_a_wider_tower(w: World) -> Steps:
    wide = tiny.write_clip(w / "wide", dim=4 * tiny.CLIP_DIM)
    own = tiny.write_llava(w / "own", clip=wide, mm_hidden_size=4 * tiny.CLIP_DIM)
    convert(own, w / "base")
    convert(w.llava, w / "other")
    lora = lora_of_a_tower(w, "lora", 4 * tiny.CLIP_DIM)
    (lora / "non_lora_trainables.bin").unlink()
    tiny.edit_json(lora / "config.json", mm_vision_tower=str(wide))
    yield ask_on(w / "other", lora)
    yield ask_on(w / "base", lora)


@advice(
    "its adapter_model contains no tensors, as can happen after training with ZeRO-3; gather all parameters and save"
)
def a_lora_saved_empty(w: World) -> Steps:
    folder = w.copy("lora")
    torch.save({}, folder / ADAPTER)
    yield ask_on(w.llama, folder)
    shutil.copy(w.lora / ADAPTER, folder)


def saved_again(w: World, change: Callable[[Path], object]) -> Steps:
    """A LoRA that was saved wrongly, and then as it should be."""
    folder = w.copy("lora")
    change(folder)
    yield ask_on(w.llama, folder)
    shutil.copytree(w.lora, folder, dirs_exist_ok=True)


@advice("{} and {} are names of the same tensor; save the LoRA again")
def a_lora_with_a_tensor_under_two_names(w: World) -> Steps:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        name = first(tensors, "lora_A.weight")
        tensors[name.removeprefix("base_model.")] = tensors[name].clone()

    yield from saved_again(w, lambda folder: edit(folder / ADAPTER, add))


@advice("has no tensors of this module; gather all parameters and save the LoRA again")
def a_lora_without_a_module_to_save(w: World) -> Steps:
    yield from saved_again(w, lambda folder: tiny.edit_json(folder / SETTINGS, modules_to_save=["lm_head"]))


@advice("is empty; gather all ZeRO-3 parameters and save the checkpoint again")
def a_lora_with_empty_tensors(w: World) -> Steps:
    def empty(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first(tensors, "lora_A.weight")] = torch.zeros(0)

    yield from saved_again(w, lambda folder: edit(folder / ADAPTER, empty))


def merged_with_peft(w: World, change: Callable[[Path], object]) -> Steps:
    """A LoRA of an unsupported kind; merged by other code, it is a whole model."""
    folder = w.copy("lora")
    change(folder)
    yield ask_on(w.llama, folder)
    yield ask(w.llava)


@advice("only LoRAs with factors A and B of matrices are supported; merge the LoRA into its base with peft")
def factors_of_an_embedding(w: World) -> Steps:
    more = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 512)}
    yield from merged_with_peft(w, lambda folder: edit(folder / ADAPTER, lambda tensors: tensors.update(more)))


@advice("which is not supported; merge the LoRA into its base with peft")
def a_dora(w: World) -> Steps:
    yield from merged_with_peft(w, lambda folder: tiny.edit_json(folder / SETTINGS, use_dora=True))


@advice("save the LoRA with peft's path_initial_model_for_weight_conversion, or merge it with peft")
def a_lora_that_changed_its_base(w: World) -> Steps:
    yield from saved_again(w, lambda folder: tiny.edit_json(folder / SETTINGS, init_lora_weights="pissa"))


@advice("is not a usable regular expression ({}); use the names of modules as keys")
def a_rank_for_a_malformed_pattern(w: World) -> Steps:
    folder = w.copy("lora")
    tiny.edit_json(folder / SETTINGS, alpha_pattern={"(q_proj": 8})
    yield ask_on(w.llama, folder)
    tiny.edit_json(folder / SETTINGS, alpha_pattern={"q_proj": 8})


@advice("and only projectors can be loaded from a single file; pass the folder")
def one_file_of_a_model(w: World) -> Steps:
    yield ask(w.llama / "model.safetensors")
    yield ask(w.llama, "--template", "v1")


@advice("must be a matrix, but has shape {}; download the file again")
def a_projector_of_the_wrong_shape(w: World) -> Steps:
    file = w.copy("projector") / "mm_projector.bin"
    edit(file, lambda tensors: tensors.update({first(tensors, "0.weight"): torch.zeros(4)}))
    yield ask_on(w.llama, file)
    shutil.copy(w.projector / "mm_projector.bin", file)


@advice("has the shape of projectors for {}; vision_tower= (--vision-tower) selects another tower", succeeds=False)
def a_projector_without_its_config(w: World) -> Steps:
    file = tiny.write_projector(w / "p", clip=w.clip, mm_hidden_size=1024) / "mm_projector.bin"
    (w / "p" / "config.json").unlink()
    edit(file, lambda tensors: tensors.update({first(tensors, "0.weight"): torch.zeros(64, 1024)}))
    yield ask_on(w.llama, file)
    yield ask_on(w.llama, file, "--vision-tower", w.clip)


@advice("or their ids are not consecutive; put the tokenizer files from the training run into the folder")
def a_projector_without_its_tokenizer(w: World) -> Steps:
    folder = tiny.write_projector(w / "p", clip=w.clip, start_end=True)
    tiny.write_tokenizer(folder, added=("<im_start>",))
    yield ask_on(w.llama, folder)
    tiny.write_tokenizer(folder, added=("<im_start>", "<im_end>"))


@advice("but the table in {} has {}; pass the base model that they were trained with", succeeds=False)
def embeddings_of_another_base(w: World) -> Steps:
    folder = tiny.write_projector(w / "p", clip=w.clip, start_end=True)
    wide = tiny.write_llama(w / "wide", hidden_size=128)
    (folder / "config.json").unlink()
    yield ask_on(wide, folder, "--vision-tower", w.clip)
    yield ask_on(w.llama, folder, "--vision-tower", w.clip)


@advice("start_end= requires a tokenizer with <im_start> and <im_end>; set tokenizer_from= to its folder")
def embeddings_without_a_tokenizer_in_python(w: World) -> Steps:
    checkpoint = open_checkpoint(w.llava)
    tensors = {name: tensor.read() for name, tensor in checkpoint.tensors.items() if name.startswith("projector.")}

    def write(**more: Path) -> None:
        rows = torch.zeros(2, 64)
        write_projector(w / "out", checkpoint.config, tensors, vision_tower="t", base=None, start_end=rows, **more)

    yield write
    tiny.write_tokenizer(w / "tokenizer", added=("<im_start>", "<im_end>"))
    yield lambda: write(tokenizer_from=w / "tokenizer")


@advice("convert the checkpoint with its base, then extract the projector from the result: {}")
def the_projector_of_a_lora_with_new_tokens(w: World) -> Steps:
    lora = tiny.write_lora(w / "lora", clip=w.clip, rows=True, mm_use_im_start_end=True, vocab_size=tiny.PIECES + 2)
    said = yield ("extract-projector", lora, w / "out", "--base", w.llama)
    assert say(said.advised(OUT=w / "whole", BASE=w.llama)).well
    yield ("extract-projector", w / "whole", w / "out")


@advice("merged into one model; to write that model, run: {}")
def the_projector_of_a_lora(w: World) -> Steps:
    said = yield ("extract-projector", w.lora, w / "projector", "--base", w.llama)
    assert say(said.advised(OUT=w / "whole")).well
    yield ask_on(w / "whole", w / "projector")


@advice("pass a LLaVA as base= (--base) to use images")
def a_lora_of_a_llava_on_a_language_model(w: World) -> Steps:
    folder = w.copy("lora")
    (folder / "config.json").unlink()
    (folder / "non_lora_trainables.bin").unlink()
    adapter = torch.load(folder / ADAPTER)
    wrapped = {name.replace(".model.model.", ".model.language_model.model."): value for name, value in adapter.items()}
    torch.save(wrapped, folder / ADAPTER)
    yield ask_on(w.llama, folder, "--template", "v1")
    yield ask_on(w.llava, folder, "--template", "v1")


@advice("expected a whole model with template {}; pass the base that the {} was made for")
def a_merge_whose_result_has_another_template(w: World) -> Steps:
    wrong = {**json.loads((w.lora / "config.json").read_text()), TEMPLATE_KEY: "mpt"}
    with mock.patch.object(merge, "_config", return_value=wrong):  # no pair of files is known for which this happens
        yield ("merge-lora", "--base", w.llama, "--target", w / "out", "--lora", w.lora)


@advice("LLaVA's config.json requires a vision tower; set vision_tower= (--vision-tower) to a CLIP folder or hub id")
def the_config_of_a_llava_without_a_tower(w: World) -> Steps:
    config = open_checkpoint(w.llava).config
    yield lambda: vision_keys(config, None)
    yield lambda: vision_keys(config, str(w.clip))
