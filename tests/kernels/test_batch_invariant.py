"""The engine's batch-invariant mode with its kernels. tests/gpu/test_engine.py compares the bits in many batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llava
from llava.config import EngineOptions
from llava.engine.engine import Engine
from llava.engine.sampling_params import SamplingParams
from llava.kernels import invariant_attention, tiled_matmul
from tests import tiny

QUESTIONS = ("Hi", "What is it?", "Which colours do you see? Answer in a few words.")


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_the_engine_computes_with_the_kernels_what_it_computes_with_their_twins(
    device: torch.device, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without twins, a fallback would end in an error; without kernels, the results are the expected ones."""
    write = {"llama": tiny.write_llama, "mpt": tiny.write_mpt}[kind]
    vlm = llava.load(write(tmp_path / kind), device=str(device), dtype="float32")
    params = SamplingParams(max_new_tokens=3, logprobs=3, prompt_logprobs=1)

    def replies() -> list[tuple[list[int], list[float]]]:
        options = EngineOptions(batch_invariant=True, chunk_tokens=9, page_size=5)
        found = Engine(vlm.engine.variants, options).generate(list(QUESTIONS), params)
        return [(one.token_ids, [*(one.logprobs or ()), *(one.prompt_logprobs or ())]) for one in found]

    with monkeypatch.context() as patch:
        for module in (invariant_attention, tiled_matmul):
            patch.setattr(module, "can_run", lambda device: False)
        expected = replies()
    with monkeypatch.context() as patch:
        patch.delattr(invariant_attention, "eager_invariant_attention")
        patch.delattr(tiled_matmul, "eager_tiled_matmul")
        found = replies()
    for (ids, logprobs), (wanted_ids, wanted_logprobs) in zip(found, expected, strict=True):
        assert ids == wanted_ids
        assert logprobs == pytest.approx(wanted_logprobs, abs=1e-4)
