"""LoRA adapters compared with peft, on full-precision and on 4-bit matrices."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import llava
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.errors import ConfigError
from llava.quantize.nf4 import BLOCK, LEVELS, NF4Linear, pack, unpack
from llava.train.loop import train
from llava.train.lora import lora_layers
from tests import tiny, training
from tests.checkpoints import opened
from tests.train.plain import Plain, plain_loop
from tests.training import LORA, Assets, losses, net_and_dataset, recipe, restore

# --------------------------------------------------------------------------------------------------------- peft

OURS = {"attn.qkv.q": "self_attn.q_proj", "attn.qkv.k": "self_attn.k_proj", "attn.qkv.v": "self_attn.v_proj"}
OURS |= {"attn.out.all": "self_attn.o_proj"} | {
    f"mlp.{name}.all": f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
TWENTY = {
    "max_steps": 20,
    "global_batch_size": 6,
    "micro_batch_size": 6,
    "save_every": 0,
    "warmup_ratio": 0.1,
    "lr": 5e-3,
}


def in_peft(model: nn.Module, asked: Any) -> Any:
    """The model with peft's adapters, initialized with our values."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=asked.lora_rank,
        lora_alpha=asked.lora_alpha,
        lora_dropout=0.0,
        target_modules=sorted({name.rpartition(".")[2] for name in OURS.values()}),
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, settings)
    theirs = dict(wrapped.named_parameters())
    net, _ = net_and_dataset(asked)
    for name, layer in lora_layers(net.model.decoder):
        _, _, number, ours = name.split(".", 3)
        for part, adapter in layer.adapters.items():
            module = f"base_model.model.model.layers.{number}.{OURS[f'{ours}.{part}']}"
            assert not adapter.b.any()
            assert not theirs[f"{module}.lora_B.default.weight"].any()
            with torch.no_grad():
                theirs[f"{module}.lora_A.default.weight"].copy_(adapter.a)
    return wrapped


@pytest.mark.parametrize("packing", [True, False])
def test_twenty_steps_equal_peft_and_peft_opens_the_export(assets: Assets, tmp_path: Path, packing: bool) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    asked = recipe(assets, tmp_path / "run", **{**LORA, **TWENTY, "packing": packing})
    plain = Plain(assets)
    plain.llama = in_peft(plain.llama, asked)
    adapters = [p for name, p in plain.llama.named_parameters() if "lora_" in name]
    groups = [
        {"params": adapters, "lr": asked.lr},
        {"params": list(plain.mm_projector.parameters()), "lr": asked.projector_lr},
    ]
    wanted = plain_loop(plain, asked, groups)
    model = train(asked, device="cpu")
    assert losses(tmp_path / "run") == pytest.approx(wanted, abs=1e-4)
    assert wanted[-1] < wanted[0] - 0.3

    ours = load_file(model / "adapter_model.safetensors")
    theirs = {name.replace(".default", ""): p for name, p in plain.llama.named_parameters() if "lora_" in name}
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name].detach(), rtol=0, atol=1e-4, msg=name)
    beside = torch.load(model / "non_lora_trainables.bin", weights_only=True)
    assert set(beside) == {
        f"base_model.model.model.mm_projector.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")
    }
    for name, p in plain.mm_projector.named_parameters():
        torch.testing.assert_close(beside[f"base_model.model.model.mm_projector.{name}"], p.detach(), rtol=0, atol=1e-4)

    base = transformers.LlamaForCausalLM.from_pretrained(assets.llama, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, model).merge_and_unload().eval()
    assistant = llava.load(model, base=assets.llava, dtype="float32", device="cpu")
    prompt = "What is in the picture? A boat lies at the shore of a lake."
    ids = torch.tensor([list(assistant.prepare(prompt).ids)])
    with torch.no_grad():
        logits = merged(ids).logits[0]
        trained = plain.llama(ids).logits[0]
    torch.testing.assert_close(assistant.logits(prompt), logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits, trained, rtol=0, atol=2e-3)


def test_adapters_are_initialized_as_in_peft(assets: Assets, tmp_path: Path) -> None:
    """A is uniform within 1 / sqrt(input features) and B is zero, so the model starts unchanged."""
    net, dataset = net_and_dataset(recipe(assets, tmp_path / "lora", **LORA))
    whole, _ = net_and_dataset(recipe(assets, tmp_path / "full"))
    batch = dataset[0]
    torch.testing.assert_close(net(batch), whole(batch))
    layers = dict(lora_layers(net.model.decoder))
    assert len(layers) == 2 * 5
    for name, layer in layers.items():
        assert set(layer.adapters) == ({"q", "k", "v"} if name.endswith("qkv") else {"all"})
        for adapter in layer.adapters.values():
            limit = 1 / math.sqrt(adapter.a.shape[1])
            assert 0.9 * limit < adapter.a.abs().max() <= limit
            assert abs(adapter.a.std() - limit / math.sqrt(3)) < 0.15 * limit
    values = [tuple(a.a.flatten()[:4].tolist()) for layer in layers.values() for a in layer.adapters.values()]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_only_adapters_and_projector_are_trained(assets: Assets, tmp_path: Path, quantize: str) -> None:
    asked = recipe(assets, tmp_path / "run", **LORA, quantize_base=quantize)
    before, _ = net_and_dataset(asked)
    after, _ = net_and_dataset(asked)
    train(asked, device="cpu")
    restore(asked, after)
    first, last = before.state_dict(), after.state_dict()
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {name for name in first if ".adapters." in name or ".projector." in name}


