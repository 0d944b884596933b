"""Language models in Meta's own format: loaded, converted, and as the base of a LLaVA."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llava
from llava.checkpoint.consistency import check_headers
from llava.checkpoint.inspect import describe
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.errors import CheckpointError, LlavaError
from tests import tiny

TEXT = "Which colours do you see?"


def read(folder: Path, **options: object) -> dict[str, Tensor]:
    return dict(open_checkpoint(folder, LoadOptions(**options)).read_tensors())  # type: ignore[arg-type]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("heads", [4, 2])
def test_shards_are_joined_to_the_bits_of_the_hub_form(tmp_path: Path, shards: int, heads: int) -> None:
    shards = min(shards, heads)
    hub = tiny.write_llama(tmp_path / "hub", num_key_value_heads=heads)
    meta = tiny.write_meta(tmp_path / "models" / "mistral-lora", shards=shards, num_key_value_heads=heads)
    opened = open_checkpoint(meta)
    assert opened.format == "meta"
    assert opened.config.decoder == open_checkpoint(hub).config.decoder
    assert all(name.endswith("/rope.freqs") for name in opened.unused_names)
    assert_same(read(hub), read(meta))


def test_pieces_and_rows_are_parts_of_the_whole(tmp_path: Path) -> None:
    for ours, source in open_checkpoint(tiny.write_meta(tmp_path / "m" / "a")).tensors.items():
        whole = source.read()
        assert torch.equal(torch.cat(list(source.chunks())), whole), ours
        for start, stop in ((0, 1), (3, 29), (15, 17), (17, len(whole))):
            assert torch.equal(source.rows(start, stop), whole[start:stop]), ours


def test_columns_are_joined_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.tensors.lazy.CHUNK_BYTES", 1000)
    table = open_checkpoint(tiny.write_meta(tmp_path / "m" / "a")).tensors["decoder.embed.weight"]
    pieces = list(table.chunks())
    assert {len(piece) for piece in pieces} == {7, 1}  # 128 bytes per row
    assert torch.equal(torch.cat(pieces), table.read())


def test_it_answers_as_the_hub_form(tmp_path: Path) -> None:
    hub, meta = tiny.write_llama(tmp_path / "hub"), tiny.write_meta(tmp_path / "m" / "13B")
    logits = [
        llava.load(folder, vision=False, device="cpu", dtype="float32", template="vicuna_v1").logits(TEXT)
        for folder in (hub, meta)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("to", ["llama", "native"])
def test_it_converts_with_equal_logits(tmp_path: Path, to: str) -> None:
    meta = tiny.write_meta(tmp_path / "m" / "7B", shards=2)
    convert(meta, tmp_path / "out", to=to, verify=True, check=True)
    assert_same(read(tmp_path / "out"), read(meta))
    assert "rope.freqs" in (tmp_path / "out" / "conversion.md").read_text()


def test_a_delta_gives_the_same_bits_on_either_form_of_its_base(tmp_path: Path, clip: Path) -> None:
    hub, meta = tiny.write_llama(tmp_path / "hub", seed=7), tiny.write_meta(tmp_path / "m" / "7B", seed=7)
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, base_seed=7, added=("<im_start>", "<im_end>"))
    assert_same(read(delta, base=hub), read(delta, base=meta))


def test_a_lora_without_a_config_of_its_own_takes_that_of_a_base_in_this_format(tmp_path: Path, clip: Path) -> None:
    hub, meta = tiny.write_llama(tmp_path / "hub"), tiny.write_meta(tmp_path / "m" / "7B")
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    (lora / "config.json").unlink()
    (lora / "non_lora_trainables.bin").unlink()
    assert_same(read(lora, base=hub, vision=False), read(lora, base=meta, vision=False))


@pytest.mark.parametrize(
    ("config", "params", "positions"),
    [
        ({"rms_norm_eps": 1e-6}, {}, 2048),  # LLaMA-1
        ({"rms_norm_eps": 1e-5}, {}, 4096),  # Llama 2
        ({"rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}, {}, 4096),  # Llama 2's first files
        ({"rms_norm_eps": 1e-6, "num_key_value_heads": 2}, {}, 4096),  # Llama 2 70B
        ({"rms_norm_eps": 1e-6}, {"max_seq_len": 512}, 512),
    ],
)
def test_the_context_length_follows_from_the_files(
    tmp_path: Path, config: dict[str, object], params: dict[str, object], positions: int
) -> None:
    decoder = open_checkpoint(tiny.write_meta(tmp_path / "m" / "a", params=params, **config)).config.decoder
    assert (decoder.max_seq, decoder.eps) == (positions, config["rms_norm_eps"])


def test_inspect_tells_what_it_is(tmp_path: Path) -> None:
    found = describe(tiny.write_meta(tmp_path / "m" / "a"))
    assert (found.kind, found.missing, found.context) == ("meta", [], 4096)
    assert "2 shards" in found.evidence[0]


@pytest.mark.parametrize("key", ["dim", "n_heads", "n_layers", "norm_eps", "n_kv_heads", "rope_theta", "max_seq_len"])
@pytest.mark.parametrize("value", [0, -1, 3, 1e30, "many", None, [1], float("nan")])
def test_a_wrong_value_in_params_loads_or_is_an_error_of_ours(tmp_path: Path, key: str, value: object) -> None:
    folder = tiny.write_meta(tmp_path / "m" / "a", params={key: value})
    with suppress(LlavaError):
        check_headers(open_checkpoint(folder))


def test_an_incomplete_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    def said(folder: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    first = tiny.write_meta(tmp_path / "a" / "m", shards=4)
    (first / "consolidated.03.pth").unlink()
    assert "download the missing shards" in said(first)
    (first / "consolidated.01.pth").unlink()
    assert "consolidated.01.pth: is missing" in said(first)
    other = tiny.write_meta(tmp_path / "e" / "m")
    torch.save(
        torch.load(other / "consolidated.01.pth") | {"norm.weight": torch.ones(65)}, other / "consolidated.01.pth"
    )
    assert "not shards of one model" in said(other)
    bare = tiny.write_meta(tmp_path / "b" / "m")
    params = json.loads((bare / "params.json").read_text())
    tiny.write_json(bare / "params.json", {key: value for key, value in params.items() if key != "n_heads"})
    assert "params.json" in said(bare)
    (bare / "params.json").unlink()
    assert "params.json: is missing" in said(bare)
    mixed = tiny.write_meta(tmp_path / "c" / "m")
    torch.save({"norm.weight": torch.ones(64)}, mixed / "consolidated.01.pth")
    assert "has no tok_embeddings.weight, but other shards do" in said(mixed)
    alone = tiny.write_meta(tmp_path / "d" / "m")
    (alone.parent / "tokenizer.model").unlink()
    assert "no tokenizer.model" in said(alone)
