"""Projectors: folders, single files like the oldest published ones, and writing them."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import llava
from llava.assistant import question_about
from llava.checkpoint.inspect import Scan, describe, scan
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.convert.split import extract_projector
from llava.formats.projector import write_projector
from tests import tiny
from tests.checkpoints import assert_same, opened, refused, tensors_of

FLOAT32: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
ROWS = tiny.tensor(1, "start_end", (2, 64), 0.6).float()
TOKENS = ("<im_start>", "<im_end>")


def projector(kind: str = "linear", prefix: str = "model.", rows: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a published file, in float32."""
    made = tiny.projector_tensors(tiny.llava_config(mm_projector_type=kind), 1)
    named = {name.replace("model.", prefix, 1): tensor.float() for name, tensor in made.items()}
    return named | ({} if rows is None else {prefix + "embed_tokens.weight": rows})


def written(file: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, file)
    return file


def test_a_projector_on_its_language_model_is_the_merged_model(
    clip: Path, base: Path, checkpoint: Path, tmp_path: Path
) -> None:
    found = opened(tiny.write_projector(tmp_path / "projector", clip=clip), base=base)
    assert found.format == "projector"
    assert found.config.template == "plain"
    assert_same(tensors_of(found), tensors_of(opened(checkpoint)))


@pytest.mark.parametrize("prefix", ["", "base_model.model.model.", "model.vision_model."])
def test_the_prefix_of_a_projectors_names_does_not_matter(
    clip: Path, base: Path, checkpoint: Path, tmp_path: Path, prefix: str
) -> None:
    folder = tiny.write_projector(tmp_path / "projector", clip=clip, prefix=prefix)
    assert_same(tensors_of(opened(folder, base=base)), tensors_of(opened(checkpoint)))


def test_rows_of_the_start_and_end_tokens_come_with_the_projector(clip: Path, base: Path, tmp_path: Path) -> None:
    folder = tiny.write_projector(tmp_path / "projector", clip=clip, start_end=True)
    found, under = opened(folder, base=base), opened(base)
    assert found.config.start_end
    assert found.config.decoder.vocab_size == tiny.PIECES + 2
    table, head = found.tensors["decoder.embed.weight"].read(), found.tensors["decoder.head.weight"].read()
    assert torch.equal(table[: tiny.PIECES], under.tensors["decoder.embed.weight"].read())
    assert torch.equal(table[tiny.PIECES :], tiny.tensor(1, "start_end", (2, 64), 0.6))
    mean = under.tensors["decoder.head.weight"].read().double().mean(0)
    torch.testing.assert_close(head[tiny.PIECES :].double(), mean.expand(2, -1), rtol=1e-3, atol=1e-4)
    assert llava.load(folder, base=base).ask(None, "Hello", max_new_tokens=2)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model.", "module.model."])
def test_a_single_file_equals_a_folder_with_a_config(
    clip: Path, base: Path, tmp_path: Path, kind: str, prefix: str
) -> None:
    file = written(tmp_path / "x.bin", projector(kind, prefix))
    folder = tiny.write_projector(tmp_path / "folder", clip=clip, mm_projector_type=kind, image_aspect_ratio="square")
    found, expected = opened(file, base=base, vision_tower=clip), opened(folder, base=base)
    assert found.config == expected.config
    assert found.template.template == "plain"
    for name, source in expected.tensors.items():
        assert torch.equal(found.tensors[name].read().to(source.dtype), source.read()), name


@pytest.mark.parametrize("rows", [ROWS, torch.cat([torch.ones(tiny.PIECES + 1, 64), ROWS])], ids=["two", "all"])
@pytest.mark.parametrize("alone", [True, False], ids=["file", "folder"])
def test_rows_of_start_and_end_bring_their_tokens(
    clip: Path, base: Path, tmp_path: Path, rows: Tensor, alone: bool
) -> None:
    if alone:
        path = written(tmp_path / "x.bin", projector(rows=rows))
    else:
        path = tiny.write_projector(
            tmp_path / "x", clip=clip, mm_projector_type="linear"
        )  # a config without these tokens
        written(path / "mm_projector.bin", projector(rows=rows))
    found = opened(path, base=base, vision_tower=clip)
    assert found.config.start_end
    assert found.config.decoder.vocab_size == tiny.PIECES + 2
    assert [found.tokenizer.id_of(text) for text in ("<im_start>", "<im_end>")] == [tiny.PIECES, tiny.PIECES + 1]
    assert torch.equal(found.tensors["decoder.embed.weight"].read()[tiny.PIECES :].float(), ROWS)
    picture = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(picture)
    vlm = llava.load(path, base=base, vision_tower=clip, template="llava_v1", **FLOAT32)
    input = vlm.prepare(question_about(picture, "What?"))
    at = input.token_ids.index(-200)
    assert (input.token_ids[at - 1], input.token_ids[at + 1]) == (tiny.PIECES, tiny.PIECES + 1)
    assert vlm.generate(question_about(picture, "What?"), max_new_tokens=3).token_ids


