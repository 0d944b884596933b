"""LoRAs as published, read on their base: prefixes, ranks, factors, and tensors saved along with the pairs."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llava
from llava.checkpoint.inspect import describe, scan
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.formats.format import Checkpoint
from tests import tiny
from tests.checkpoints import assert_same, opened, refused, tensors_of

FLOAT32: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
PROMPT = "Behind it a long wooden pier leads out to the water."
BASE_SEED = 1  # default seed of write_llama and write_llava
WHERE = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
MODULES = {
    "attn.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@pytest.fixture
def lora(clip: Path, tmp_path: Path) -> Path:
    return tiny.write_lora(tmp_path / "lora", clip=clip)


def merged_by_hand(base: Path, targets: tuple[str, ...]) -> dict[str, Tensor]:
    """W + alpha / r * B @ A in float64, by the names on disk."""
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
        qkv = found.tensors[f"decoder.blocks.{i}.attn.qkv.weight"].read()
        torch.testing.assert_close(qkv.double(), stacked, rtol=0, atol=1e-6)
        for ours, disk in MODULES.items():
            matrix = found.tensors[f"decoder.blocks.{i}.{ours}.weight"].read()
            torch.testing.assert_close(matrix.double(), merged[f"model.layers.{i}.{disk}.weight"], rtol=0, atol=1e-6)
    projector = tiny.projector_tensors(tiny.llava_config(), 3)["model.mm_projector.0.weight"]
    assert torch.equal(found.tensors["projector.0.weight"].read(), projector.bfloat16())


def test_a_lora_where_heads_share_keys_and_values(clip: Path, tmp_path: Path) -> None:
    under = tiny.write_llama(tmp_path / "base", num_key_value_heads=2)
    folder = tiny.write_lora(tmp_path / "lora", clip=clip, num_key_value_heads=2, targets=("q_proj", "v_proj"))
    found, plain = opened(folder, base=under), opened(under)
    name = "decoder.blocks.0.attn.qkv.weight"
    change = found.tensors[name].read() - plain.tensors[name].read().float()
    assert change[:64].any()
    assert not change[64:96].any()
    pairs = tiny.lora_tensors(tiny.llama_config(num_key_value_heads=2), 3)
    b, a = (pairs[f"model.layers.0.self_attn.v_proj.lora_{kind}.weight"].bfloat16().float() for kind in "BA")
    torch.testing.assert_close(change[96:], 2 * b @ a, rtol=0, atol=1e-6)


def test_a_lora_converts_to_native_with_one_rounding(clip: Path, base: Path, tmp_path: Path) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    convert(lora, tmp_path / "native", LoadOptions(base=base), verify=True)
    found, source = opened(tmp_path / "native"), opened(lora, base=base)
    assert found.config == source.config
    stored = {name: tensor.to(source.tensors[name].dtype) for name, tensor in source.read_tensors()}
    assert_same(tensors_of(found), stored)
    assert found.tensors["decoder.blocks.0.mlp.up.weight"].dtype == torch.float16


def test_a_lora_loads_on_a_native_and_on_a_merged_base_too(
    clip: Path, base: Path, checkpoint: Path, tmp_path: Path
) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    convert(checkpoint, tmp_path / "native")
    first = tensors_of(opened(lora, base=base))
    assert_same(tensors_of(opened(lora, base=checkpoint)), first)
    assert_same(tensors_of(opened(lora, base=tmp_path / "native")), first)


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
    assert opened(lora, base=base).format == "lora"


def test_inspect_reads_what_it_can_of_a_lora_without_its_base(lora: Path) -> None:
    assert describe(lora).template is None
    tiny.edit_json(lora / "config.json", llava_template="vicuna_v1")
    assert describe(lora).template == "vicuna_v1"
    (lora / "adapter_config.json").write_text("{")
    assert describe(lora).kind == "lora"


def test_inspect_describes_what_a_lora_needs_and_with_its_base_the_resulting_model(lora: Path, base: Path) -> None:
    alone, whole = describe(lora), describe(lora, LoadOptions(base=str(base)))
    assert alone.base == "lmsys/vicuna-13b-v1.3"
    assert whole.kind == "lora"
    assert whole.template == "llava_v1"
    assert whole.sizes["decoder"]["n_layers"] == 2
    assert whole.missing == []


@pytest.mark.parametrize("file", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_a_scan_reads_the_tensors_of_a_lora(file: str, lora: Path) -> None:
    assert scan(lora, progress=lambda done, total: None).nan == {}
    tensors = torch.load(lora / file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    torch.save(tensors, lora / file)
    assert scan(lora, progress=lambda done, total: None).nan == {name: 1}
    parts = describe(lora).sizes["parameters_by_part"]
    assert parts[file.removesuffix(".bin")] == sum(tensor.numel() for tensor in tensors.values())


def edit(file: Path, change: Any) -> None:
    torch.save(change(torch.load(file, weights_only=True)), file)


def assert_same_checkpoint(ours: Checkpoint, theirs: Checkpoint) -> None:
    assert ours.config == theirs.config
    assert set(ours.tensors) == set(theirs.tensors)
    for name, source in ours.tensors.items():
        assert torch.equal(source.read(), theirs.tensors[name].read()), name


@pytest.mark.parametrize(
    "wrapper",
    [
        "base_model.model.",
        "base_model.",
        "",
        "module.base_model.model.",
        "base_model.model.module.",
        "module.",
        "model.",
    ],
)
@pytest.mark.parametrize("file", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_the_prefix_of_tensor_names_does_not_matter(
    lora: Path, base: Path, clip: Path, tmp_path: Path, file: str, wrapper: str
) -> None:
    expected = opened(tiny.write_lora(tmp_path / "expected", clip=clip), base=base)
    edit(lora / file, lambda held: {wrapper + n.removeprefix("base_model.model."): t for n, t in held.items()})
    assert_same_checkpoint(opened(lora, base=base), expected)


def test_extra_names_without_the_double_model_are_known_too(lora: Path, base: Path, clip: Path, tmp_path: Path) -> None:
    expected = opened(tiny.write_lora(tmp_path / "expected", clip=clip), base=base)
    edit(
        lora / "non_lora_trainables.bin", lambda held: {n.replace("model.model.", "model."): t for n, t in held.items()}
    )
    assert_same_checkpoint(opened(lora, base=base), expected)


def test_the_lora_of_june_2023_brings_a_longer_vocabulary(clip: Path, base: Path, tmp_path: Path) -> None:
    """It uses its base's tokenizer, which lacks the three tokens. The last two rows are <im_start> and <im_end>."""
    longer = {"vocab_size": tiny.PIECES + 3, "mm_use_im_start_end": True, "mm_projector_type": "linear"}
    lora = tiny.write_lora(tmp_path / "lora", clip=clip, rows=True, **longer)
    found = opened(lora, base=base)
    assert found.config.decoder.vocab_size == tiny.PIECES + 3
    assert found.config.start_end
    assert [found.tokenizer.id_of(text) for text in TOKENS] == [tiny.PIECES + i for i in range(3)]
    whole = tiny.llama_tensors(tiny.llama_config(vocab_size=tiny.PIECES + 3), 3, inv_freq=False)
    for ours, disk in (("embed", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        assert torch.equal(found.tensors[f"decoder.{ours}.weight"].read(), whole[disk].bfloat16())
    with_files = tiny.write_lora(tmp_path / "files", clip=clip, rows=True, added=TOKENS, **longer)
    theirs = opened(with_files, base=base)
    assert found.config == replace(theirs.config, eos_ids=(2,))  # from the base's generation_config.json
    text = "USER: <im_start><im_end> Hi"
    assert found.tokenizer.encode(text) == theirs.tokenizer.encode(text)


def test_tokens_added_in_memory_are_written_by_a_conversion(clip: Path, base: Path, tmp_path: Path) -> None:
    longer = {"vocab_size": tiny.PIECES + 3, "mm_use_im_start_end": True, "mm_projector_type": "linear"}
    lora = tiny.write_lora(tmp_path / "lora", clip=clip, rows=True, **longer)
    for to in ("native", "llava"):
        convert(lora, tmp_path / to, LoadOptions(base=base), to=to)
        found = opened(tmp_path / to)
        assert (found.config.start_end, found.tokenizer.id_of("<im_end>")) == (True, tiny.PIECES + 2)


def change_of(found: Checkpoint, base: Path, name: str) -> Tensor:
    return found.tensors[name].read().float() - opened(base).tensors[name].read().float()


def product(module: str, rank: int = tiny.LORA_RANK) -> Tensor:
    pairs = tiny.lora_tensors(tiny.llama_config(), 3)
    a, b = (pairs[f"{module}.lora_{kind}.weight"].bfloat16().float() for kind in "AB")
    return b[:, :rank] @ a[:rank]


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"use_rslora": True}, tiny.LORA_ALPHA / math.sqrt(tiny.LORA_RANK)),
        ({"alpha_pattern": {"mlp.up_proj": 3}}, 3 / tiny.LORA_RANK),
        ({"alpha_pattern": {"layers.1.mlp.up_proj": 3}}, tiny.LORA_ALPHA / tiny.LORA_RANK),
        ({"alpha_pattern": {r"layers\.\d+\.mlp\.up_proj": 3}, "use_rslora": True}, 3 / math.sqrt(tiny.LORA_RANK)),
    ],
    ids=str,
)
def test_the_factor_is_the_one_that_the_settings_tell(
    lora: Path, base: Path, settings: dict[str, Any], factor: float
) -> None:
    tiny.edit_json(lora / "adapter_config.json", **settings)
    change = change_of(opened(lora, base=base), base, "decoder.blocks.0.mlp.up.weight")
    torch.testing.assert_close(change, factor * product("model.layers.0.mlp.up_proj"), rtol=0, atol=1e-5)


