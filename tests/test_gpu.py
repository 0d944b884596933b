"""The same answers on a GPU. Run with `pytest -m gpu` on a machine that has one."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import llava
from llava.assistant import Assistant
from llava.engine.engine import Engine
from llava.preprocess.image import open_picture

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
    image = [{"type": "image", "image": open_picture(picture)}] if picture else []
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


def test_auto_takes_the_gpu_and_the_checkpoints_own_type(checkpoint: Path) -> None:
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


def test_a_seed_gives_the_same_sample_again(gpu: Assistant) -> None:
    first, second, other = (
        gpu.generate("Once upon a time", max_new_tokens=16, temperature=1.0, top_p=0.9, seed=seed).token_ids
        for seed in (3, 3, 4)
    )
    assert first == second != other


def test_compiled_steps_equal_eager_ones(gpu: Assistant, picture: Path) -> None:
    compiled = Assistant(gpu.model, gpu.preprocessor)
    compiled.engine = Engine(gpu.model, gpu.preprocessor.tokenizer, compile=True)
    for messages in (conversation(picture, "What is in the picture?"), "Once upon a time there was"):
        expected = gpu.generate(messages, max_new_tokens=16).token_ids
        assert compiled.generate(messages, max_new_tokens=16).token_ids == expected
