"""Property tests of image preprocessing, templates, tokenizers and key tables.

Hypothesis draws the inputs from a fixed seed, so every run is the same. A failure prints the smallest failing input and
how to reproduce it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.config import IMAGE, DecoderConfig, ImageConfig, LlavaConfig, ProjectorConfig, VisionConfig
from llava.errors import PromptError
from llava.formats.clip import RULES as CLIP
from llava.formats.format import to_disk
from llava.formats.gpt_fast import RULES as GPT_FAST
from llava.formats.llama import RULES as HF_LLAMA
from llava.formats.llava import RULES as LLAVA_RULES
from llava.formats.llava_hf import RULES as LLAVA_HF
from llava.formats.mpt import LANGUAGE as MPT
from llava.formats.mpt import RULES as LLAVA_MPT
from llava.formats.native import RULES as NATIVE
from llava.formats.tokenizer import load_tokenizer
from llava.model.llava import Llava, shapes
from llava.preprocess.conversation import Style, Template, Turn, render
from llava.preprocess.image import Size, choose_canvas, tile_grid, to_views
from llava.preprocess.inputs import Preprocessor
from llava.preprocess.templates import TEMPLATES
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors import keymap
from llava.tensors.keymap import Rule
from llava.tensors.lazy import InMemory, interleave
from tests import tiny


def tried(n: int) -> settings:
    """Settings for n examples, the same ones in every run."""
    return settings(max_examples=n, derandomize=True, deadline=None, database=None, print_blob=True)


# ------------------------------------------------------------------------------------------------ pictures

LONG = st.tuples(st.integers(1, 4000), st.integers(1, 3))
SIZES = st.one_of(LONG, LONG.map(lambda size: size[::-1]), st.tuples(st.integers(1, 700), st.integers(1, 700)))
NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # pinpoints as published
TILES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=8, unique=True)


def image_config(size: int, **options: object) -> ImageConfig:
    values = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "aspect": "anyres", "pinpoints": ((size, size),)}
    return ImageConfig(**{"size": size, **values, **options})  # type: ignore[arg-type]


def canvas_by_the_rule(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The reference's rule: most of the picture kept, then least area wasted, then the first."""
    width, height = size

    def merit(w: int, h: int) -> tuple[int, int]:
        s = min(w / width, h / height)
        effective = min(int(width * s) * int(height * s), width * height)
        return effective, -(w * h - effective)

    best = max(merit(*canvas) for canvas in pinpoints)
    return next(canvas for canvas in pinpoints if merit(*canvas) == best)


@tried(300)
@given(size=SIZES, tiles=TILES)
@example(size=(4000, 3), tiles=[(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)])
def test_the_canvas_follows_the_rule(size: Size, tiles: list[Size]) -> None:
    pinpoints = tuple((336 * w, 336 * h) for w, h in tiles)
    assert choose_canvas(size, image_config(336, pinpoints=pinpoints)) == canvas_by_the_rule(size, pinpoints)


@tried(50)
@given(tiles=TILES, data=st.data())
def test_a_picture_as_large_as_a_canvas_gets_that_canvas(tiles: list[Size], data: st.DataObject) -> None:
    pinpoints = tuple((336 * w, 336 * h) for w, h in tiles)
    size = data.draw(st.sampled_from(pinpoints))
    assert choose_canvas(size, image_config(336, pinpoints=pinpoints)) == size


@pytest.mark.parametrize(
    ("size", "kept", "total"),
    [
        ((336, 336), (24, 24), 1176),
        ((672, 672), (48, 48), 2928),
        ((640, 480), (36, 48), 2340),
        ((480, 640), (48, 36), 2352),
        ((1920, 1080), (28, 48), 1948),
        ((1000, 300), (22, 72), 2182),
        ((300, 1000), (72, 22), 2232),
        ((3000, 500), (12, 72), 1452),
        ((500, 333), (24, 36), 1464),
    ],
)
def test_numbers_of_kept_patches_are_the_published_ones(size: Size, kept: Size, total: int) -> None:
    config = image_config(336, pinpoints=NEXT, merge="spatial_unpad")
    grid = tile_grid(size, choose_canvas(size, config), config, 24)
    assert grid is not None
    assert (grid.bottom - grid.top, grid.right - grid.left) == kept
    assert 576 + grid.n_tokens == total


