"""Writing LoRAs: ours load on their base and in peft, and peft's load in llava."""

from pathlib import Path
from typing import Any

import pytest
import torch

import llava
from llava.formats.lora import Factors, write_lora
from tests import tiny
from tests.checkpoints import opened, tensors_of

WHERE = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}


def pairs(modules: dict[str, tuple[int, int]], r: int = 4) -> dict[str, dict[str, Factors]]:
    """Random A and B for modules of the given shapes; for qkv one pair per part."""
    generator = torch.Generator().manual_seed(5)

    def pair(height: int, width: int) -> Factors:
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
        vision_tower=str(clip), non_lora=beside, file_type=request.param,
    )  # fmt: skip
    return tmp_path / "out"


def test_a_lora_written_opens_on_its_base(written_lora: Path, base: Path, checkpoint: Path) -> None:
    found, model = opened(written_lora, base=base), opened(checkpoint)
    assert found.config == model.config
    for module, parts in pairs(EVERY).items():
        change = torch.cat([4 * b @ a for a, b in parts.values()])
        merged = model.tensors[f"{module}.weight"].read().float() + change
        torch.testing.assert_close(found.tensors[f"{module}.weight"].read(), merged, rtol=0, atol=1e-6)
    for name, tensor in tensors_of(model).items():
        if not name.startswith("decoder.blocks."):
            assert torch.equal(found.tensors[name].read(), tensor), name


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
    """A folder as peft saves it: without config.json and projector."""
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
        ({"decoder.blocks.0.attn.qkv": {"": (torch.ones(4, 64), torch.ones(192, 4))}}, "one of 'q', 'k', 'v'"),
        ({"decoder.blocks.0.attn.qkv": {"x": (torch.ones(4, 64), torch.ones(64, 4))}}, "part is 'x'"),
        ({"decoder.blocks.0.attn.out": {"q": (torch.ones(4, 64), torch.ones(64, 4))}}, "part is 'q'"),
        ({"decoder.blocks.0.attn.out": {"": (torch.ones(3, 64), torch.ones(64, 3))}}, r"\[3, 64\] and \[64, 3\]"),
        ({"decoder.blocks.0.attn.out": {"": (torch.ones(4, 64), torch.ones(64, 3))}}, r"\[4, 64\] and \[64, 3\]"),
        ({"decoder.blocks.0.attn.out": {"": (torch.ones(4, 32), torch.ones(64, 4))}}, r"expected \[4, 64\]"),
        ({"decoder.blocks.9.attn.out": {"": (torch.ones(4, 64), torch.ones(64, 4))}}, "is no matrix of this model"),
    ],
    ids=["no part", "unknown part", "needless part", "rank", "rank of B", "width", "module"],
)
def test_a_lora_that_does_not_fit_is_not_written(
    clip: Path, checkpoint: Path, tmp_path: Path, lora: dict[str, dict[str, Factors]], complaint: str
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
        assert torch.equal(found.tensors[name].read(), tensor + change), name