def test_ranks_may_differ_from_matrix_to_matrix(lora: Path, base: Path) -> None:
    def cut(held: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: (t[:2] if "lora_A" in name else t[:, :2]).clone() if "k_proj" in name else t
            for name, t in held.items()
        }

    edit(lora / "adapter_model.bin", cut)
    tiny.edit_json(lora / "adapter_config.json", rank_pattern={"k_proj": 2})
    change = change_of(opened(lora, base=base), base, "decoder.blocks.1.attn.qkv.weight")
    expected = tiny.LORA_ALPHA / 2 * product("model.layers.1.self_attn.k_proj", rank=2)
    torch.testing.assert_close(change[64:128], expected, rtol=0, atol=1e-5)
    merged, apart = (llava.load(lora, base=base, merge=merge, **FLOAT32).logits(PROMPT) for merge in (True, False))
    torch.testing.assert_close(apart, merged, rtol=0, atol=1e-4)


@pytest.mark.parametrize("where", ["", ".modules_to_save", ".modules_to_save.default", ".base_layer"])
def test_fully_saved_modules_replace_the_bases(lora: Path, base: Path, where: str) -> None:
    head = torch.randn(tiny.PIECES, 64).bfloat16()
    edit(lora / "adapter_model.bin", lambda held: held | {f"base_model.model.lm_head{where}.weight": head})
    tiny.edit_json(lora / "adapter_config.json", modules_to_save=["lm_head"])
    assert torch.equal(opened(lora, base=base).tensors["decoder.head.weight"].read(), head)