@tried(300)
@given(size=SIZES, cols=st.integers(1, 4), rows=st.integers(1, 4), patches=st.integers(1, 27))
def test_unpadding_keeps_the_patches_of_the_rule(size: Size, cols: int, rows: int, patches: int) -> None:
    config = image_config(14, merge="spatial_unpad")
    grid = tile_grid(size, (14 * cols, 14 * rows), config, patches)
    assert grid is not None
    height, width = rows * patches, cols * patches
    top = left = 0
    if size[0] / size[1] > width / height:
        top = (height - int(size[1] * (width / size[0]))) // 2
    else:
        left = (width - int(size[0] * (height / size[1]))) // 2
    assert (grid.top, grid.bottom, grid.left, grid.right) == (top, height - top, left, width - left)
    assert grid.n_tokens == (height - 2 * top) * (width - 2 * left + 1)
    assert grid.top == 0 or grid.left == 0
    assert 0 <= grid.top <= grid.bottom <= height
    assert 0 <= grid.left <= grid.right <= width


SIDE, PATCH = 28, 14  # pixels
DECODER = DecoderConfig(
    kind="llama", n_layers=1, dim=4, n_heads=1, n_kv_heads=1, head_dim=4, mlp_dim=4, vocab_size=600, max_seq=9999, eps=1
)
VISION = VisionConfig(dim=4, n_layers=1, n_heads=1, mlp_dim=4, image_size=SIDE, patch_size=PATCH)
LLAVA = LlavaConfig(
    decoder=DECODER, vision=VISION, projector=ProjectorConfig(in_dim=4, out_dim=4, depth=1), image=image_config(SIDE)
)
MODES = st.builds(
    image_config,
    st.just(SIDE),
    aspect=st.sampled_from(("square", "pad", "anyres")),
    mode=st.sampled_from(("original", "hf")),
    merge=st.sampled_from(("flat", "spatial", "spatial_unpad")),
    pinpoints=TILES.map(lambda tiles: tuple((SIDE * w, SIDE * h) for w, h in tiles)),
)


@tried(150)
@given(size=SIZES, image=MODES)
@example(size=(1, 1), image=image_config(SIDE, aspect="square"))
@example(size=(4000, 3), image=image_config(SIDE, aspect="square", mode="hf"))
@example(size=(3, 4000), image=image_config(SIDE, merge="spatial_unpad", pinpoints=((SIDE * 4, SIDE),)))
def test_the_number_of_image_tokens_is_right_for_any_size(size: Size, image: ImageConfig) -> None:
    config = replace(LLAVA, image=image)
    views, grid, opened = to_views(Image.new("RGB", size, (200, 30, 60)), image, VISION.grid)
    assert opened == size
    assert views.dtype is torch.float32
    assert views.isfinite().all()
    n_tiles = 0
    if image.aspect == "anyres":
        w, h = choose_canvas(size, image)
        n_tiles = (w // SIDE) * (h // SIDE)
        assert (grid is None) == (image.merge == "flat")
        assert grid is None or grid.rows * grid.cols == n_tiles
    assert views.shape == (1 + n_tiles, 3, SIDE, SIDE)
    features = torch.zeros(len(views), VISION.n_features, 4)
    packed = Llava(config).pack(features, grid)
    assert len(packed) == (VISION.n_features + grid.n_tokens if grid else VISION.n_features * len(views))


def plain(config: ImageConfig, views: torch.Tensor) -> torch.Tensor:
    """Views [V, 3, S, S] converted back to bytes."""
    mean, std = torch.tensor(config.mean)[:, None, None], torch.tensor(config.std)[:, None, None]
    return ((views * std + mean) * 255).round().to(torch.uint8)


def stripes(size: Size) -> tuple[Image.Image, torch.Tensor]:
    """A picture in which neighbouring rows and columns differ, and its bytes [3, H, W]."""
    w, h = size
    x, y = torch.arange(w)[None].expand(h, w), torch.arange(h)[:, None].expand(h, w)
    pixels = torch.stack([x * 7 % 256, y * 11 % 256, (x + y) * 5 % 256]).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), pixels