def test_a_base_that_has_the_tokens_keeps_its_tokenizer(clip: Path, tmp_path: Path) -> None:
    added = ("<im_patch>", "<im_start>", "<im_end>")
    base = tiny.write_llama(tmp_path / "base", vocab_size=tiny.PIECES + 3)
    tiny.write_tokenizer(base, added=added)
    found = opened(written(tmp_path / "x.bin", projector(rows=ROWS)), base=base, vision_tower=clip)
    assert not found.new_tokens
    assert found.config.decoder.vocab_size == tiny.PIECES + 3
    assert torch.equal(found.tensors["decoder.embed.weight"].read()[tiny.PIECES + 1 :].float(), ROWS)


def test_without_rows_there_are_no_tokens(clip: Path, base: Path, tmp_path: Path) -> None:
    found = opened(written(tmp_path / "x.bin", projector()), base=base, vision_tower=clip)
    assert (found.config.start_end, found.config.decoder.vocab_size) == (False, tiny.PIECES)
    assert found.tokenizer.id_of("<im_start>") is None


def test_rows_are_added_to_an_mpt_too(clip: Path, tmp_path: Path) -> None:
    base = tiny.write_mpt(tmp_path / "base")  # its tokenizer already has the tokens
    tensors = projector() | {"transformer.wte.weight": ROWS}
    found = opened(written(tmp_path / "x.bin", tensors), base=base, vision_tower=clip)
    start = found.tokenizer.id_of("<im_start>")
    assert start is not None
    assert torch.equal(found.tensors["decoder.embed.weight"].read()[start : start + 2].float(), ROWS.bfloat16().float())


def test_the_tower_is_inferred_from_the_width_with_a_warning(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = {"model.mm_projector.weight": torch.zeros(64, 1024), "model.mm_projector.bias": torch.zeros(64)}
    found = open_checkpoint(written(tmp_path / "x.bin", wide), LoadOptions(base=base, fetch_tower=False))
    assert found.config.vision is not None
    assert (found.vision_tower, found.config.vision.image_size) == ("openai/clip-vit-large-patch14", 224)
    assert found.config.vision.select_layer == -2
    assert "vision_tower= (--vision-tower) selects another tower" in caplog.text
    narrow = written(tmp_path / "y.bin", projector())
    assert "vision_tower= (--vision-tower)" in refused(narrow, base=base)


def test_a_config_beside_the_file_counts(clip: Path, base: Path, tmp_path: Path) -> None:
    folder = tiny.write_projector(tmp_path / "folder", clip=clip)
    assert opened(folder / "mm_projector.bin", base=base).config == opened(folder, base=base).config


def test_a_file_loads_on_a_native_and_on_a_llava_base(clip: Path, base: Path, checkpoint: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "x.bin", projector(rows=ROWS))
    convert(base, tmp_path / "native")
    expected = opened(file, base=base, vision_tower=clip)
    for other in (tmp_path / "native", checkpoint):
        assert opened(file, base=other, vision_tower=clip).config == expected.config


def test_a_projector_on_its_base_converts_to_native(clip: Path, base: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "x.bin", projector(rows=ROWS))
    convert(file, tmp_path / "native", LoadOptions(base=base, vision_tower=clip))
    expected, found = opened(file, base=base, vision_tower=clip), opened(tmp_path / "native")
    assert found.config == expected.config
    assert found.tokenizer.id_of("<im_start>") == tiny.PIECES


def test_a_lone_file_becomes_a_folder_by_way_of_a_whole_model(clip: Path, base: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "x.bin", projector(rows=ROWS))
    with pytest.raises(llava.LlavaError, match=r"llava convert .*x\.bin OUT --to llava --base "):
        extract_projector(file, tmp_path / "folder", LoadOptions(base=base, vision_tower=clip))
    convert(file, tmp_path / "whole", LoadOptions(base=base, vision_tower=clip), to="llava")
    extract_projector(tmp_path / "whole", tmp_path / "folder")
    found = torch.load(tmp_path / "folder" / "mm_projector.bin", weights_only=True)
    assert found.keys() == projector(rows=ROWS).keys()
    for name, tensor in projector(rows=ROWS).items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=0, atol=0)


