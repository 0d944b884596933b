"""What the tokens of a reply look at, in pixels."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import llava
from llava.assistant import question_about
from llava.engine.capture import Capture
from llava.engine.sampling_params import SamplingParams
from llava.errors import ConfigError, PromptError
from llava.explain.draw import overlay, sheet
from llava.explain.maps import AttentionMap, PictureMap, words_of
from llava.explain.page import page
from llava.preprocess.boxes import token_boxes
from tests import tiny

QUESTION = "What is in the picture?"
KITCHEN = Path(__file__).parents[2] / "examples" / "pictures" / "kitchen.png"


@pytest.fixture(scope="module")
def vlm() -> llava.Assistant:
    return llava.load(device="cpu")


@pytest.fixture(scope="module")
def found(vlm: llava.Assistant) -> AttentionMap:
    return vlm.attention_map(question_about(KITCHEN, QUESTION))


@pytest.fixture(scope="module")
def tiles(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> llava.Assistant:
    """Like LLaVA-1.6: an overview of the picture, and tiles of it."""
    folder = tiny.write_llava(tmp_path_factory.mktemp("v16") / "llava", clip=clip, **tiny.ANYRES)
    return llava.load(folder, device="cpu", dtype="float32")


def one_box(box: tuple[float, float, float, float], size: tuple[int, int] = (4, 3)) -> torch.Tensor:
    return PictureMap(size=size, boxes=[box], shares=torch.tensor([[1.0]])).pixels(0)


def test_a_share_is_spread_over_the_pixels_of_its_box() -> None:
    assert one_box((1, 0, 3, 2)).tolist() == [[0, 0.25, 0.25, 0], [0, 0.25, 0.25, 0], [0, 0, 0, 0]]


def test_a_box_that_ends_within_a_pixel_gives_it_its_part() -> None:
    assert torch.allclose(one_box((0, 0, 1.5, 1)), torch.tensor([[2 / 3, 1 / 3, 0, 0], [0] * 4, [0] * 4]))


def test_boxes_that_overlap_add_up() -> None:
    two = PictureMap(size=(2, 1), boxes=[(0, 0, 2, 1), (1, 0, 2, 1)], shares=torch.tensor([[0.5, 0.25]]))
    assert two.pixels(0).tolist() == [[0.25, 0.5]]


def test_the_words_are_those_of_the_reply(found: AttentionMap) -> None:
    assert "".join(found.tokens).strip() == found.reply.text
    assert " ".join(word for word, _ in found.words) == found.reply.text
    assert [i for _, one in found.words for i in range(len(found.tokens))[one]] == [*range(len(found.tokens))]


def test_the_reply_is_that_of_generate(vlm: llava.Assistant, found: AttentionMap) -> None:
    assert found.reply.text == vlm.generate(question_about(KITCHEN, QUESTION)).text


def test_each_map_has_the_pixels_of_its_picture(vlm: llava.Assistant) -> None:
    pictures = [Image.new("RGB", (50, 120), "red"), Image.new("RGB", (90, 31), "blue")]
    found = vlm.attention_map(question_about(pictures, QUESTION), max_new_tokens=5)
    assert [one.shape for one in found.maps] == [(len(found.tokens), 120, 50), (len(found.tokens), 31, 90)]
    for maps, picture in zip(found.maps, found.pictures, strict=True):
        assert torch.allclose(maps.sum((1, 2)), picture.shares.sum(1), rtol=1e-4)
        assert torch.allclose(maps[2], picture.pixels(2))
        assert torch.allclose(maps[1:3].mean(0), picture.pixels(slice(1, 3)), atol=1e-9)


@pytest.mark.parametrize(
    ("word", "box"),  # of things in the picture
    [("apple", (55, 90, 130, 160)), ("teapot", (130, 50, 215, 135))],
)
def test_a_name_looks_at_the_thing(found: AttentionMap, word: str, box: tuple[int, int, int, int]) -> None:
    (tokens,) = [tokens for text, tokens in found.words if text.strip(".,") == word]
    heat = found.pictures[0].pixels(tokens)
    left, top, right, bottom = box
    inside = heat[top:bottom, left:right].sum() / heat.sum()
    assert inside > 2 * (right - left) * (bottom - top) / heat.numel()


@pytest.mark.parametrize(("layers", "heads"), [(None, None), ([1], None), ([0, 1], [2, 0])])
def test_shares_are_the_mean_attention_of_layers_and_heads_to_tiles_too(
    tiles: llava.Assistant, layers: list[int] | None, heads: list[int] | None
) -> None:
    messages = question_about(Image.new("RGB", (70, 40), "teal"), QUESTION)
    found = tiles.attention_map(messages, layers=layers, heads=heads, max_new_tokens=6)
    input, all_layers = tiles.prepare(messages), tuple(range(tiles.config.decoder.n_layers))
    stream = tiles.engine.stream(input, SamplingParams(max_new_tokens=6), capture=Capture(attention=all_layers))
    for _ in stream:
        pass
    captured = stream.captured()
    chosen = [captured.probabilities(layer)[heads or slice(None)].mean(0) for layer in layers or all_layers]
    tokens = [i for image in captured.images for i in image]
    attention = torch.stack(chosen).mean(0)[len(input.ids) - 1 :, tokens][: len(found.tokens)]
    (picture,) = found.pictures
    vision, image = tiles.config.vision, tiles.config.image
    assert vision
    assert image
    boxes = token_boxes((70, 40), image, vision.grid, input.grids[0], vision.n_features)
    kept = [i for i, box in enumerate(boxes) if box]
    assert len(kept) < len(boxes)  # row ends and padding show nothing
    assert torch.allclose(picture.shares, attention[:, kept], atol=1e-6)
    assert found.maps[0].shape == (len(found.tokens), 40, 70)


def test_rollout_follows_attention_through_all_layers(vlm: llava.Assistant, found: AttentionMap) -> None:
    rollout = vlm.attention_map(question_about(KITCHEN, QUESTION), rollout=True)
    assert rollout.reply.text == found.reply.text
    assert (rollout.pictures[0].shares.sum(1) <= 1 + 1e-4).all()
    assert not torch.allclose(rollout.pictures[0].shares, found.pictures[0].shares, atol=1e-3)


@pytest.mark.parametrize("options", [{"layers": [5]}, {"layers": []}, {"heads": [-1]}, {"heads": [1, 1]}], ids=str)
def test_layers_and_heads_that_do_not_exist_are_refused(vlm: llava.Assistant, options: dict[str, list[int]]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: expected different numbers from 0 to "):
        vlm.attention_map(question_about(KITCHEN, QUESTION), **options)  # type: ignore[arg-type]


def test_a_question_without_a_picture_is_refused(vlm: llava.Assistant) -> None:
    with pytest.raises(PromptError, match="there is no picture to look at"):
        vlm.attention_map(question_about(None, QUESTION))


def test_an_overlay_changes_the_picture_where_the_map_is_high() -> None:
    heat = torch.zeros(20, 30)
    heat[5, 7] = 1
    before, after = Image.new("RGB", (30, 20), "blue"), overlay(Image.new("RGB", (30, 20), "blue"), heat)
    changed = [(x, y) for y in range(20) for x in range(30) if before.getpixel((x, y)) != after.getpixel((x, y))]
    assert changed == [(7, 5)]


def test_the_sheet_has_a_picture_for_each_word(found: AttentionMap) -> None:
    image = Image.open(KITCHEN)
    drawn = sheet(found, [image])
    rows = -(-len(found.words) // 6)
    assert drawn.size == (6 * 220, rows * 238)
    cells = [drawn.crop((220 * c, 238 * r, 220 * c + 220, 238 * r + 220)) for r in range(rows) for c in range(6)]
    filled = [len(cell.getcolors(2**16) or [0] * 21) > 20 for cell in cells]
    assert filled == [i < len(found.words) for i in range(6 * rows)]


def test_the_page_has_all_data_and_its_texts_cannot_leave_their_element(found: AttentionMap) -> None:
    text = page(found, [Image.open(KITCHEN)], "</script><b>what?", "USER: <image>\n</script>")
    assert text.count("</script>") == 2  # the data and the code
    start = text.index('id="data">') + len('id="data">')
    data = json.loads(text[start : text.index("</script>", start)])
    assert data["question"] == "</script><b>what?"
    assert [one["text"] for one in data["words"]] == [word for word, _ in found.words]
    assert data["pictures"][0]["source"].startswith("data:image/png;base64,")
    assert len(data["words"][0]["shares"][0]) == len(data["pictures"][0]["boxes"])
    assert "http" not in text


def test_a_reply_without_tokens_has_no_words() -> None:
    assert words_of([]) == []
    assert words_of([b"There", b" is", b" m", "é".encode()[:1], "é".encode()[1:]]) == [
        ("There", slice(0, 1)),
        ("is", slice(1, 2)),
        ("mé", slice(2, 5)),
    ]