@tried(60)
@given(long=st.integers(SIDE, 200), upright=st.booleans())
def test_cropping_takes_the_central_square(long: int, upright: bool) -> None:
    config = image_config(SIDE, aspect="square")
    picture, pixels = stripes((SIDE, long) if upright else (long, SIDE))
    first = (long - SIDE) // 2
    middle = pixels[:, first : first + SIDE] if upright else pixels[:, :, first : first + SIDE]
    assert torch.equal(plain(config, to_views(picture, config, 2).pixels)[0], middle)


@tried(60)
@given(short=st.integers(1, SIDE), upright=st.booleans())
def test_padding_centres_the_picture_on_the_mean_colour(short: int, upright: bool) -> None:
    config = image_config(SIDE, aspect="pad")
    picture, pixels = stripes((short, SIDE) if upright else (SIDE, short))
    wanted = torch.tensor([int(255 * value) for value in config.mean], dtype=torch.uint8)[:, None, None]
    wanted = wanted.expand(3, SIDE, SIDE).clone()
    first = (SIDE - short) // 2
    (wanted.transpose(1, 2) if upright else wanted)[:, first : first + short] = (
        pixels.transpose(1, 2) if upright else pixels
    )
    assert torch.equal(plain(config, to_views(picture, config, 2).pixels)[0], wanted)


@tried(60)
@given(short=st.integers(1, 2 * SIDE), upright=st.booleans())
def test_tiles_are_the_picture_padded_with_black_and_cut_row_by_row(short: int, upright: bool) -> None:
    config = image_config(SIDE, pinpoints=((2 * SIDE, 2 * SIDE),))
    picture, pixels = stripes((short, 2 * SIDE) if upright else (2 * SIDE, short))
    whole = torch.zeros(3, 2 * SIDE, 2 * SIDE, dtype=torch.uint8)
    first = (2 * SIDE - short) // 2
    (whole.transpose(1, 2) if upright else whole)[:, first : first + short] = (
        pixels.transpose(1, 2) if upright else pixels
    )
    tiles = [whole[:, y : y + SIDE, x : x + SIDE] for y in (0, SIDE) for x in (0, SIDE)]
    assert torch.equal(plain(config, to_views(picture, config, 2).pixels)[1:], torch.stack(tiles))


# ------------------------------------------------------------------------------------------------ templates

PIECES = ("###", "</s>", "<s>", " ", "\n", "<|im_end|>", "<|im_start|>user\n", "USER:", "ASSISTANT:", "Human:",
          "[INST]", "[/INST]", "<<SYS>>", "Assistant", "é", "図", "🙂", "a", "\u200b", "\0")  # fmt: skip
TEXTS = st.one_of(st.just(""), st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.text(max_size=20))
TALKS = st.lists(TEXTS, min_size=1, max_size=6)


def turns_of(texts: Sequence[str]) -> list[Turn]:
    """Alternating turns, the last without text; every other non-empty text has a unique mark."""
    marked = [f"«{i}»{text}«/{i}»" if text else "" for i, text in enumerate(texts)]
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(marked)]
    return turns if len(turns) % 2 == 0 else [*turns, Turn("assistant", None)]


def labels(template: Template, turns: Sequence[Turn]) -> dict[str, int]:
    """The text that introduces each role, and how often it should occur."""
    roles = [turn.role for turn in (*template.few_shot, *turns)]
    sides = {template.user: roles.count("user"), template.assistant: roles.count("assistant")}
    if template.style is Style.LLAMA_2:  # an empty turn of this style leaves no trace
        said = sum(turn.role == "user" and bool(turn.text) for turn in turns)
        return {"[INST] ": said, " [/INST]": said}
    if template.style is Style.PLAIN:
        return {}
    return sides if template.style is Style.MPT else {f"{side}:": n for side, n in sides.items()}


