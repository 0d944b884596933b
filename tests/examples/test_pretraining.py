"""Small runs of llava-tiny's pretraining scripts: scenes match their labels, both parts learn, and the folders open."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import llava
from examples.tiny import language, tower
from examples.tiny.compose import BACKGROUND, UNCLEAR, Composer, Scenes
from examples.tiny.glyphs import Glyphs
from examples.tiny.pretrain import Budget
from examples.tiny.sprites import WEIGHTS, Sprites, load_sprites
from llava.checkpoint.open import open_checkpoint
from llava.config import DecoderConfig, VisionConfig
from llava.errors import CheckpointError, ConfigError
from llava.formats.clip import MEAN, STD
from llava.formats.tokenizer import load_tokenizer
from tests import tiny

NAMES = ("red square", "green disc", "blue bar", "yellow cross")
COLORS = ((220, 30, 30), (30, 160, 60), (40, 80, 220), (230, 200, 40))
SMALL = VisionConfig(dim=64, n_layers=3, n_heads=2, mlp_dim=128, image_size=64, patch_size=16)


def draw_glyph(i: int, edge: int) -> Image.Image:
    image = Image.new("RGBA", (112, 112))
    pen, color = ImageDraw.Draw(image), (*COLORS[i], 255)
    shapes: list[Any] = [
        lambda: pen.rectangle((4, 4, 107, 107), color, (0, 0, 0, 255), edge),
        lambda: pen.ellipse((4, 4, 107, 107), color, (0, 0, 0, 255), edge),
        lambda: pen.rectangle((4, 36, 107, 76), color, (0, 0, 0, 255), edge),
        lambda: (pen.rectangle((40, 4, 72, 107), color), pen.rectangle((4, 40, 107, 72), color)),
    ]
    shapes[i]()
    return image


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four glyphs by two artists, one of whom draws outlines."""
    folder = tmp_path_factory.mktemp("pack")
    index = [{"code": f"{i:x}", "name": name, "group": "Shapes", "subgroup": "plain"} for i, name in enumerate(NAMES)]
    (folder / "index.json").write_text(json.dumps(index))
    for style, edge in (("bare", 0), ("lined", 6)):
        (folder / style).mkdir()
        for i in range(len(NAMES)):
            draw_glyph(i, edge).save(folder / style / f"{i:x}.png")
    return folder


@pytest.fixture(scope="module")
def sprites(pack: Path) -> Sprites:
    glyphs = Glyphs.load(pack)
    return load_sprites(glyphs, glyphs.styles, ["STOP", "7"], torch.device("cpu"))


