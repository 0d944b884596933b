"""llama.cpp opens our GGUF files with the same results. Needs `pip install 'llava-native[gguf,oracle-gguf]'`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava.checkpoint.load import build
from llava.checkpoint.open import open_checkpoint
from llava.convert.convert import convert
from tests import tiny
from tests.conftest import PROJECT

pytestmark = pytest.mark.oracle
llama_cpp = pytest.importorskip("llama_cpp")

TEXTS = ("Which colours do you see?\n  Two  spaces, 336 * 336 = 112896", " é ∆ <one>x", "<s>")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 2, "rope_theta": 1e6},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"tie_word_embeddings": True},
        {"torch_dtype": "bfloat16"},
        {"kind": "mpt"},
    ],
)
def test_logits_of_a_language_model_are_ours(tmp_path: Path, config: dict[str, Any]) -> None:
    mpt = config.get("kind") == "mpt"
    model = tiny.write_mpt(tmp_path / "m") if mpt else tiny.write_llama(tmp_path / "m", **config)
    convert(model, tmp_path / "out", to="gguf")
    (file,) = (tmp_path / "out").glob("model-*.gguf")
    theirs = llama_cpp.Llama(
        str(file), n_ctx=256, logits_all=True, type_k=0, type_v=0, n_threads=1, verbose=False, flash_attn=False
    )
    opened = open_checkpoint(model)
    ours = build(opened, dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(1, 101) * 7919 % opened.config.decoder.vocab_size
    with torch.inference_mode():
        logits = ours.decoder.logits(ours.decoder(ours.embed(ids)[None]))[0]
    theirs.eval(ids.tolist())
    found = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    assert (found - logits).norm() < 0.02 * logits.norm()  # llama.cpp rounds activations to 16 bits
    tokenizer = opened.tokenizer
    for text in TEXTS[: 1 if mpt else None]:
        expected = tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=tokenizer.bos_id is not None, special=True) == expected
    theirs.close()


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("oracle") / "figures.json"
    command = [sys.executable, str(PROJECT / "benchmarks" / "gguf_oracle.py"), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    figures: dict[str, Any] = json.loads(out.read_text())["figures"]
    return figures


def test_llava_tiny_generates_the_same_32_tokens(figures: dict[str, Any]) -> None:
    for case in figures["text"]:
        assert case["ids of the prompt are equal"], case
        assert case["equal tokens"] == case["of"] == 32, case
        assert case["largest difference of logits"] < min(case["smallest margin of ours"], 0.05), case


def test_llava_tiny_computes_the_same_features_of_a_picture(figures: dict[str, Any]) -> None:
    """Except for the class token, which llama.cpp since May 2025 appends to the patches (its issue 25814)."""
    for case in figures["pictures"]:
        apart = case["features differ, of their norm"]
        assert min(apart["prepared, from ours"], apart["prepared, from class last"]) < 2e-3, case
        if apart["prepared, from ours"] < 2e-3:
            assert case["equal"]["prepared"], case