@pytest.mark.parametrize("name", TEMPLATES)
@tried(30)
@given(texts=TALKS, system=st.one_of(st.none(), TEXTS))
def test_a_prompt_contains_every_turn_once_and_in_order(name: str, texts: list[str], system: str | None) -> None:
    template, turns = TEMPLATES[name], turns_of(texts)
    refused = (template.style is Style.PLAIN and (system or len(turns) > 2)) or (
        template.style is Style.LLAMA_2 and not texts[0]
    )
    if refused:
        with pytest.raises(PromptError):
            render(template, turns, system)
        return
    spans = render(template, turns, system)
    prompt = rest = "".join(span.text for span in spans)
    said = [turn.text for turn in turns if turn.text]
    if template.style is Style.PLAIN and len(texts) == 2 and texts[1]:
        said = said[-1:]  # with a caption, only the image marks of the user's text remain
    assert [prompt.count(text) for text in said] == [1] * len(said)
    assert sorted(said, key=prompt.index) == said
    for text in [*said, *([system] if system else [])]:
        rest = rest.replace(text, "", 1)
    for label, n in labels(template, turns).items():
        assert rest.count(label) == n, label
    targets = [span.text for span in spans if span.target]
    answers = [turn.text for turn in (*template.few_shot, *turns) if turn.role == "assistant" and turn.text]
    assert len(targets) == len(answers)
    assert all(text in span for text, span in zip(answers, targets, strict=True))
    if turns[-1].text is None and template.style is not Style.PLAIN:
        end = {Style.MPT: template.assistant, Style.LLAMA_2: ""}.get(template.style, f"{template.assistant}:")
        assert prompt.endswith(end)
        if template.style is Style.LLAMA_2 and turns[-2].text:
            assert prompt.endswith(f"{turns[-2].text} [/INST]")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@tried(150)
@given(
    roles=st.lists(st.sampled_from(("system", "user", "assistant")), max_size=5),
    texts=st.lists(
        st.one_of(TEXTS, st.text(st.characters(categories=("Cs", "L")), max_size=3)), min_size=5, max_size=5
    ),
    pictures=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    name=st.sampled_from(sorted(TEMPLATES)),
)
def test_messages_are_prepared_with_all_pictures_or_refused(
    tokenizer: Tokenizer, roles: list[str], texts: list[str], pictures: list[int], name: str
) -> None:
    preprocessor = Preprocessor(LLAVA, tokenizer, template=name)
    messages = [
        {"role": role, "content": [*({"type": "image", "image": Image.new("RGB", (30, 20))} for _ in range(n)),
                                   {"type": "text", "text": text}]}
        for role, text, n in zip(roles, texts, pictures, strict=False)
    ]  # fmt: skip
    talk = roles[1:] if roles[:1] == ["system"] else roles
    sound = talk and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(talk))
    n_pictures = sum(pictures[: len(roles)])
    try:
        prepared = preprocessor.prepare(messages)
    except PromptError:
        ordinary = all(text and text.isprintable() for text in texts) and not any("<image>" in text for text in texts)
        alone = not n_pictures or not any(n for role, n in zip(roles, pictures, strict=False) if role != "user")
        assert not (sound and ordinary and alone and TEMPLATES[name].style is not Style.PLAIN)
        return
    assert sound
    assert prepared.token_ids.count(IMAGE) == n_pictures
    assert int((prepared.ids == IMAGE).sum()) == preprocessor.n_image_tokens(prepared)


@tried(200)
@given(text=TEXTS)
def test_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assume(not any(token in text for token in ("<s>", "</s>", "<unk>", "\0", "▁")))
    tokens = tokenizer.encode_tokens(text)
    assert tokenizer.decode([token.id for token in tokens]) == text
    places = [(token.start, token.end) for token in tokens]
    assert all(start <= end <= len(text.encode()) for start, end in places)
    assert places == sorted(places)


# ------------------------------------------------------------------------------------------------ key tables


LAYERS = st.sampled_from((1, 2, 11))  # 11 layers need two-digit layer numbers


