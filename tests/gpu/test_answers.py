"""Replies on a GPU equal those on the CPU. Run with `pytest -m gpu` on a machine with a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import llava
from llava.assistant import Assistant
from llava.config import EngineOptions
from llava.engine.sampling_params import SamplingParams
from llava.model.llava import Llava
from llava.preprocess.image import read_picture
from tests import tiny

LONG = "Look at the left side of the photo, then at the right one, and compare the two. " * 12  # beyond one window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu"),
]


@pytest.fixture(scope="module")
def cpu(checkpoint: Path) -> Assistant:
    return llava.load(checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def gpu(checkpoint: Path) -> Assistant:
    return llava.load(checkpoint, device="cuda", dtype="float32")


def conversation(picture: Path | None, text: str) -> list[dict[str, object]]:
    image = [{"type": "image", "image": read_picture(picture).image}] if picture else []
    return [{"role": "user", "content": [*image, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "picture.png"
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(path)
    return path


def test_logits_equal_those_of_the_cpu_in_float32(cpu: Assistant, gpu: Assistant, picture: Path) -> None:
    messages = conversation(picture, "What is in the picture?")
    torch.testing.assert_close(gpu.logits(messages).cpu(), cpu.logits(messages), atol=1e-4, rtol=1e-4)


def test_greedy_answers_equal_those_of_the_cpu_in_float32(cpu: Assistant, gpu: Assistant, picture: Path) -> None:
    requests = [conversation(picture, "What is in the picture?"), conversation(None, "Name the colours."), "Once upon"]
    expected = [reply.token_ids for reply in cpu.generate_batch(requests, max_new_tokens=24)]
    assert [reply.token_ids for reply in gpu.generate_batch(requests, max_new_tokens=24)] == expected
    assert [gpu.generate(request, max_new_tokens=24).token_ids for request in requests] == expected


def test_auto_selects_the_gpu_and_the_checkpoints_dtype(checkpoint: Path) -> None:
    assistant = llava.load(checkpoint)
    assert (assistant.device.type, assistant.dtype) == ("cuda", torch.float16)
    assert assistant.generate("Once upon a time", max_new_tokens=4).usage.completion_tokens <= 4


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("bfloat16", 0.15)])
def test_sixteen_bits_stay_near_float32(
    checkpoint: Path, cpu: Assistant, picture: Path, dtype: str, tolerance: float
) -> None:
    messages = conversation(picture, "What is in the picture?")
    expected = cpu.logits(messages)
    found = llava.load(checkpoint, device="cuda:0", dtype=dtype).logits(messages).cpu()
    assert (found - expected).norm() / expected.norm() < tolerance


def test_a_seed_makes_sampling_reproducible(gpu: Assistant) -> None:
    first, second, other = (
        gpu.generate("Once upon a time", max_new_tokens=16, temperature=1.0, top_p=0.9, seed=seed).token_ids
        for seed in (3, 3, 4)
    )
    assert first == second != other


@pytest.mark.parametrize(
    "options", [EngineOptions(chunk_tokens=24), EngineOptions(page_size=5), EngineOptions(max_batch=2)]
)
def test_chunks_pages_and_waiting_change_nothing(
    cpu: Assistant, gpu: Assistant, picture: Path, options: EngineOptions
) -> None:
    requests = [conversation(picture, "What is it?"), "Once upon a time there was", conversation(None, LONG), "Hello"]
    expected = [cpu.generate(request, max_new_tokens=16).token_ids for request in requests]
    engine = Assistant(gpu.model, gpu.preprocessor, options=options).engine
    for _ in range(2):  # the second time, from the prefix cache
        replies = engine.generate(requests, SamplingParams(max_new_tokens=16))
        assert [reply.token_ids for reply in replies] == expected
    engine.check()


def test_an_mpt_answers_alone_and_in_a_batch_as_on_the_cpu(clip: Path, picture: Path, tmp_path: Path) -> None:
    mpt = tiny.write_mpt(tmp_path / "mpt", clip=clip)
    on_gpu, on_cpu = (llava.load(mpt, device=device, dtype="float32") for device in ("cuda", "cpu"))
    requests = [conversation(picture, "What is it?"), "Once upon a time there was", conversation(None, LONG)]
    expected = [on_cpu.generate(request, max_new_tokens=16).token_ids for request in requests]
    assert [on_gpu.generate(request, max_new_tokens=16).token_ids for request in requests] == expected
    assert [reply.token_ids for reply in on_gpu.generate_batch(requests, max_new_tokens=16)] == expected


def test_an_mpt_in_bfloat16_stays_near_float32(clip: Path, picture: Path, tmp_path: Path) -> None:
    mpt = tiny.write_mpt(tmp_path / "mpt", clip=clip)
    messages = conversation(picture, "What is in the picture?")
    expected = llava.load(mpt, device="cpu", dtype="float32").logits(messages)
    found = llava.load(mpt, device="cuda", dtype="bfloat16").logits(messages).cpu()
    assert (found - expected).norm() / expected.norm() < 0.05


def run(model: Llava, ids: Tensor) -> Tensor:
    """ids [1, S] -> logits [1, S, V]"""
    return model.decoder.logits(model.decoder(model.decoder.lookup(ids)))


def logits_of(model: Llava, run: Callable[..., Tensor]) -> Tensor:
    """Logits [1, 5, V] on the CPU."""
    with torch.inference_mode():
        return run(model, torch.tensor([[1, 40, 50, 60, 70]], device=model.device)).cpu()


def test_adapters_switch_in_eager_and_in_compiled_forward_passes(clip: Path, picture: Path, tmp_path: Path) -> None:
    """Compares bfloat16 with merged float32 weights. A wrong adapter would be off by as much as two adapters differ."""
    base = tiny.write_llama(tmp_path / "base")
    folders = {
        name: tiny.write_lora(tmp_path / name, clip=clip, seed=seed) for name, seed in (("cats", 3), ("dogs", 5))
    }
    vlm = llava.load(base, adapters=folders, device="cuda", dtype="bfloat16")
    merged = {name: llava.load(folder, base=base, device="cpu", dtype="float32") for name, folder in folders.items()}
    alone: dict[str | None, Assistant] = {**merged, None: llava.load(base, device="cpu", dtype="float32")}
    expected = {name: logits_of(one.model, run) for name, one in alone.items()}
    compiled = torch.compile(run, dynamic=True)
    for name in ("cats", "dogs", None, "cats", None, "dogs"):
        vlm.adapter(name)
        for steps in (run, compiled):
            logits = logits_of(vlm.model, steps)
            apart = {other: float((logits - wanted).norm() / wanted.norm()) for other, wanted in expected.items()}
            assert apart.pop(name) < 0.1 < 0.2 < min(apart.values()), (name, apart)
    messages = conversation(picture, "What is in the picture?")
    for name, one in merged.items():
        vlm.adapter(name)
        assert vlm.device.type == "cuda"
        wanted = one.logits(messages)
        assert (vlm.logits(messages).cpu() - wanted).norm() / wanted.norm() < 0.15


def test_switching_adapters_allocates_no_memory(clip: Path, tmp_path: Path) -> None:
    base = tiny.write_llama(tmp_path / "base")
    folders = {
        name: tiny.write_lora(tmp_path / name, clip=clip, seed=seed) for name, seed in (("cats", 3), ("dogs", 5))
    }
    vlm = llava.load(base, adapters=folders, device="cuda", dtype="bfloat16")
    held = torch.cuda.memory_allocated()
    models = {}
    for name in ("cats", "dogs", None, "cats"):
        vlm.adapter(name)
        assert models.setdefault(name, vlm.model) is vlm.model
    assert torch.cuda.memory_allocated() == held
    weights = {name: model.state_dict() for name, model in models.items()}
    assert weights[None]["decoder.blocks.0.attn.qkv.weight"].data_ptr() == (
        weights["cats"]["decoder.blocks.0.attn.qkv.base.weight"].data_ptr()
    )


def test_adapters_answer_in_one_batch_as_alone(clip: Path, tmp_path: Path) -> None:
    base = tiny.write_llama(tmp_path / "base")
    folders = {
        name: tiny.write_lora(tmp_path / name, clip=clip, seed=seed) for name, seed in (("cats", 3), ("dogs", 5))
    }
    vlm = llava.load(base, adapters=folders, device="cuda", dtype="float32")
    names = ("cats", "dogs", None, "cats")
    alone = []
    for name in names:
        vlm.adapter(name)
        alone.append(vlm.generate("Once upon a time", max_new_tokens=16).token_ids)
    params = SamplingParams(max_new_tokens=16)
    together = {vlm.engine.add_request("Once upon a time", params, adapter=name): [] for name in names}
    while vlm.engine.has_requests:
        for output in vlm.engine.step():
            together[output.request] += output.token_ids
    assert list(together.values()) == alone
    assert len(set(map(tuple, alone))) == 3
