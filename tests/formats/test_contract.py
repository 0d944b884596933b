"""What each format declares about itself is true: one test per declaration, run for every format that makes it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import llava
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.formats import FORMATS
from llava.formats.format import Checkpoint
from llava.tensors.shards import open_weights
from tests import expected, tiny
from tests.checkpoints import assert_same, opened, tensors_of

WRITTEN = [name for name, format in FORMATS.items() if format.writes]
WHOLE = [name for name, format in FORMATS.items() if format.reads and not format.needs_base]
PARTS = [name for name, format in FORMATS.items() if format.needs_base]
TWINS = ("llama", "meta", "internlm2")  # formats in which tiny writes the same language model
GPT_FAST_BLOCK = ("attention.wqkv", "attention.wo", "attention_norm", "feed_forward.w1", "feed_forward.w2",
                  "feed_forward.w3", "ffn_norm")  # fmt: skip


def source(name: str, folder: Path, clip: Path) -> Path:
    """A small checkpoint of this format; those that tiny does not write are converted from a LLaVA."""
    if name in tiny.WHOLE:
        return tiny.WHOLE[name](folder / name, clip)
    convert(tiny.write_llava(folder / "source", clip=clip), folder / name, to=name, check=False)
    return folder / name


def on_disk(folder: Path) -> dict[str, Tensor]:
    """The tensors that every reader needs, by their names on disk."""
    weights = open_weights(folder)
    return {name: weights[name] for name in weights if "inv_freq" not in name and "rope.freqs" not in name}


def test_every_format_is_readable_or_writable_and_has_a_small_checkpoint() -> None:
    for name, format in FORMATS.items():
        assert name == format.name
        assert format.reads or format.writes or name == "clip"
        assert not (format.writes and format.needs_base)
        assert format.rules()
    assert set(tiny.WHOLE) | set(WRITTEN) >= set(WHOLE)
    assert set(tiny.PARTS) == set(PARTS)


@pytest.mark.parametrize("name", WHOLE)
def test_a_readable_format_is_detected_and_loads_under_any_name(name: str, clip: Path, tmp_path: Path) -> None:
    folder = source(name, tmp_path / "mistral-mpt-lora-delta", clip)
    checkpoint = opened(folder)
    assert checkpoint.format == name
    assert checkpoint.evidence
    assistant = llava.load(folder, dtype="float32", device="cpu")
    assert assistant.generate("A boat", max_new_tokens=2).usage.completion_tokens <= 2


@pytest.mark.parametrize("name", [name for name in WHOLE if FORMATS[name].writes])
def test_reading_and_writing_gives_the_same_tensors(name: str, clip: Path, tmp_path: Path) -> None:
    folder = source(name, tmp_path, clip)
    convert(folder, tmp_path / "again", to=name, verify=True)
    before, after = opened(folder), opened(tmp_path / "again")
    assert before.config == after.config
    assert_same(tensors_of(before), tensors_of(after))
    names = on_disk(folder)
    assert FORMATS[name].exact
    assert_same(names, {key: value for key, value in on_disk(tmp_path / "again").items() if key in names})


@pytest.mark.parametrize("heads", [4, 2], ids=["all heads", "shared heads"])
@pytest.mark.parametrize("name", TWINS)
def test_formats_of_one_language_model_read_as_equal_tensors(name: str, heads: int, tmp_path: Path) -> None:
    write = {"llama": tiny.write_llama, "meta": tiny.write_meta, "internlm2": tiny.write_internlm2}[name]
    folder = write(tmp_path / name / "7B", num_key_value_heads=heads)  # type: ignore[operator]
    twin = opened(tiny.write_llama(tmp_path / "twin", num_key_value_heads=heads))
    found = opened(folder)
    assert_same(tensors_of(found), tensors_of(twin))
    assert found.config.decoder == twin.config.decoder
    for ours, tensor in found.tensors.items():  # some rows of a tensor, read alone, equal those of the whole
        assert torch.equal(tensor.rows(1, 7), tensor.read()[1:7]), ours


@pytest.mark.parametrize("name", PARTS)
def test_a_part_and_its_base_equal_the_whole(name: str, clip: Path, tmp_path: Path) -> None:
    base = tiny.write_llama(tmp_path / "base", seed=7, **tiny.LLAMA_1)
    part = tiny.PARTS[name](tmp_path / "part", clip)
    found = opened(part, base=base)
    assert found.format == name
    convert(part, tmp_path / "whole", LoadOptions(base=base), verify=True)
    whole = opened(tmp_path / "whole")
    assert_same({n: t.read().to(t.dtype) for n, t in found.tensors.items()}, tensors_of(whole))
    assert_close(tmp_path / "whole", expected_whole(name, part, base))
    changed = {n for n, t in found.tensors.items() if n.startswith("decoder.") and differs(n, t.read(), base)}
    assert bool(changed) == (not FORMATS[name].exact)  # a projector leaves the base as it is


def expected_whole(name: str, part: Path, base: Path) -> dict[str, Tensor]:
    """The model's tensors under their original names, computed without the package."""
    if name == "delta":
        return expected.summed(expected.stored(base), expected.stored(part))
    if name == "lora":
        return expected.merged(base, part, precise=True)
    projector = torch.load(part / "mm_projector.bin", weights_only=True)
    return expected.without_rotary(expected.stored(base)) | projector