def test_a_lora_of_the_head_is_known(lora: Path, base: Path) -> None:
    a, b = torch.randn(4, 64) * 0.1, torch.randn(tiny.PIECES, 4) * 0.1
    names = [f"base_model.model.lm_head.lora_{kind}.weight" for kind in "AB"]
    edit(lora / "adapter_model.bin", lambda held: held | dict(zip(names, (a, b), strict=True)))
    change = change_of(opened(lora, base=base), base, "decoder.head.weight")
    torch.testing.assert_close(change, tiny.LORA_ALPHA / 4 * b @ a, rtol=0, atol=1e-5)
    merged, apart = (llava.load(lora, base=base, merge=merge, **FLOAT32).logits(PROMPT) for merge in (True, False))
    torch.testing.assert_close(apart, merged, rtol=0, atol=1e-4)


@pytest.mark.parametrize("described", [True, False], ids=["its own config.json", "none"])
def test_without_an_extra_file_the_projector_is_the_llavas_below(
    lora: Path, checkpoint: Path, described: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (lora / "non_lora_trainables.bin").unlink()
    if not described:
        (lora / "config.json").unlink()
    found, under = opened(lora, base=checkpoint), opened(checkpoint)
    assert caplog.text.count(f"uses the projector of the base {checkpoint}") == 1
    assert found.config == under.config
    for name, source in under.tensors.items():
        if not name.startswith("decoder.blocks."):
            assert torch.equal(found.tensors[name].read(), source.read()), name


def test_a_lora_on_a_language_model_without_its_projector_is_refused(lora: Path, base: Path) -> None:
    (lora / "non_lora_trainables.bin").unlink()
    message = refused(lora, base=base)
    assert "no non_lora_trainables.bin" in message
    assert str(base) in message
    assert opened(lora, base=base, vision=False).config.vision is None


def test_types_may_differ_and_the_sum_is_of_the_bases(lora: Path, base: Path) -> None:
    found = opened(lora, base=base)
    assert found.config.dtype == "float16"
    vlm = llava.load(lora, base=base, merge=False, dtype="float16", device="cpu")
    assert {tensor.dtype for tensor in vlm.model.state_dict().values()} == {torch.float16}


def test_a_tensor_that_zero_3_left_empty_is_refused_by_name(lora: Path, base: Path) -> None:
    name = "base_model.model.model.mm_projector.0.weight"
    edit(lora / "non_lora_trainables.bin", lambda held: held | {name: torch.empty(0)})
    assert name in (message := refused(lora, base=base))
    assert "ZeRO-3" in message


def test_the_lora_itself_is_no_base_and_other_kinds_are_no_loras(lora: Path, base: Path) -> None:
    message = refused(lora, base=lora)
    assert "format lora" in message
    assert "lmsys/vicuna-13b-v1.3" in message
    tiny.edit_json(lora / "adapter_config.json", peft_type="LOHA")
    assert "LOHA" in refused(lora, base=base)


def test_peft_reads_ranks_factors_and_saved_modules_alike(base: Path, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    llama = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=4, lora_alpha=5, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", use_rslora=True,
        rank_pattern={"v_proj": 2, "layers.1.mlp.up_proj": 3}, alpha_pattern={"layers.0.self_attn.q_proj": 7},
        modules_to_save=["lm_head"],
    )  # fmt: skip
    model = peft.get_peft_model(llama, settings).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "lora")
    for merge in (True, False):
        ours = llava.load(tmp_path / "lora", base=base, merge=merge, **FLOAT32)
        with torch.no_grad():
            wanted = model(torch.tensor([list(ours.prepare(PROMPT).ids)])).logits[0]
        torch.testing.assert_close(ours.logits(PROMPT), wanted, rtol=0, atol=1e-4)


