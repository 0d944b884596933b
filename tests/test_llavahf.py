"""llava-hf's layout: read as transformers reads it, and written so that transformers opens it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import llava
from llava.config import IMAGE

NAMES = ("single", "two_images", "multi_turn", "text_only")
LAYOUTS = ("old", "new")


@pytest.fixture(scope="module", params=LAYOUTS)
def assistant(golden_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> llava.Assistant:
    nonsense = tmp_path_factory.mktemp("hf") / "mistral-mpt-lora"
    nonsense.symlink_to((golden_checkpoints / "h_hf" / f"llava-1.5-7b-hf-{request.param}").resolve())
    return llava.load(nonsense, dtype="float32", device="cpu")


class Golden:
    def __init__(self, golden: Path, name: str):
        folder = golden / "h_hf" / "golden"
        record = json.loads((folder / "prompts.json").read_text())
        self.entry: dict[str, Any] = next(entry for entry in record["prompts"] if entry["id"] == name)
        self.vocab_ids = record["vocab_ids_of_logits_at_ids"]
        self.images = [golden / "images" / image for image in self.entry["images"]]
        self.tensors: dict[str, Tensor] = load_file(folder / f"{name}.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_ids_pixels_logits_and_answers_are_those_of_transformers(
    golden: Path, assistant: llava.Assistant, name: str
) -> None:
    case = Golden(golden, name)
    prompt, images = case.entry["prompt"], case.images
    input = assistant.prepare(prompt, images=images)
    assert [32000 if id == IMAGE else id for id in input.token_ids] == case.entry["input_ids"]
    if images:
        assert input.pixels is not None
        torch.testing.assert_close(input.pixels, case.tensors["pixel_values"], atol=1e-6, rtol=0)
        projected = torch.cat([part[None] for part in assistant.image_embeddings(prompt, images=images)])
        torch.testing.assert_close(projected, case.tensors["projector_output"], atol=5e-5, rtol=0)
    logits = assistant.logits(prompt, images=images)
    torch.testing.assert_close(logits[-1], case.tensors["logits_last"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[:, case.vocab_ids], case.tensors["logits_at_ids"], atol=1e-4, rtol=0)
    reply = assistant.generate(prompt, images=images, max_new_tokens=32, temperature=0)
    assert reply.token_ids == case.entry["generated_ids"]
    assert reply.text == case.entry["generated_text"]
