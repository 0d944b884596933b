"""Training on a GPU. Run with `pytest -m gpu` on a machine that has one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import llava
from llava.model.attention import Segments, VarlenContext
from llava.train.batch import BatchDataset
from llava.train.loop import train
from llava.train.recipe import Recipe, recipe_from, to_json
from llava.train.start import start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu"),
]

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 samples, a quarter of them text-only."""
    folder = tmp_path_factory.mktemp("data")
    samples = []
    for i in range(64):
        colour = COLOURS[i % 4]
        sample = {"id": str(i), "conversations": [{"from": "human", "value": "Name a colour." * (1 + i % 5)}]}
        sample["conversations"].append({"from": "gpt", "value": f"It is {colour}."})
        if i % 4:
            sample["image"] = f"{i}.png"
            sample["conversations"][0]["value"] = "<image>\nWhich colour?"
            Image.new("RGB", (40 + i, 50), colour).save(folder / f"{i}.png")
        samples.append(sample)
    (folder / "data.json").write_text(json.dumps(samples))
    return folder


def recipe(checkpoint: Path, data: Path, out: Path, **changes: object) -> Recipe:
    values = {"model": str(checkpoint), "vision_tower": str(checkpoint.parent / "clip"), "output_dir": str(out)}
    values |= {"data": [str(data / "data.json")], "images": str(data), "template": "vicuna_v1", "num_workers": 2}
    values |= {
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "lr": 1e-3,
        "max_length": 256,
        "epochs": 3,
        "compute_dtype": "float32",
    }
    return recipe_from(values | changes, "test")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def attention(segments: Segments, window: int | None, alibi: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    positions = torch.arange(q.shape[1], device=q.device)[None]  # not read by `attend`
    context = VarlenContext(positions=positions, seq_len=130, segments=segments)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=q.device) if alibi else None
    return context.with_scores(sliding_window=window, alibi_slopes=slopes, dtype=q.dtype).attend(0, q, k, v)


@pytest.mark.parametrize("alibi", [False, True], ids=["no biases", "ALiBi"])
@pytest.mark.parametrize("window", [None, 40])
def test_packed_attention_in_16_bits_on_the_gpu_equals_plain_attention(window: int | None, alibi: bool) -> None:
    torch.manual_seed(0)
    lengths = (5, 130, 1, 0, 64)
    cu_seqlens = torch.tensor([0, 5, 135, 136, 136, 200], dtype=torch.int32)
    q, k, v = (torch.randn(1, 200, heads, 64, requires_grad=True) for heads in (4, 2, 2))
    plain = attention(Segments(cu_seqlens, lengths, 130), window, alibi, q, k, v)
    there = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in (q, k, v)]
    kernel = attention(Segments(cu_seqlens.cuda(), (), 130), window, alibi, *there)
    torch.testing.assert_close(kernel.float().cpu(), plain, atol=0.03, rtol=0.03)
    weight = torch.randn_like(plain)
    (plain * weight).sum().backward()
    (kernel * weight.to("cuda", torch.bfloat16)).sum().backward()
    for one, other in zip(there, (q, k, v), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        error = (one.grad.float().cpu() - other.grad).norm() / other.grad.norm()
        assert error < 0.02


def test_float32_losses_equal_those_of_the_cpu(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        train(recipe(checkpoint, data, tmp_path / device), device=device)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=2e-3)


@pytest.mark.parametrize(
    "changes",
    [{}, {"compile": True}, {"lora_rank": 8}, {"lora_rank": 8, "quantize_base": "nf4"}, {"packing": False}],
    ids=["packed", "compiled", "lora", "qlora", "padded"],
)
def test_bfloat16_training_learns(checkpoint: Path, data: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    rate = 1e-2 if "lora_rank" in changes else 1e-3
    model = train(recipe(checkpoint, data, tmp_path / "run", compute_dtype="bfloat16", lr=rate, epochs=6, **changes))
    found = losses(tmp_path / "run")
    assert found[-1] < 0.6 * found[0]
    base = {"base": checkpoint} if "lora_rank" in changes else {}
    reply = llava.load(model, vision_tower=checkpoint.parent / "clip", **base).ask(data / "1.png", "Which colour?")
    assert isinstance(reply, str)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_same_losses_as_one(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    for n in (1, 2):
        chosen = recipe(checkpoint, data, tmp_path / f"run{n}")
        values = {key: value for key, value in json.loads(to_json(chosen)).items() if value is not None}
        file = tmp_path / f"{n}.toml"
        file.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()))
        run = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", "-m", "llava.cli"]
        subprocess.run([*run, "train", str(file)], check=True, timeout=200)
    assert losses(tmp_path / "run2") == pytest.approx(losses(tmp_path / "run1"), rel=1e-3)


def test_a_pinned_batch_has_its_segments_in_page_locked_memory(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    asked = recipe(checkpoint, data, tmp_path / "run", packing=True)
    batch = BatchDataset.open(asked, start(asked, tmp_path / "tokenizer"))[0].pin_memory()
    assert batch.segments
    assert batch.segments.cu_seqlens.is_pinned()
    assert batch.ids.is_pinned()