def test_an_alpha_pattern_that_is_no_pattern_is_refused(lora: Path, base: Path) -> None:
    for key in ("(", "(?i)up_proj"):
        tiny.edit_json(lora / "adapter_config.json", alpha_pattern={key: 4})
        assert f"alpha_pattern key {key!r}" in refused(lora, base=base)


# ------------------------------------------------------------------------- adapters that contradict their own settings


def test_an_adapter_without_tensors_is_refused(lora: Path, base: Path) -> None:
    torch.save({}, lora / "adapter_model.bin")
    assert "contains no tensors" in refused(lora, base=base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 16}, "r is 16 for"),
        ({"rank_pattern": {"q_proj": 2}}, "r is 2 for model.layers.0.self_attn.q_proj"),
    ],
)
def test_settings_that_the_factors_contradict_are_refused(
    lora: Path, base: Path, changes: dict[str, Any], message: str
) -> None:
    tiny.edit_json(lora / "adapter_config.json", **changes)
    assert message in refused(lora, base=base)


def test_a_rank_pattern_that_the_factors_follow_changes_the_scale_of_its_modules(lora: Path, base: Path) -> None:
    name = "decoder.blocks.0.mlp.up.weight"
    before = opened(lora, base=base).tensors[name].read()
    tiny.edit_json(lora / "adapter_config.json", r=8, rank_pattern={".*": tiny.LORA_RANK})
    assert torch.equal(opened(lora, base=base).tensors[name].read(), before)  # alpha / rank of the factors


def test_an_adapter_config_left_in_a_merged_model_is_not_a_lora(lora: Path, clip: Path, tmp_path: Path) -> None:
    whole = tiny.write_llava(tmp_path / "whole", clip=clip)
    shutil.copy(lora / "adapter_config.json", whole)
    assert opened(whole).format == "llava"


def test_a_whole_model_beside_an_adapter_is_refused(lora: Path, base: Path, clip: Path, tmp_path: Path) -> None:
    whole = tiny.write_llava(tmp_path / "whole", clip=clip, layout="bin")
    for name in ("adapter_config.json", "adapter_model.bin"):
        shutil.copy(lora / name, whole)
    assert "contains a whole model (pytorch_model.bin) and a LoRA" in refused(whole, base=base)