def assert_close(whole: Path, tensors: dict[str, Tensor]) -> None:
    """Asserts equality up to one rounding to float16 or bfloat16."""
    convert(whole, whole.with_name("published"), to="llava")
    stored = expected.stored(whole.with_name("published"))
    found = {key: value for key, value in stored.items() if "vision_tower" not in key}
    assert set(found) == set(tensors)
    for key, value in tensors.items():
        torch.testing.assert_close(found[key].float(), value.float(), rtol=2**-7, atol=2**-12, msg=key)


def differs(name: str, tensor: Tensor, base: Path) -> bool:
    own = opened(base).tensors[name].read()
    return tensor.shape != own.shape or not torch.equal(tensor.to(own.dtype), own)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_without_its_base_is_refused(name: str, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(llava.CheckpointError, match="needs its base"):
        opened(tiny.PARTS[name](tmp_path / "part", clip))


def test_gpt_fast_has_the_names_shapes_and_row_order_that_its_loader_expects(tmp_path: Path) -> None:
    source = tiny.write_llama(tmp_path / "llama", num_key_value_heads=2)
    convert(source, tmp_path / "out", to="gpt-fast", verify=True)
    found = torch.load(tmp_path / "out" / "model.pth", mmap=True, weights_only=True)
    names = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    names |= {f"layers.{i}.{name}.weight" for i in range(2) for name in GPT_FAST_BLOCK}
    assert set(found) == names
    hub = {name: tensor.half() for name, tensor in tiny.llama_tensors(tiny.llama_config(num_key_value_heads=2), 1,
                                                                      inv_freq=False).items()}  # fmt: skip
    q, k, v = (hub[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    expected = torch.cat([tiny.interleaved(q, 16), tiny.interleaved(k, 16), v])
    assert torch.equal(found["layers.1.attention.wqkv.weight"], expected)
    assert torch.equal(found["layers.0.feed_forward.w2.weight"], hub["model.layers.0.mlp.down_proj.weight"])
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(("name", "reader"), [("gguf", "llama.cpp"), ("gpt-fast", "gpt-fast")])
def test_a_folder_in_a_format_that_is_only_written_says_who_reads_it(name: str, reader: str, tmp_path: Path) -> None:
    convert(tiny.write_llama(tmp_path / "llama"), tmp_path / "out", to=name)
    with pytest.raises(llava.CheckpointError, match=f"is an export for {reader} and cannot be loaded by llava"):
        opened(tmp_path / "out")


def test_gguf_rounds_to_float16_and_no_further(clip: Path, tmp_path: Path) -> None:
    """A format that is not exact stays within half a unit of the last of float16's 11 significant bits."""
    folder = tiny.write_llama(tmp_path / "llama", torch_dtype="float32")
    tensors = {name: tensor + 1e-5 * torch.randn_like(tensor) for name, tensor in on_disk(folder).items()}
    tiny.save(tensors, folder, "safetensors")
    convert(folder, tmp_path / "out", to="gguf", check=False)
    before = opened(folder)
    after = FORMATS["gguf"].read_back(tmp_path / "out", before)
    assert isinstance(after, Checkpoint)
    assert not FORMATS["gguf"].exact
    rounded = 0
    for name, tensor in before.read_tensors():
        error = (after.tensors[name].read().float() - tensor).abs()
        assert bool((error <= tensor.abs() * 2**-11 + np.finfo(np.float16).smallest_subnormal).all()), name
        rounded += int(error.any())
    assert rounded > 0


@pytest.mark.parametrize("name", WRITTEN)
def test_a_failed_conversion_leaves_nothing_behind(name: str, clip: Path, tmp_path: Path) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=clip, layout="safetensors")
    tensors = on_disk(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    tiny.save(tensors, folder, "safetensors")
    with pytest.raises(llava.CheckpointError, match="NaN"):
        convert(folder, tmp_path / "out", to=name)
    assert {path.name for path in tmp_path.iterdir()} == {"llava"}
