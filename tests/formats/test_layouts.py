"""LoRAs, projectors and deltas on their bases; models in memory written in the published layouts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llava
from llava.checkpoint.inspect import describe, scan
from llava.checkpoint.open import Checkpoint, check_headers, open_checkpoint
from llava.convert import native
from llava.convert.delta import write_delta
from llava.convert.lora import Pair, write_lora
from llava.convert.merge import merge_lora
from llava.convert.original import write_merged, write_tower
from llava.convert.projector import write_projector
from tests import tiny
from tests.command import run

BASE_SEED = 1  # of write_llama and write_llava
TOKENS = ("<im_start>", "<im_end>")
WHERE = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
MODULES = {
    "attn.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def base(clip: Path) -> Path:
    return tiny.write_llama(clip.parent / "base")


def opened(path: Path, **options: Any) -> Checkpoint:
    checkpoint = open_checkpoint(path, **options)
    check_headers(checkpoint)
    return checkpoint


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.tensors()}


def assert_same(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert set(ours) == set(others)
    for name, tensor in ours.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


# ------------------------------------------------------------------------------------------------ read on a base


def test_a_projector_on_its_language_model_is_the_merged_model(clip: Path, base: Path, checkpoint: Path) -> None:
    found = opened(tiny.write_projector(clip.parent / "projector", clip=clip), base=base)
    assert found.kind == "projector"
    assert found.config.template == "plain"
    assert_same(tensors_of(found), tensors_of(opened(checkpoint)))


@pytest.mark.parametrize("prefix", ["", "base_model.model.model.", "model.vision_model."])
def test_what_stands_before_a_projectors_names_does_not_matter(
    clip: Path, base: Path, checkpoint: Path, tmp_path: Path, prefix: str
) -> None:
    folder = tiny.write_projector(tmp_path / "projector", clip=clip, prefix=prefix)
    assert_same(tensors_of(opened(folder, base=base)), tensors_of(opened(checkpoint)))


def test_rows_of_the_start_and_end_tokens_come_with_the_projector(clip: Path, base: Path, tmp_path: Path) -> None:
    folder = tiny.write_projector(tmp_path / "projector", clip=clip, start_end=True)
    found, under = opened(folder, base=base), opened(base)
    assert found.config.start_end
    assert found.config.decoder.vocab_size == tiny.PIECES + 2
    table, head = found.sources["decoder.embed.weight"].read(), found.sources["decoder.head.weight"].read()
    assert torch.equal(table[: tiny.PIECES], under.sources["decoder.embed.weight"].read())
    assert torch.equal(table[tiny.PIECES :], tiny.tensor(1, "start_end", (2, 64), 0.6))
    mean = under.sources["decoder.head.weight"].read().double().mean(0)
    torch.testing.assert_close(head[tiny.PIECES :].double(), mean.expand(2, -1), rtol=1e-3, atol=1e-4)
    assert llava.load(folder, base=base).ask(None, "Hello", max_new_tokens=2)


def test_a_delta_on_its_base_is_the_sum_in_float16(clip: Path, tmp_path: Path) -> None:
    under = tiny.write_llama(tmp_path / "llama", seed=7)
    folder = tiny.write_delta(tmp_path / "delta", clip=clip, added=TOKENS)
    found = opened(folder, base=under)
    delta, own = tiny.torch.load(folder / "pytorch_model-00001-of-00003.bin"), opened(under).sources
    table = found.sources["decoder.embed.weight"].read()
    assert table.dtype == torch.float16
    assert torch.equal(
        table[: tiny.PIECES], delta["model.embed_tokens.weight"][: tiny.PIECES] + own["decoder.embed.weight"].read()
    )
    assert torch.equal(table[tiny.PIECES :], delta["model.embed_tokens.weight"][tiny.PIECES :])
    model = opened(tiny.write_llava(tmp_path / "model", clip=clip, added=TOKENS))
    for name, tensor in tensors_of(model).items():
        torch.testing.assert_close(found.sources[name].read(), tensor, rtol=0, atol=2e-3)


def merged_by_hand(base: Path, targets: tuple[str, ...]) -> dict[str, Tensor]:
    """W + alpha / r * B @ A in float64, by names on disk."""
    weights = tiny.llama_tensors(tiny.llama_config(), BASE_SEED, inv_freq=False)
    pairs = {
        name: value.bfloat16().double() for name, value in tiny.lora_tensors(tiny.llama_config(), 3, targets).items()
    }
    merged = {name: value.double() for name, value in weights.items()}
    for name in merged:
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in pairs:
            product = pairs[f"{module}.lora_B.weight"] @ pairs[f"{module}.lora_A.weight"]
            merged[name] = merged[name] + tiny.LORA_ALPHA / tiny.LORA_RANK * product
    return merged


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"form": "safetensors"},
        {"adapter": ".default"},
        {"wrapper": "base_model."},
        {"wrapper": ""},
        {"targets": ("q_proj", "v_proj")},
        {"targets": ("k_proj", "down_proj")},
    ],
    ids=str,
)
def test_a_lora_is_added_to_its_base(clip: Path, base: Path, tmp_path: Path, form: dict[str, Any]) -> None:
    found = opened(tiny.write_lora(tmp_path / "lora", clip=clip, **form), base=base)
    merged = merged_by_hand(base, form.get("targets", tiny.LORA_TARGETS))
    for i in range(2):
        stacked = torch.cat([merged[f"model.layers.{i}.{name}.weight"] for name in WHERE.values()])
        qkv = found.sources[f"decoder.blocks.{i}.attn.qkv.weight"].read()
        torch.testing.assert_close(qkv.double(), stacked, rtol=0, atol=1e-6)
        for ours, disk in MODULES.items():
            matrix = found.sources[f"decoder.blocks.{i}.{ours}.weight"].read()
            torch.testing.assert_close(matrix.double(), merged[f"model.layers.{i}.{disk}.weight"], rtol=0, atol=1e-6)
    projector = tiny.projector_tensors(tiny.llava_config(), 3)["model.mm_projector.0.weight"]
    assert torch.equal(found.sources["projector.0.weight"].read(), projector.bfloat16())


def test_a_lora_where_heads_share_keys_and_values(clip: Path, tmp_path: Path) -> None:
    under = tiny.write_llama(tmp_path / "base", num_key_value_heads=2)
    folder = tiny.write_lora(tmp_path / "lora", clip=clip, num_key_value_heads=2, targets=("q_proj", "v_proj"))
    found, plain = opened(folder, base=under), opened(under)
    name = "decoder.blocks.0.attn.qkv.weight"
    change = found.sources[name].read() - plain.sources[name].read().float()
    assert change[:64].any()
    assert not change[64:96].any()
    pairs = tiny.lora_tensors(tiny.llama_config(num_key_value_heads=2), 3)
    b, a = (pairs[f"model.layers.0.self_attn.v_proj.lora_{kind}.weight"].bfloat16().float() for kind in "BA")
    torch.testing.assert_close(change[96:], 2 * b @ a, rtol=0, atol=1e-6)


def test_a_lora_becomes_native_rounded_once(clip: Path, base: Path, tmp_path: Path) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    native.convert(lora, tmp_path / "native", base=base, verify=True)
    found, source = opened(tmp_path / "native"), opened(lora, base=base)
    assert found.config == source.config
    stored = {name: tensor.to(source.sources[name].dtype) for name, tensor in source.tensors()}
    assert_same(tensors_of(found), stored)
    assert found.sources["decoder.blocks.0.mlp.up.weight"].dtype == torch.float16


def test_a_lora_goes_on_a_native_and_on_a_merged_base_too(
    clip: Path, base: Path, checkpoint: Path, tmp_path: Path
) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    native.convert(checkpoint, tmp_path / "native")
    first = tensors_of(opened(lora, base=base))
    assert_same(tensors_of(opened(lora, base=checkpoint)), first)
    assert_same(tensors_of(opened(lora, base=tmp_path / "native")), first)


@pytest.mark.parametrize("to", ["native", "original", "hf"])
def test_a_tower_that_is_given_need_not_be_reached_under_its_name(
    to: str, clip: Path, base: Path, tmp_path: Path
) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip, mm_vision_tower="nobody/clip")
    native.convert(lora, tmp_path / to, to=to, base=base, vision_tower=clip)
    found = opened(tmp_path / to, vision_tower=clip if to == "original" else None)
    assert "nobody/clip" in (found.vision_tower or "") if to == "original" else found.tower_inside
    tower = [name for name in found.sources if name.startswith("vision.")]
    expected = opened(lora, base=base, vision_tower=clip)
    assert_same(*({name: of.sources[name].read() for name in tower} for of in (found, expected)))


@pytest.mark.parametrize("dangling", [False, True])
def test_a_target_may_be_a_link(dangling: bool, clip: Path, base: Path, tmp_path: Path) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    for job in ("convert", "merge"):
        disk, link = tmp_path / f"{job}-disk", tmp_path / job
        if not dangling:
            disk.mkdir()
        link.symlink_to(disk)
        if job == "convert":
            native.convert(lora, link, base=base)
        else:
            merge_lora(base, link, lora)
        assert link.is_symlink()
        assert not disk.is_symlink()
        assert opened(disk).sources
        assert {path.name for path in tmp_path.iterdir() if job in path.name} == {job, disk.name}


def test_safetensors_come_before_bin_whatever_is_sharded(base: Path, tmp_path: Path) -> None:
    other = tiny.write_llama(tmp_path / "other", layout="safetensors", seed=5)
    both = tiny.write_llama(tmp_path / "both", layout="bin-shards")
    shutil.copy(other / "model.safetensors", both)
    assert_same(tensors_of(opened(both)), tensors_of(opened(other)))
    for file in both.glob("pytorch_model-*.bin"):
        file.unlink()  # a download of *.json and *.safetensors leaves the index of the others alone
    assert_same(tensors_of(opened(both)), tensors_of(opened(other)))


def test_a_delta_alone_tells_the_template_that_it_will_have(clip: Path, tmp_path: Path) -> None:
    base = tiny.write_llama(tmp_path / "base", seed=7, **tiny.LLAMA_1)
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, added=("[PAD]", "<im_patch>"), **tiny.LLAMA_1)
    tiny.write_tokenizer(delta, added=("[PAD]", "<im_patch>"), pad="[PAD]")
    assert describe(delta).template == opened(delta, base=base).template.template == "llava_v0"


def test_a_target_that_is_a_file_is_told_from_a_full_folder(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(llava.LlavaError, match="is a file; name a folder"):
        native.convert(checkpoint, tmp_path / "out")


def test_the_folders_names_do_not_matter(clip: Path, base: Path, tmp_path: Path) -> None:
    lora = tiny.write_lora(tmp_path / "llava-lora", clip=clip)
    renamed, other = tmp_path / "x", tmp_path / "y"
    shutil.copytree(lora, renamed)
    shutil.copytree(base, other)
    assert_same(tensors_of(opened(renamed, base=other)), tensors_of(opened(lora, base=base)))


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(llava.LlavaError) as caught:
        opened(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def lora(clip: Path, tmp_path: Path) -> Path:
    return tiny.write_lora(tmp_path / "lora", clip=clip)


def test_without_its_base_the_error_names_it_and_the_option(lora: Path, clip: Path, tmp_path: Path) -> None:
    assert "lmsys/vicuna-13b-v1.3" in (message := refused(lora))
    assert "base= (--base)" in message
    message = refused(tiny.write_projector(tmp_path / "projector", clip=clip))
    assert "lmsys/vicuna-7b-v1.3" in message
    assert "base= (--base)" in message
    assert "base= (--base)" in refused(tiny.write_delta(tmp_path / "delta", clip=clip))


@pytest.mark.parametrize(
    "sizes",
    [{"hidden_size": 128}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 100}],
    ids=str,
)
def test_a_base_of_other_sizes_is_refused(lora: Path, clip: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    other = tiny.write_llama(tmp_path / "other", **sizes)
    for folder in (
        lora,
        tiny.write_projector(tmp_path / "projector", clip=clip),
        tiny.write_delta(tmp_path / "delta", clip=clip),
    ):
        assert str(other) in refused(folder, base=other)


def test_a_base_that_is_none_is_refused(lora: Path, clip: Path, base: Path, checkpoint: Path) -> None:
    assert "no language model" in refused(lora, base=lora)
    assert "no language model" in refused(lora, base=clip)
    assert "needs no base" in refused(checkpoint, base=base)
    assert "for the base" in refused(lora, base="no/such/folder")


def test_a_lora_that_is_broken_is_refused_by_name(lora: Path, base: Path) -> None:
    pairs = torch.load(lora / "adapter_model.bin")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    torch.save(pairs | {name: torch.empty(0)}, lora / "adapter_model.bin")
    assert name in refused(lora, base=base)
    torch.save({key: value for key, value in pairs.items() if key != name}, lora / "adapter_model.bin")
    assert "no lora_B" in refused(lora, base=base)
    torch.save(pairs | {"base_model.model.model.strange": torch.ones(2)}, lora / "adapter_model.bin")
    assert "strange" in refused(lora, base=base)
    tiny.edit_json(lora / "adapter_config.json", use_dora=True)
    assert "use_dora" in refused(lora, base=base)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_a_lora_whose_start_changed_its_base_is_refused(start: str, lora: Path, base: Path) -> None:
    tiny.edit_json(lora / "adapter_config.json", init_lora_weights=start)
    assert "merge it with peft" in refused(lora, base=base)
    tiny.edit_json(lora / "adapter_config.json", init_lora_weights="gaussian")
    assert opened(lora, base=base).kind == "lora"


def test_inspect_tells_what_a_lora_needs_and_with_its_base_what_it_becomes(lora: Path, base: Path) -> None:
    alone, whole = describe(lora), describe(lora, base=str(base))
    assert alone.base == "lmsys/vicuna-13b-v1.3"
    assert whole.kind == "lora"
    assert whole.template == "llava_v1"
    assert whole.sizes["decoder"]["n_layers"] == 2
    assert whole.missing == []


@pytest.mark.parametrize("file", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_a_scan_reads_what_is_put_on_a_base(file: str, lora: Path) -> None:
    assert scan(lora, progress=lambda done, total: None).nan == {}
    tensors = torch.load(lora / file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    torch.save(tensors, lora / file)
    assert scan(lora, progress=lambda done, total: None).nan == {name: 1}
    parts = describe(lora).sizes["parameters_by_part"]
    assert parts[file.removesuffix(".bin")] == sum(tensor.numel() for tensor in tensors.values())


def test_the_commands_take_a_base(lora: Path, base: Path, tmp_path: Path) -> None:
    asked = run("ask", "--model", lora, "--base", base, "--max-new-tokens", "3", "Hello")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()
    done = run("convert", lora, tmp_path / "out", "--base", base, "--verify")
    assert "verified bit by bit" in done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------------- write

SHAPES: dict[str, dict[str, Any]] = {
    "v1.5": {},
    "linear": {"mm_projector_type": "linear"},
    "anyres": {**tiny.ANYRES, "mm_projector_type": "mlp2x_gelu"},
    "start and end": {"mm_use_im_start_end": True, "added": TOKENS},
    "shared heads": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "class token": {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1},
    "stretched": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
}


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest, clip: Path, tmp_path: Path) -> Checkpoint:
    return opened(tiny.write_llava(tmp_path / "source", clip=clip, **SHAPES[request.param]), lenient=True)


def write_as_it_was(folder: Path, model: Checkpoint, clip: Path, **options: Any) -> Path:
    common = {"tokenizer_from": model.tokenizer_folder, "vision_tower": str(clip)}
    write_merged(folder, model.config, tensors_of(model), **{**common, **options})
    return folder


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_merged_model_written_opens_as_it_was(model: Checkpoint, clip: Path, tmp_path: Path, form: Any) -> None:
    folder = write_as_it_was(tmp_path / "out", model, clip, form=form, max_shard_bytes=150_000)
    assert len(list(folder.glob(f"*-of-*.{form}"))) >= 2
    found = opened(folder)
    assert found.kind == "merged"
    assert found.config == model.config
    assert all(name.startswith("vision_model.") for name in found.unused)  # CLIP's own, behind the selected layer
    assert_same(tensors_of(found), tensors_of(model))


def test_an_mpt_written_opens_as_it_was(clip: Path, tmp_path: Path) -> None:
    model = opened(tiny.write_mpt(tmp_path / "source", clip=clip))
    found = opened(write_as_it_was(tmp_path / "out", model, clip))
    assert found.kind == "mpt"
    assert found.config == model.config
    assert_same(tensors_of(found), tensors_of(model))


def test_a_lora_of_an_mpt_opens_on_it(clip: Path, tmp_path: Path) -> None:
    base = tiny.write_mpt(tmp_path / "base")
    model = opened(tiny.write_mpt(tmp_path / "source", clip=clip, mm_use_im_start_end=False))
    a, b = torch.randn(4, 64), torch.randn(192, 4)
    beside = {name: tensor for name, tensor in tensors_of(model).items() if name.startswith("projector.")}
    options: dict[str, Any] = {"vision_tower": str(clip), "non_lora": beside, "base": "mosaicml/mpt-7b"}
    lora = {"decoder.blocks.1.attn.qkv": {"": (a, b)}}
    write_lora(tmp_path / "out", model.config, lora, r=4, alpha=4, dropout=0.0, **options)
    found = opened(tmp_path / "out", base=base)
    assert found.config == model.config
    for name, tensor in tensors_of(model).items():
        change = b @ a if name == "decoder.blocks.1.attn.qkv.weight" else 0
        assert torch.equal(found.sources[name].read(), tensor + change), name


def test_a_merged_model_has_the_published_names_keys_and_types(clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = opened(checkpoint)
    folder = write_as_it_was(tmp_path / "out", model, clip, form="bin", recorded={"mm_projector_lr": 2e-5})
    written = torch.load(folder / "pytorch_model.bin", weights_only=True)
    published = {
        **tiny.llama_tensors(tiny.llava_config(), 1, inv_freq=False),
        **tiny.projector_tensors(tiny.llava_config(), 1),
    }
    assert_same(dict(written), published)
    config, original = (json.loads((path / "config.json").read_text()) for path in (folder, checkpoint))
    own = {key for key in original if config.get(key) != original[key]}
    assert own <= {"_name_or_path", "initializer_range", "max_length", "pad_token_id", "pretraining_tp",
                   "transformers_version", "freeze_mm_vision_resampler", "tune_mm_vision_resampler"}  # fmt: skip
    assert config["mm_projector_lr"] == 2e-5


def test_a_tower_that_was_trained_lies_inside_and_wins_over_clip(clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = opened(checkpoint)
    tensors = tensors_of(model)
    tensors["vision.blocks.0.attn.qkv.weight"] += 1
    folder = tmp_path / "out"
    write_merged(folder, model.config, tensors, tokenizer_from=checkpoint, vision_tower=str(clip), tower_inside=True)
    assert json.loads((folder / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    found = opened(folder)
    assert found.config == model.config
    assert_same(tensors_of(found), {name: tensor.half() for name, tensor in tensors.items()})
    (clip_less := tmp_path / "clip").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(clip / name, clip_less)
    assert opened(folder, vision_tower=clip_less).missing == ()


def test_a_tower_written_is_a_clip_folder(clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = opened(checkpoint)
    write_tower(tmp_path / "tower", model.config, tensors_of(model))
    found = opened(checkpoint, vision_tower=tmp_path / "tower")
    assert found.config == model.config
    assert_same(tensors_of(found), tensors_of(model))
    transformers = pytest.importorskip("transformers")
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "tower").eval()
    pixels = torch.randn(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    with torch.no_grad():
        wanted = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    ours = llava.load(checkpoint, vision_tower=tmp_path / "tower", dtype="float32").vision_features(pixels)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=5e-5)


def test_a_language_model_alone_is_a_llama_that_transformers_opens(base: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = opened(base)
    folder = tmp_path / "out"
    write_merged(folder, model.config, tensors_of(model), tokenizer_from=base, vision_tower=None)
    ours = llava.load(folder, dtype="float32")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = "Once upon a time there was a painter."
    with torch.no_grad():
        wanted = theirs(torch.tensor([list(ours.prepare(prompt).ids)])).logits[0]
    torch.testing.assert_close(ours.logits(prompt), wanted, rtol=0, atol=1e-4)


def test_the_template_of_a_training_is_kept(clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = opened(checkpoint)
    config = replace(model.config, template="vicuna_v1")
    write_merged(tmp_path / "out", config, tensors_of(model), tokenizer_from=checkpoint, vision_tower=str(clip))
    assert opened(tmp_path / "out").config == config


def test_what_cannot_be_written_leaves_nothing_behind(clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = opened(checkpoint)
    tensors = tensors_of(model)
    del tensors["projector.2.bias"]
    with pytest.raises(llava.LlavaError, match=r"projector\.2\.bias"):
        write_merged(tmp_path / "out", model.config, tensors, tokenizer_from=checkpoint, vision_tower=str(clip))
    tensors = tensors_of(model)
    tensors["decoder.norm.weight"][3] = torch.nan
    with pytest.raises(llava.LlavaError, match="NaN"):
        write_merged(tmp_path / "out", model.config, tensors, tokenizer_from=checkpoint, vision_tower=str(clip))
    assert list(tmp_path.iterdir()) == []


def test_a_projector_written_opens_on_its_base(clip: Path, base: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = opened(checkpoint)
    tensors = tensors_of(model)
    write_projector(tmp_path / "out", model.config, tensors, vision_tower=str(clip), base="lmsys/vicuna-7b-v1.5")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "mm_projector.bin"]
    assert "lmsys/vicuna-7b-v1.5" in refused(tmp_path / "out")
    found = opened(tmp_path / "out", base=base)
    assert found.config == model.config
    assert_same(tensors_of(found), tensors)


def test_start_and_end_rows_are_written_beside_the_projector(clip: Path, base: Path, tmp_path: Path) -> None:
    whole = tiny.write_llava(tmp_path / "model", clip=clip, added=TOKENS, mm_use_im_start_end=True)
    model = opened(whole)
    rows = torch.randn(2, 64).half()
    options: dict[str, Any] = {"vision_tower": str(clip), "base": "a/b", "start_end": rows}
    with pytest.raises(llava.LlavaError, match="tokenizer_from="):
        write_projector(tmp_path / "out", model.config, tensors_of(model), **options)
    write_projector(tmp_path / "out", model.config, tensors_of(model), tokenizer_from=whole, **options)
    found = opened(tmp_path / "out", base=base)
    assert found.config == model.config
    assert torch.equal(found.sources["decoder.embed.weight"].read()[-2:], rows)


# ----------------------------------------------------------------------------------------------------- LoRA


def pairs(modules: dict[str, tuple[int, int]], r: int = 4) -> dict[str, dict[str, Pair]]:
    """Random A and B for modules of a height and a width; those of qkv for each of its parts."""
    generator = torch.Generator().manual_seed(5)

    def pair(height: int, width: int) -> Pair:
        return torch.randn(r, width, generator=generator) * 0.1, torch.randn(height, r, generator=generator) * 0.1

    return {
        module: {part: pair(height, width) for part in ("qkv" if module.endswith("qkv") else ("",))}
        for module, (height, width) in modules.items()
    }


EVERY = {
    f"decoder.blocks.{i}.{name}": size
    for i in range(2)
    for name, size in {
        "attn.qkv": (64, 64), "attn.out": (64, 64), "mlp.gate": (172, 64), "mlp.up": (172, 64), "mlp.down": (64, 172),
    }.items()
}  # fmt: skip


@pytest.fixture(params=["safetensors", "bin"])
def written_lora(request: pytest.FixtureRequest, clip: Path, base: Path, checkpoint: Path, tmp_path: Path) -> Path:
    model = opened(checkpoint)
    beside = {name: tensor for name, tensor in tensors_of(model).items() if name.startswith("projector.")}
    write_lora(
        tmp_path / "out", model.config, pairs(EVERY), r=4, alpha=16, dropout=0.05, base=str(base),
        vision_tower=str(clip), non_lora=beside, form=request.param,
    )  # fmt: skip
    return tmp_path / "out"


def test_a_lora_written_opens_on_its_base(written_lora: Path, base: Path, checkpoint: Path) -> None:
    found, model = opened(written_lora, base=base), opened(checkpoint)
    assert found.config == model.config
    for module, parts in pairs(EVERY).items():
        change = torch.cat([4 * b @ a for a, b in parts.values()])
        merged = model.sources[f"{module}.weight"].read().float() + change
        torch.testing.assert_close(found.sources[f"{module}.weight"].read(), merged, rtol=0, atol=1e-6)
    for name, tensor in tensors_of(model).items():
        if not name.startswith("decoder.blocks."):
            assert torch.equal(found.sources[name].read(), tensor), name


def test_peft_opens_a_lora_that_we_wrote_and_merges_it_to_the_same_model(written_lora: Path, base: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    llama = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(llama, written_lora).eval()
    ours = llava.load(written_lora, base=base, dtype="float32")
    prompt = "Behind it a long wooden pier leads out to the water."
    ids = torch.tensor([list(ours.prepare(prompt).ids)])
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(prompt), theirs(ids).logits[0], rtol=0, atol=1e-4)
    merged = theirs.merge_and_unload().state_dict()
    for i in range(2):
        qkv = torch.cat([merged[f"model.layers.{i}.{name}.weight"] for name in WHERE.values()])
        block = ours.model.decoder.blocks[i]
        torch.testing.assert_close(block.attn.qkv.weight, qkv, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            block.mlp.down.weight, merged[f"model.layers.{i}.mlp.down_proj.weight"], rtol=0, atol=1e-5
        )


def test_we_open_a_lora_that_peft_wrote(base: Path, tmp_path: Path) -> None:
    """Without config.json and without a projector: what peft alone leaves."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    llama = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama, settings).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "lora")
    ours = llava.load(tmp_path / "lora", base=base, dtype="float32")
    prompt = "Name the three primary colours."
    with torch.no_grad():
        wanted = model(torch.tensor([list(ours.prepare(prompt).ids)])).logits[0]
    torch.testing.assert_close(ours.logits(prompt), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("lora", "complaint"),
    [
        ({"decoder.blocks.0.attn.qkv": {"": (torch.ones(4, 64), torch.ones(192, 4))}}, "q, k and v"),
        ({"decoder.blocks.0.attn.out": {"": (torch.ones(3, 64), torch.ones(64, 3))}}, "rank 3"),
    ],
    ids=["no part", "rank"],
)
def test_a_lora_that_does_not_fit_is_not_written(
    clip: Path, checkpoint: Path, tmp_path: Path, lora: dict[str, dict[str, Pair]], complaint: str
) -> None:
    options: dict[str, Any] = {
        "r": 4,
        "alpha": 8,
        "dropout": 0.0,
        "base": "a/b",
        "vision_tower": str(clip),
        "non_lora": {},
    }
    with pytest.raises(llava.LlavaError, match=complaint):
        write_lora(tmp_path / "out", opened(checkpoint).config, lora, **options)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- delta


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
def test_a_delta_written_gives_the_model_back_on_its_base(clip: Path, tmp_path: Path, kind: str) -> None:
    under = tiny.write_llama(tmp_path / "llama", seed=7)
    merged = tiny.write_llava(tmp_path / "model", clip=clip, added=TOKENS, mm_projector_type=kind)
    write_delta(tmp_path / "delta", merged, under)
    assert describe(tmp_path / "delta").kind == "delta"
    found, model = opened(tmp_path / "delta", base=under), opened(merged)
    assert found.config == model.config
    for name, tensor in tensors_of(model).items():
        # one float16 rounding of a difference below 4
        torch.testing.assert_close(found.sources[name].read(), tensor, rtol=0, atol=2e-3)
    assert torch.equal(
        found.sources["decoder.embed.weight"].read()[-2:], model.sources["decoder.embed.weight"].read()[-2:]
    )
    other = tiny.write_llama(tmp_path / "other", num_hidden_layers=1)
    assert "none" in refused(tmp_path / "delta", base=other)
