"""Deltas: reading them on their base, and writing them."""

from pathlib import Path

import pytest
import torch

from llava.checkpoint.inspect import describe
from llava.convert.split import make_delta
from tests import tiny
from tests.checkpoints import opened, refused, tensors_of

TOKENS = ("<im_start>", "<im_end>")


def test_a_delta_on_its_base_is_the_sum_in_float16(clip: Path, tmp_path: Path) -> None:
    under = tiny.write_llama(tmp_path / "llama", seed=7)
    folder = tiny.write_delta(tmp_path / "delta", clip=clip, added=TOKENS)
    found = opened(folder, base=under)
    delta, own = tiny.torch.load(folder / "pytorch_model-00001-of-00003.bin"), opened(under).tensors
    table = found.tensors["decoder.embed.weight"].read()
    assert table.dtype == torch.float16
    assert torch.equal(
        table[: tiny.PIECES], delta["model.embed_tokens.weight"][: tiny.PIECES] + own["decoder.embed.weight"].read()
    )
    assert torch.equal(table[tiny.PIECES :], delta["model.embed_tokens.weight"][tiny.PIECES :])
    model = opened(tiny.write_llava(tmp_path / "model", clip=clip, added=TOKENS))
    for name, tensor in tensors_of(model).items():
        torch.testing.assert_close(found.tensors[name].read(), tensor, rtol=0, atol=2e-3)


def test_a_delta_without_its_base_reports_its_final_template(clip: Path, tmp_path: Path) -> None:
    base = tiny.write_llama(tmp_path / "base", seed=7, **tiny.LLAMA_1)
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, added=("[PAD]", "<im_patch>"), **tiny.LLAMA_1)
    tiny.write_tokenizer(delta, added=("[PAD]", "<im_patch>"), pad="[PAD]")
    assert describe(delta).template == opened(delta, base=base).template.template == "llava_v0"


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
def test_a_delta_written_gives_the_model_back_on_its_base(clip: Path, tmp_path: Path, kind: str) -> None:
    under = tiny.write_llama(tmp_path / "llama", seed=7)
    merged = tiny.write_llava(tmp_path / "model", clip=clip, added=TOKENS, mm_projector_type=kind)
    make_delta(merged, under, tmp_path / "delta", file_type="bin")
    assert describe(tmp_path / "delta").kind == "delta"
    found, model = opened(tmp_path / "delta", base=under), opened(merged)
    assert found.config == model.config
    for name, tensor in tensors_of(model).items():
        # one float16 rounding of a difference below 4
        torch.testing.assert_close(found.tensors[name].read(), tensor, rtol=0, atol=2e-3)
    assert torch.equal(
        found.tensors["decoder.embed.weight"].read()[-2:], model.tensors["decoder.embed.weight"].read()[-2:]
    )
    other = tiny.write_llama(tmp_path / "other", num_hidden_layers=1)
    assert "none" in refused(tmp_path / "delta", base=other)