@st.composite
def configs(draw: st.DrawFn) -> LlavaConfig:
    """Configs of all kinds of models with few layers and any number of heads."""
    mpt = draw(st.booleans())
    head_dim, n_kv = 2 * draw(st.integers(1, 4)), draw(st.integers(1, 3))
    n_heads = n_kv * (1 if mpt else draw(st.integers(1, 3)))
    dim = n_heads * head_dim
    positions = {"rope_theta": None, "alibi_bias_max": 8} if mpt else {}
    decoder = DecoderConfig(
        kind="mpt" if mpt else "llama", n_layers=draw(LAYERS), dim=dim, n_heads=n_heads, n_kv_heads=n_kv,
        head_dim=head_dim, mlp_dim=draw(st.integers(1, 9)), vocab_size=draw(st.integers(1, 9)), max_seq=9, eps=1e-5,
        tied=draw(st.booleans()), **positions,
    )  # fmt: skip
    if draw(st.booleans()):
        return LlavaConfig(decoder=decoder)
    depth = draw(st.integers(0 if dim == 4 else 1, 3))
    merge = draw(st.sampled_from(("flat", "spatial", "spatial_unpad")))
    vision = replace(VISION, n_layers=1 + draw(LAYERS), select_layer=-2)
    projector = ProjectorConfig(in_dim=4, out_dim=dim, depth=depth)
    return LlavaConfig(decoder=decoder, vision=vision, projector=projector, image=image_config(SIDE, merge=merge))


def written(config: LlavaConfig) -> dict[str, tuple[Rule, ...]]:
    """The key tables that can store a model, by name."""
    llama_like, depth = config.decoder.kind == "llama", config.projector.depth if config.projector else 2
    tables = {"native": NATIVE}
    if not llama_like:
        return tables | {"mpt": LLAVA_MPT}
    tables |= {"llava": LLAVA_RULES}
    if depth == 2:
        tables |= {"llava-hf": LLAVA_HF}
    return tables


def assert_there_and_back(names: Sequence[str], table: tuple[Rule, ...]) -> None:
    disk = {ours: tuple(keymap.disk_names(ours, table)) for ours in names}
    every = [name for parts in disk.values() for name in parts]
    assert len(set(every)) == len(every)
    for order in (every, every[::-1]):
        assert keymap.plan(order, table) == (keymap.plan(every, table).tensors, (), ())
    assert keymap.plan(every, table).tensors == disk
    for ours, parts in disk.items():
        assert [keymap.target_of(part, table) for part in parts] == [(ours, i, len(parts)) for i in range(len(parts))]


@tried(25)
@given(config=configs())
def test_renaming_there_and_back_is_the_identity(config: LlavaConfig) -> None:
    names = list(shapes(config))
    for table in written(config).values():
        assert_there_and_back(names, table)
    decoder = [name for name in names if name.startswith("decoder.")]
    if config.decoder.kind == "llama":
        assert_there_and_back(decoder, HF_LLAMA)
        assert_there_and_back(decoder, GPT_FAST)
    else:
        assert_there_and_back(decoder, MPT)
    assert_there_and_back([name for name in names if name.startswith("vision.")], CLIP)


@tried(20)
@given(config=configs())
def test_tensors_that_are_split_are_joined_again(config: LlavaConfig) -> None:
    for table in written(config).values():
        for ours, shape in shapes(config).items():
            tensor = torch.arange(math.prod(shape)).reshape(shape)
            names = keymap.disk_names(ours, table)
            (*outputs,) = to_disk({ours: InMemory(tensor=tensor, origin=ours)}, config, table)
            assert [out.name for out in outputs] == names
            disk = {out.name: torch.cat(list(out.chunks())) for out in outputs}
            parts = keymap.plan(disk, table).tensors[ours]
            assert torch.equal(torch.cat([disk[part] for part in parts]), tensor)


@tried(40)
@given(heads=st.integers(1, 5), half=st.integers(1, 8))
def test_gpt_fast_interleaves_the_two_halves_of_the_rows(heads: int, half: int) -> None:
    rows = torch.arange(heads * 2 * half)[:, None]
    wanted = [head * 2 * half + i + side * half for head in range(heads) for i in range(half) for side in (0, 1)]
    assert interleave(rows, 2 * half)[:, 0].tolist() == wanted