def bytes_of(scenes: Scenes) -> torch.Tensor:
    """The images as uint8 [B, 3, S, S]."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((scenes.images * std + mean) * 255).round().to(torch.uint8)


def test_every_glyph_has_all_variants_and_every_word_all_fonts(sprites: Sprites) -> None:
    assert sprites.names == [*NAMES, "the word STOP", "the word 7"]
    pictures = torch.arange(2 * 4 + 2 * 5)
    starts = torch.cat([sprites.starts(pictures[:8], torch.tensor(v)) for v in range(len(WEIGHTS))])
    words = sprites.starts(pictures[8:], torch.tensor(3))  # the variant does not matter
    found = torch.cat([starts, words]).sort().values
    assert found.diff().unique().numel() == 1
    assert found[0] == 0
    assert found[-1] + found.diff()[0] == len(sprites.pixels)


def test_patches_are_labelled_with_what_they_show(pack: Path) -> None:
    glyphs = Glyphs.load(pack)
    plain = load_sprites(glyphs, ["bare"], [], torch.device("cpu"), plain=True)
    scenes = Composer(plain, size=160, patch=16, max_objects=3, seed=3, augment=False).draw(20)
    means = F.avg_pool2d(bytes_of(scenes).float(), 16).flatten(2).transpose(1, 2)  # [B, P, 3]
    full = scenes.labels >= 0
    nearest = torch.cdist(means[full], torch.tensor(COLORS).float()).argmin(-1)
    assert full.sum() > 150
    assert (nearest == scenes.labels[full]).float().mean() > 0.9  # half-covered patches also show the background


def test_labels_boxes_and_objects_agree(sprites: Sprites) -> None:
    scenes = Composer(sprites, seed=5).draw(40)
    assert scenes.images.shape == (40, 3, 160, 160)
    assert scenes.labels.shape == scenes.owners.shape == (40, 100)
    owned = scenes.owners >= 0
    assert torch.equal(owned, scenes.labels >= 0)
    assert {BACKGROUND, UNCLEAR} <= set(scenes.labels.unique().tolist())
    scene, place = owned.nonzero(as_tuple=True)
    owner = scenes.owners[owned]
    assert torch.equal(scenes.classes[scene, owner], scenes.labels[owned])
    left, top, right, bottom = scenes.boxes[scene, owner].unbind(-1)
    x, y = place % 10 * 16, place // 10 * 16
    assert ((x + 16 > left - 4) & (x < right + 4) & (y + 16 > top - 4) & (y < bottom + 4)).all()
    present = scenes.classes >= 0
    seen = torch.stack([(scenes.owners == k).any(1) for k in range(6)], 1)
    assert not (seen & ~present).any()
    assert (seen & present).sum() / present.sum() > 0.9  # few objects are too small or too covered for a label
    assert scenes.classes.unique().tolist() == [-1, 0, 1, 2, 3, 4, 5]


def test_at_least_a_third_of_the_scenes_have_bars_of_the_clip_mean_colour(sprites: Sprites) -> None:
    pixels = bytes_of(Composer(sprites, size=64, seed=0).draw(60)).int()
    corner = (pixels[:, :, 0, 0] - torch.tensor([122, 116, 104])).abs().amax(1) <= 1
    assert 0.33 < corner.float().mean() < 0.9


def test_scenes_depend_only_on_the_seed(sprites: Sprites) -> None:
    def drawn(seed: int) -> list[Scenes]:
        composer = Composer(sprites, size=64, patch=16, seed=seed)
        return [composer.draw(4), composer.draw(4)]

    first, again, other = drawn(1), drawn(1), drawn(2)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert not torch.equal(first[0].images, first[1].images)
    assert not torch.equal(first[0].images, other[0].images)


def test_a_budget_in_minutes_ends_on_time_with_a_learning_rate_of_zero() -> None:
    times = iter([100.0, 120.0, 122.0])
    budget = Budget(minutes=1.0, steps=None, clock=lambda: next(times))
    budget.step = 10
    assert budget.measure() == 0.0  # 20 s of compilation
    budget.step = 20
    assert budget.measure() == 5.0
    assert budget.steps == 20 + 38 * 5
    rates = []
    while not budget.over:
        rates.append(budget.rate)
        budget.step += 1
    assert len(rates) == 38 * 5
    assert max(rates) > 0.95
    assert rates[-1] < 1e-3


@pytest.fixture(scope="module")
def trained(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A tower after a few seconds of training."""
    out = tmp_path_factory.mktemp("tower") / "clip"
    options = tower.Options(
        glyphs=pack, out=out, steps=70, batch=24, lr=4e-3, words=0, max_objects=2, augment=False, device="cpu",
        config=SMALL,
    )  # fmt: skip
    return out, tower.train(options)