def test_a_file_that_does_not_fit_is_refused_in_one_line(clip: Path, base: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "x.bin", projector())
    assert "needs its base" in refused(file)
    assert describe(file).kind == "projector"
    assert describe(file, LoadOptions(base=str(base), vision_tower=clip)).missing == []
    assert scan(file, progress=lambda done, total: None) == Scan()
    assert "only projectors can be loaded" in refused(written(tmp_path / "y.bin", {"model.norm.weight": torch.ones(4)}))
    assert "pass the base model" in refused(
        written(tmp_path / "z.bin", projector(rows=torch.ones(2, 32))), base=base, vision_tower=clip
    )
    assert "is a file" in refused(file, base=file)
    (tmp_path / "w.bin").write_bytes(b"no tensors")
    assert "w.bin" in refused(tmp_path / "w.bin", base=base)


def test_only_the_named_file_of_a_repository_is_downloaded(
    clip: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads the cache of huggingface_hub as a download leaves it."""
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--projectors"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    written(cached / "snapshots" / commit / "old.bin", projector())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    found = opened("someone/projectors#old.bin", base=base, vision_tower=clip)
    assert found.path.name == "old.bin"
    assert "has no file other.bin" in refused("someone/projectors#other.bin", base=base)
    shutil.rmtree(cached)
    assert "cannot be downloaded" in refused("someone/projectors#old.bin", base=base)


@pytest.mark.parametrize("shape", [(), (64,), (64, 8, 8)])
def test_a_lone_layer_that_is_no_matrix_is_refused(
    clip: Path, base: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    file = written(tmp_path / "x.bin", {"model.mm_projector.weight": torch.zeros(shape)})
    assert "must be a matrix" in refused(file, base=base, vision_tower=clip)


def test_a_tower_given_as_a_relative_path_is_recorded_so_that_it_holds_elsewhere(
    clip: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "x.bin", projector())
    monkeypatch.chdir(clip.parent)
    convert(file, tmp_path / "out", LoadOptions(base=base, vision_tower=clip.name), to="llava")
    monkeypatch.chdir(tmp_path)
    assert opened("out").vision_tower == str(clip)


def test_a_tuned_tower_of_published_sizes_is_copied_with_its_projector(
    clip: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny.write_llava(tmp_path / "whole", clip=clip, tower_seed=9)
    monkeypatch.setattr("llava.formats.llava.published_id", lambda settings: "openai/clip-vit-large-patch14-336")
    extract_projector(whole, tmp_path / "out")
    found, source = opened(tmp_path / "out", base=base), opened(whole)
    tower = [name for name in source.tensors if name.startswith("vision.")]
    assert tower
    assert all(torch.equal(found.tensors[name].read(), source.tensors[name].read()) for name in tower)


def test_a_projector_written_opens_on_its_base(clip: Path, base: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = opened(checkpoint)
    tensors = tensors_of(model)
    write_projector(tmp_path / "out", model.config, tensors, vision_tower=str(clip), base="lmsys/vicuna-7b-v1.5")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "mm_projector.bin"]
    assert "lmsys/vicuna-7b-v1.5" in refused(tmp_path / "out")
    found = opened(tmp_path / "out", base=base)
    assert found.config == model.config
    assert_same(tensors_of(found), tensors)


def test_start_and_end_rows_are_written_beside_the_projector(clip: Path, base: Path, tmp_path: Path) -> None:
    whole = tiny.write_llava(tmp_path / "model", clip=clip, added=TOKENS, mm_use_im_start_end=True)
    model = opened(whole)
    rows = torch.randn(2, 64).half()
    options: dict[str, Any] = {"vision_tower": str(clip), "base": "a/b", "start_end": rows}
    with pytest.raises(llava.LlavaError, match="tokenizer_from="):
        write_projector(tmp_path / "out", model.config, tensors_of(model), **options)
    write_projector(tmp_path / "out", model.config, tensors_of(model), tokenizer_from=whole, **options)
    found = opened(tmp_path / "out", base=base)
    assert found.config == model.config
    assert torch.equal(found.tensors["decoder.embed.weight"].read()[-2:], rows)