def test_dropout_differs_between_micro_batches_and_is_off_in_eval_mode(assets: Assets, tmp_path: Path) -> None:
    net, dataset = net_and_dataset(recipe(assets, tmp_path / "run", **LORA | {"lora_dropout": 0.5}))
    for _, layer in lora_layers(net.model.decoder):
        for adapter in layer.adapters.values():
            nn.init.normal_(adapter.b, std=0.1)
    batch = dataset[0]
    one, two = net(batch).item(), net(batch).item()
    assert one != two
    net.eval()
    assert net(batch).item() == net(batch).item()


def test_dropout_keeps_the_mean(assets: Assets, tmp_path: Path) -> None:
    net, _ = net_and_dataset(recipe(assets, tmp_path / "run", **LORA | {"lora_dropout": 0.25}))
    layer = next(layer for name, layer in lora_layers(net.model.decoder) if name.endswith("mlp.up"))
    nn.init.normal_(layer.adapters["all"].b)
    torch.manual_seed(0)
    x = torch.randn(1, 64)
    with torch.no_grad():
        mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
        torch.testing.assert_close(mean, layer.eval()(x), rtol=0, atol=0.15)


def test_head_and_embeddings_get_no_adapter(assets: Assets, tmp_path: Path) -> None:
    model = train(recipe(assets, tmp_path / "run", **LORA, max_steps=1), device="cpu")
    settings = json.loads((model / "adapter_config.json").read_text())
    assert sorted(settings["target_modules"]) == sorted(tiny.LORA_TARGETS)
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (4, 8, str(assets.llava))


@pytest.mark.parametrize("changes", [LORA, {"train": ("projector",)}], ids=["lora", "projector"])
def test_an_export_finds_its_base_and_notices_another(
    assets: Assets, tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = train(recipe(assets, tmp_path / "run", **changes, max_steps=1), device="cpu")
    assert opened(model).config.vision
    assert caplog.text.count(f"uses the recorded base {assets.llava}") == 1
    caplog.clear()
    opened(model, base=assets.llava)
    assert not caplog.records
    opened(model, base=tiny.write_llava(tmp_path / "other", clip=assets.clip, seed=9))
    assert "it was made with another base" in caplog.text


def test_a_lora_with_grouped_query_attention_opens_on_its_base(assets: Assets, tmp_path: Path) -> None:
    base = tiny.write_llava(tmp_path / "base", clip=assets.clip, num_key_value_heads=2, torch_dtype="float32")
    opened_as_trained(recipe(assets, tmp_path / "run", **LORA, model=str(base)), base)


def opened_as_trained(asked: Any, base: Path) -> None:
    """Checks that the export, opened on its base, has the loss of the trained model."""
    model = train(asked, device="cpu")
    net, dataset = net_and_dataset(asked)
    restore(asked, net)
    merged, _ = net_and_dataset(recipe_of_merged(asked, model, base))
    batch = dataset.build(range(6))
    ours, wanted = merged(batch).item(), net.eval()(batch).item()
    assert ours / len(batch.target_positions) == pytest.approx(wanted / len(batch.target_positions), abs=1e-5)


def recipe_of_merged(asked: Any, model: Path, base: Path) -> Any:
    values = training.to_dict(asked) | {"model": str(model), "base": str(base), "lora_rank": 0, "quantize_base": "none"}
    return type(asked)(**values)


def test_a_lora_of_mpt_opens_on_its_base(assets: Assets, tmp_path: Path) -> None:
    base = tiny.write_mpt(tmp_path / "base", clip=assets.clip, torch_dtype="float32")
    values = LORA | {"model": str(base), "template": "mpt", "start_end": True}
    opened_as_trained(recipe(assets, tmp_path / "run", **values), base)


def test_a_second_lora_can_start_from_the_first(assets: Assets, tmp_path: Path) -> None:
    """The adapters of the first are merged into the frozen matrices."""
    first = train(recipe(assets, tmp_path / "one", **LORA), device="cpu")
    net, dataset = net_and_dataset(recipe(assets, tmp_path / "two", **LORA, model=str(first), base=str(assets.llava)))
    before, _ = net_and_dataset(recipe(assets, tmp_path / "one", **LORA))
    batch = dataset.build(range(12))
    assert net(batch) < before(batch)


# ------------------------------------------------------------------------------------------------------ 4 bits


def test_nf4_levels_are_quantiles_of_a_normal_distribution() -> None:
    """Eight positive and seven negative levels, the outermost at quantile 0.9677. arXiv:2305.14314, appendix E."""
    normal = torch.distributions.Normal(0.0, 1.0)
    up = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    down = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([down, torch.zeros(1, dtype=torch.float64), up]).sort().values
    torch.testing.assert_close(
        torch.tensor(LEVELS, dtype=torch.float64), levels / levels.abs().max(), rtol=0, atol=1e-5
    )


def test_values_equal_to_levels_are_restored_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (48, 96), generator=generator)
    codes.view(-1, BLOCK)[:, 0] = torch.tensor([0, 15]).repeat(36)  # so that the scale of each block is exact
    scales = torch.rand(72, 1, generator=generator) + 0.1
    weight = (torch.tensor(LEVELS)[codes].view(-1, BLOCK) * scales).view(48, 96)
    packed = pack(weight)
    assert torch.equal(unpack(*packed, (48, 96), torch.float32), weight)
    assert packed[0].dtype == torch.uint8
    assert torch.equal(torch.stack([packed[0] >> 4, packed[0] & 15], 1).flatten(), codes.flatten().to(torch.uint8))