def test_a_tower_learns_four_glyphs_in_seconds(trained: tuple[Path, dict[str, float]]) -> None:
    out, found = trained
    assert found["objects"] > 0.6  # chance: 0.25
    lines = [json.loads(line) for line in out.with_name("clip.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == lines[-1]["steps"] == 70
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_llava_and_transformers_read_the_tower_alike(
    trained: tuple[Path, dict[str, float]], pack: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = trained[0]
    llm = tiny.write_llava(tmp_path / "llava", clip=folder, mm_hidden_size=64)
    vlm = llava.load(llm, vision_tower=folder, dtype="float32", device="cpu")
    config = vlm.model.config
    assert config.vision == replace(SMALL, select_feature="patch")
    assert config.image is not None
    assert (config.image.size, config.image.mean) == (64, MEAN)
    glyphs = Glyphs.load(pack)
    scenes = Composer(load_sprites(glyphs, glyphs.styles, [], torch.device("cpu")), size=64, patch=16).draw(3)
    other = transformers.CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert vlm.model.vision is not None
        ours = vlm.model.vision(scenes.images)
        theirs = other(scenes.images, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_run_with_the_same_seed_writes_the_same_tower(pack: Path, tmp_path: Path) -> None:
    options = tower.Options(
        glyphs=pack, out=tmp_path / "a", steps=2, batch=4, words=2, max_objects=2, device="cpu", config=SMALL
    )
    tower.train(options)
    tower.train(replace(options, out=tmp_path / "b"))
    tower.train(replace(options, out=tmp_path / "c", seed=1))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_held_back_style_is_evaluated_but_not_trained_on(pack: Path, tmp_path: Path) -> None:
    options = tower.Options(
        glyphs=pack, out=tmp_path / "a", steps=1, batch=4, styles=("bare",), words=1, device="cpu", config=SMALL
    )
    found = tower.train(options)
    assert {"objects", "lined_objects"} <= set(found)
    with pytest.raises(ConfigError, match="has no style oil; available styles: bare, lined"):
        tower.train(replace(options, out=tmp_path / "b", styles=("oil",)))
    assert not (tmp_path / "b").exists()
    with pytest.raises(CheckpointError, match="not empty"):
        tower.train(options)


def dialogues(n: int) -> list[Any]:
    """Samples in LLaVA's format, with some plain texts."""
    rng = random.Random(0)
    samples: list[Any] = ["A square has four corners.", {"text": "A disc is round.\nIt has none."}]
    for i in range(n):
        thing = rng.choice(NAMES)
        asked = {"from": "human", "value": f"<image>\nHere is a {thing}. What is it?"}
        said = {"from": "gpt", "value": f"It is a {thing}."}
        samples.append({"id": str(i), "image": "a.png", "conversations": [asked, said]})
    return samples


SMALL_LLAMA = DecoderConfig(
    kind="llama", n_layers=2, dim=64, n_heads=2, n_kv_heads=2, head_dim=32, mlp_dim=160, vocab_size=400, max_seq=256,
    eps=1e-5, tied=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    (folder / "data.json").write_text(json.dumps(dialogues(300)))
    options = language.Options(
        texts=[folder / "data.json"], out=folder / "llama", steps=60, batch=4, row=128, lr=5e-3, device="cpu",
        config=SMALL_LLAMA,
    )  # fmt: skip
    found = language.train(options)
    assert found["unseen"] < 1.5  # nats per token; a uniform guess gives 6
    return folder / "llama"


def test_dialogues_are_rendered_in_the_template_without_image_marks(llama: Path) -> None:
    texts = language.read_texts([llama.parent / "data.json"])
    assert texts[:2] == ["A square has four corners.", "A disc is round.\nIt has none."]
    thing = texts[2].split("It is a ")[1].removesuffix(".</s>")
    assert (
        texts[2] == f"{language.TEMPLATE.system} USER: Here is a {thing}. What is it? ASSISTANT: It is a {thing}.</s>"
    )


def test_ids_in_training_equal_those_of_the_saved_tokenizer(llama: Path) -> None:
    texts = language.read_texts([llama.parent / "data.json"])
    tokenizer = load_tokenizer(llama)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for text, ids in zip(texts[:8], language.encode(texts[:8], (llama / "tokenizer.model").read_bytes()), strict=True):
        assert ids.tolist() == [*tokenizer.encode(text.removesuffix("</s>")), 2]
        assert tokenizer.decode(ids.tolist()) == text.removesuffix("</s>")
    # characters without a piece are encoded as bytes
    assert tokenizer.decode(tokenizer.encode("Ünseen 👾")) == "Ünseen 👾"


def test_llava_and_transformers_read_the_language_model_alike(llama: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert open_checkpoint(llama).format == "llama"
    ours = llava.load(llama, dtype="float32", device="cpu")
    theirs = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    prompt = f"{language.TEMPLATE.system} USER: Here is a red square. What is it? ASSISTANT:"
    ids = ours.prepare(prompt).ids
    with torch.no_grad():
        wanted = theirs(torch.tensor([list(ids)])).logits[0]
    torch.testing.assert_close(ours.logits(prompt), wanted, rtol=0, atol=1e-4)
    assert ours.generate(prompt, max_new_tokens=20).text.strip().startswith("It is a ")


def test_too_few_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(dialogues(3)))
    with pytest.raises(ConfigError, match=r"5 texts; expected 100 or more"):
        language.read_texts([tmp_path / "data.json"])
    with pytest.raises(ConfigError, match="does not exist"):
        language.read_texts([tmp_path / "none.json"])