def test_every_value_is_rounded_to_the_nearest_level_of_its_block() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 1, 64)[:, None]
    weight[5, :64] = 0
    wide = unpack(*pack(weight), (64, 128), torch.float32)
    blocks = weight.view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] - torch.tensor(LEVELS) * scales[..., None]).abs().amin(-1)
    torch.testing.assert_close((wide.view(-1, BLOCK) - blocks).abs(), nearest, rtol=0, atol=1e-6)
    # half the largest gap between levels
    assert bool(((wide.view(-1, BLOCK) - blocks).abs() <= 0.1520 * scales + 1e-6).all())
    assert not wide[5, :64].any()
    assert not wide.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_4_bit_matrix_has_the_output_and_gradient_of_its_dequantized_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = NF4Linear(128, 96)
    layer.set_weight(torch.randn(96, 128))
    x = torch.randn(3, 7, 128, dtype=dtype, requires_grad=True)
    weight = layer.dequantize(dtype)
    y, wanted = layer(x), F.linear(x, weight)
    assert y.dtype == dtype
    assert torch.equal(y, wanted)
    grad = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(wanted, x, grad)[0])


def test_a_weight_takes_4_5_bits_and_no_dequantized_copy_is_saved() -> None:
    layer = NF4Linear(256, 512)
    layer.set_weight(torch.randn(512, 256))
    n = 256 * 512
    assert sum(t.nbytes for t in layer.state_dict().values()) * 8 == 4.5 * n
    held: list[int] = []

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        layer(torch.randn(4, 256, requires_grad=True))
    assert sum(held) <= 4.5 / 8 * n


def test_qlora_stays_close_to_lora_and_opens_on_its_base(assets: Assets, tmp_path: Path) -> None:
    values = LORA | {"max_steps": 12, "save_every": 0}
    wide = recipe(assets, tmp_path / "wide", **values)
    train(wide, device="cpu")
    asked = recipe(assets, tmp_path / "nf4", **values, quantize_base="nf4", compute_dtype="bfloat16")
    model = train(asked, device="cpu")
    ours, full = losses(tmp_path / "nf4"), losses(tmp_path / "wide")
    assert ours[-1] < ours[0] - 0.3
    assert ours == pytest.approx(full, abs=0.5)
    assert ours[0] != pytest.approx(full[0], abs=1e-3)  # quantization has an effect
    net, _ = net_and_dataset(asked)
    kinds = {type(layer.base) for _, layer in lora_layers(net.model.decoder)}
    assert kinds == {NF4Linear}
    opened = open_checkpoint(model, LoadOptions(base=assets.llava))
    start = open_checkpoint(assets.llava)
    moved = {n for n, source in opened.tensors.items() if not torch.equal(source.read(), start.tensors[n].read())}
    assert moved == {n for n in start.tensors if n.startswith(("projector", "decoder.blocks")) and "norm" not in n}


def test_a_4_bit_base_equals_its_rounded_weights(assets: Assets, tmp_path: Path) -> None:
    """Loss and gradients equal those of LoRA on a model with explicitly rounded matrices."""
    asked = recipe(assets, tmp_path / "nf4", **LORA, quantize_base="nf4")
    plain, _ = net_and_dataset(recipe(assets, tmp_path / "wide", **LORA))
    four, dataset = net_and_dataset(asked)
    for (_, wide), (_, narrow) in zip(lora_layers(plain.model.decoder), lora_layers(four.model.decoder), strict=True):
        wide.base.weight.data = narrow.base.dequantize(torch.float32)
    batch = dataset[0]
    (loss, grads), (wanted, others) = (training.gradients(one, batch) for one in (four, plain))
    torch.testing.assert_close(loss, wanted)
    assert set(grads) == set(others)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], msg=name)


def test_a_matrix_that_does_not_fill_whole_blocks_is_refused(assets: Assets, tmp_path: Path) -> None:
    model = tiny.write_llava(
        tmp_path / "odd",
        clip=assets.clip,
        hidden_size=60,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=10,
    )
    with pytest.raises(ConfigError, match="block size 64"):
        train(recipe(assets, tmp_path / "run", **LORA, model=str(model), quantize_base="nf4"), device="cpu")
