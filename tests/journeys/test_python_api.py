"""The Python API on small random checkpoints. The name of a test states what the API guarantees."""

import io
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

import llava
from llava.errors import LlavaError
from tests import tiny

Messages = list[dict[str, Any]]
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def photo(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    """Smooth coloured noise."""
    noise = torch.randint(256, (5, 7, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def user(text: str | None, *images: Any) -> dict[str, Any]:
    """A user message, pictures first."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, *([] if text is None else [{"type": "text", "text": text}])]}


def field(record: Any, name: str) -> Any:
    """An item of a dictionary, or an attribute."""
    return record[name] if isinstance(record, dict) else getattr(record, name)


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> llava.Assistant:
    return llava.load(checkpoint)


@pytest.fixture(scope="module")
def anyres(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> llava.Assistant:
    folder = tmp_path_factory.mktemp("anyres") / "llava"
    tiny.write_llava(folder, layout="safetensors-shards", clip=clip, tower_seed=3, **tiny.ANYRES)
    return llava.load(folder, dtype="float32")


ASKED: Messages = [user("What is it?", photo())]
TEXT_ONLY: Messages = [{"role": "user", "content": "Name the three primary colours."}]
TALK: Messages = [
    user("Describe the picture.", photo(40, 70, seed=1)),
    {"role": "assistant", "content": "A pier."},
    {"role": "user", "content": "Is it old?"},
]


# ------------------------------------------------------------------------------------------------ loading


def test_load_returns_an_assistant_that_answers_about_a_picture(vlm: llava.Assistant, tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    answer = vlm.ask(str(tmp_path / "photo.png"), "What is it?")
    assert isinstance(vlm, llava.Assistant)
    assert isinstance(answer, str)
    assert answer == vlm.generate(ASKED).text


def test_ask_takes_one_picture_several_or_none(vlm: llava.Assistant) -> None:
    one, two = photo(), photo(seed=1)
    options: dict[str, Any] = {"max_new_tokens": 16}
    several = vlm.generate([user("Compare.", one, two)], **options).text
    assert vlm.ask([one, two], "Compare.", **options) == several
    assert vlm.ask(None, "Name the three primary colours.", **options) == vlm.generate(TEXT_ONLY, **options).text
    assert vlm.ask(one, "What is it?", **options) == vlm.generate(ASKED, **options).text


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("inside", [False, True], ids=["clip-apart", "clip-inside"])
def test_every_layout_loads_to_the_same_bits(
    clip: Path, vlm: llava.Assistant, tmp_path: Path, layout: tiny.Layout, inside: bool
) -> None:
    tower = {"tower_seed": 2} if inside else {}
    other = llava.load(tiny.write_llava(tmp_path / "other", layout=layout, clip=clip, **tower))
    pixels = vlm.prepare(ASKED).pixels
    assert torch.equal(other.vision_features(pixels), vlm.vision_features(pixels))
    assert torch.equal(other.logits(ASKED), vlm.logits(ASKED))
    assert other.prepare(ASKED).token_ids == vlm.prepare(ASKED).token_ids


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_clip_is_read_from_each_kind_of_folder(vlm: llava.Assistant, tmp_path: Path, layout: tiny.Layout) -> None:
    clip = tiny.write_clip(tmp_path / "clip", layout=layout)
    folder = tiny.write_llava(tmp_path / "llava")  # its config names the hub id
    assert torch.equal(llava.load(folder, vision_tower=clip).logits(ASKED), vlm.logits(ASKED))
    assert torch.equal(llava.load(str(folder), vision_tower=str(clip)).logits(ASKED), vlm.logits(ASKED))


def test_stored_inverse_frequencies_are_ignored(clip: Path, vlm: llava.Assistant, tmp_path: Path) -> None:
    folder = tiny.write_llava(tmp_path / "llava", layout="bin", clip=clip)
    tensors = torch.load(folder / "pytorch_model.bin")
    for key in [key for key in tensors if key.endswith("inv_freq")]:
        tensors[key].zero_()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(llava.load(folder).logits(ASKED), vlm.logits(ASKED))


def test_the_name_of_the_folder_does_not_matter(checkpoint: Path, vlm: llava.Assistant, tmp_path: Path) -> None:
    folder = tmp_path / "llama-2-mistral-lora-delta-mpt-v1.6-34b"
    shutil.copytree(checkpoint, folder)
    assert torch.equal(llava.load(folder).logits(ASKED), vlm.logits(ASKED))
    assert llava.load(folder).prepare(ASKED).prompt == vlm.prepare(ASKED).prompt


def test_weights_in_the_shards_take_precedence_over_the_clip_folder(
    clip: Path, vlm: llava.Assistant, tmp_path: Path
) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=clip, tower_seed=7)
    tuned = llava.load(tiny.write_llava(tmp_path / "apart", clip=tiny.write_clip(tmp_path / "clip7", seed=7)))
    pixels = vlm.prepare(ASKED).pixels
    assert torch.equal(llava.load(folder).vision_features(pixels), tuned.vision_features(pixels))
    assert not torch.equal(llava.load(folder).vision_features(pixels), vlm.vision_features(pixels))


def test_with_the_tower_in_the_shards_only_the_configs_of_clip_are_read(clip: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(clip / name, bare)
    folder = tiny.write_llava(tmp_path / "llava", clip=bare, tower_seed=2)
    assert llava.load(folder).vision_features(torch.zeros(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)).ndim == 3


def test_a_tower_in_the_shards_of_unknown_size_needs_its_config(tmp_path: Path) -> None:
    folder = tiny.write_llava(tmp_path / "llava", tower_seed=2)  # the hub id cannot be reached
    with pytest.raises(LlavaError, match=r"vision[_-]tower") as caught:
        llava.load(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_tower_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    folder = tiny.write_llava(tmp_path / "llava")
    with pytest.raises(LlavaError, match=r"vision[_-]tower") as caught:
        llava.load(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="nowhere"):
        llava.load(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ dtype and device


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("auto", torch.float32),  # below 1 B parameters on a CPU
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_is_the_requested_one(checkpoint: Path, given: Any, wanted: torch.dtype) -> None:
    assistant = llava.load(checkpoint, dtype=given, device="cpu")
    (embeddings,) = assistant.image_embeddings(ASKED)
    assert embeddings.dtype == wanted
    assert assistant.vision_features(assistant.prepare(ASKED).pixels).dtype == wanted
    assert assistant.logits(ASKED).dtype == torch.float32


def test_bfloat16_is_near_float32(checkpoint: Path, vlm: llava.Assistant) -> None:
    rough = llava.load(checkpoint, dtype="bfloat16").logits(ASKED)
    torch.testing.assert_close(rough, vlm.logits(ASKED), rtol=0, atol=0.5)


@pytest.mark.parametrize("device", ["auto", "cpu", torch.device("cpu")])
def test_device_may_be_a_name_or_a_torch_device(checkpoint: Path, vlm: llava.Assistant, device: Any) -> None:
    assistant = llava.load(checkpoint, device=device, dtype="float32")
    torch.testing.assert_close(assistant.logits(TEXT_ONLY).cpu(), vlm.logits(TEXT_ONLY).cpu(), rtol=0, atol=1e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_device_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(LlavaError, match="cuda"):
        llava.load(checkpoint, device="cuda")


@pytest.mark.parametrize(
    "option", [{"dtype": "float99"}, {"device": "abacus"}, {"image_mode": "sideways"}, {"template": "no_such_template"}]
)
def test_an_unknown_value_of_an_option_is_an_error_that_names_it(checkpoint: Path, option: dict[str, str]) -> None:
    with pytest.raises(LlavaError, match=next(iter(option.values()))):
        llava.load(checkpoint, **option)


def test_inputs_are_moved_to_the_models_dtype(checkpoint: Path, vlm: llava.Assistant) -> None:
    pixels = vlm.prepare(ASKED).pixels
    torch.testing.assert_close(vlm.vision_features(pixels.double()), vlm.vision_features(pixels))
    half = llava.load(checkpoint, dtype="bfloat16")
    features = half.vision_features(pixels)
    assert half.project(features.float()).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ messages


def test_without_marks_the_pictures_come_first(vlm: llava.Assistant) -> None:
    one = vlm.prepare([user("What is it?", photo())]).prompt
    two = vlm.prepare([user("Compare.", photo(), photo(seed=1))]).prompt
    assert one == f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    assert two == f"{SYSTEM} USER: <image>\n<image>\nCompare. ASSISTANT:"


def test_without_marks_a_picture_after_the_text_comes_first(vlm: llava.Assistant) -> None:
    text, picture = {"type": "text", "text": "What is it?"}, {"type": "image", "image": photo()}
    message = {"role": "user", "content": [text, picture]}
    assert vlm.prepare([message]).prompt == vlm.prepare([user("What is it?", photo())]).prompt


def test_a_text_with_a_mark_for_each_picture_is_unchanged(vlm: llava.Assistant) -> None:
    text = "  First <image>, \n then<image>! "
    prepared = vlm.prepare([user(text, photo(), photo(seed=1))])
    assert prepared.prompt == f"{SYSTEM} USER: {text} ASSISTANT:"
    assert prepared.token_ids.count(-200) == 2


def test_pictures_replace_the_marks_in_order(vlm: llava.Assistant) -> None:
    first, second = photo(), photo(seed=1)
    both = vlm.prepare([user("<image> and <image>", first, second)]).pixels
    alone = [vlm.prepare([user("<image>", picture)]).pixels for picture in (first, second)]
    assert torch.equal(both, torch.cat(alone))


@pytest.mark.parametrize(
    ("text", "pictures"), [("<image> and <image>", 1), ("<image>", 2), ("<image>", 0), ("a <image> b <image> c", 3)]
)
def test_any_other_number_of_marks_is_text_in_messages_and_an_error_in_raw_prompts(
    vlm: llava.Assistant, text: str, pictures: int
) -> None:
    images = [photo(seed=i) for i in range(pictures)]
    prepared = vlm.prepare([user(text, *images)])
    literal = text.replace("<image>", r"\<image>")
    front = "<image>\n" * pictures
    assert prepared.prompt == f"{SYSTEM} USER: {front}{literal} ASSISTANT:"
    assert prepared.token_ids.count(-200) == pictures
    with pytest.raises(LlavaError, match=rf"{text.count('<image>')} <image> placeholders? and {pictures} image"):
        vlm.prepare(text, images=images)


def test_a_mark_in_a_turn_without_pictures_is_text(vlm: llava.Assistant) -> None:
    prepared = vlm.prepare([user("Look.", photo()), {"role": "assistant", "content": "Yes."}, user("And <image>?")])
    assert prepared.token_ids.count(-200) == 1
    assert prepared.prompt.endswith("USER: And \\<image>? ASSISTANT:")


@pytest.mark.parametrize("role", ["assistant", "system"])
def test_only_user_turns_can_have_pictures(vlm: llava.Assistant, role: str) -> None:
    turn = {**user("Here.", photo()), "role": role}
    with pytest.raises(LlavaError):
        vlm.prepare([turn, user("Hello.")] if role == "system" else [user("Hello."), turn, user("And?")])


def test_an_unknown_role_is_an_error_that_names_it(vlm: llava.Assistant) -> None:
    with pytest.raises(LlavaError, match="narrator"):
        vlm.prepare([{"role": "narrator", "content": "Once upon a time"}])


def test_a_system_turn_replaces_the_templates_own(vlm: llava.Assistant) -> None:
    prompt = vlm.prepare([{"role": "system", "content": "Be brief."}, user("Hello.")]).prompt
    assert prompt == "Be brief. USER: Hello. ASSISTANT:"


def test_assistant_turns_are_part_of_the_prompt_and_a_last_one_is_closed(vlm: llava.Assistant) -> None:
    start = f"{SYSTEM} USER: <image>\nDescribe the picture. ASSISTANT: A pier.</s>"
    assert vlm.prepare(TALK).prompt == f"{start}USER: Is it old? ASSISTANT:"
    assert vlm.prepare(TALK[:2]).prompt == start


def test_content_is_a_text_or_a_list(vlm: llava.Assistant) -> None:
    assert vlm.prepare([{"role": "user", "content": "Hello."}]).token_ids == vlm.prepare([user("Hello.")]).token_ids


def test_a_picture_may_be_a_path_bytes_or_a_pil_image(vlm: llava.Assistant, tmp_path: Path) -> None:
    picture, file = photo(), io.BytesIO()
    picture.save(tmp_path / "a.png")
    picture.save(file, format="PNG")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), file.getvalue(), picture]
    pixels = [vlm.prepare([user("What is it?", form)]).pixels for form in forms]
    assert all(torch.equal(pixels[0], other) for other in pixels[1:])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_a_picture_of_any_mode_becomes_rgb(vlm: llava.Assistant, tmp_path: Path, mode: str) -> None:
    picture = photo().convert("L").convert("I").convert("I;16") if mode == "I;16" else photo().convert(mode)
    name = "a.tiff" if mode in ("CMYK", "I;16") else "a.png"
    picture.save(tmp_path / name)
    assert vlm.prepare([user("?", tmp_path / name)]).pixels.shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


def test_start_and_end_tokens_enclose_every_mark_if_configured(clip: Path, tmp_path: Path) -> None:
    added = ("<im_patch>", "<im_start>", "<im_end>")
    changes = {"mm_use_im_start_end": True, "mm_use_im_patch_token": True}
    assistant = llava.load(tiny.write_llava(tmp_path / "llava", clip=clip, added=added, **changes))
    front = assistant.prepare([user("Look.", photo())])
    assert front.prompt == f"{SYSTEM} USER: <im_start><image><im_end>\nLook. ASSISTANT:"
    inside = assistant.prepare([user("a <image> b <image>", photo(), photo())])
    assert "USER: a <im_start><image><im_end> b <im_start><image><im_end> ASSISTANT:" in inside.prompt
    at = front.token_ids.index(-200)
    assert front.token_ids[at - 1] == tiny.PIECES + 1
    assert tiny.PIECES + 2 in front.token_ids[at + 1 : at + 3]  # possibly after a single space
    tagged = assistant.prepare([user("Look.", photo())], template="v1_mmtag").prompt
    assert tagged.count("<image>") == 1


def test_legacy_strip_removes_white_space_next_to_the_start_and_end_tokens(clip: Path, tmp_path: Path) -> None:
    changes = {"mm_use_im_start_end": True, "mm_use_im_patch_token": True}
    folder = tiny.write_llava(tmp_path / "llava", clip=clip, added=("<im_patch>", "<im_start>", "<im_end>"), **changes)
    kept, stripped = (llava.load(folder, legacy_strip=strip).prepare(ASKED).token_ids for strip in (False, True))
    newline = 3 + ord("\n")  # byte pieces follow <unk> <s> </s>
    assert newline in kept[kept.index(-200) :][:4]
    assert newline not in stripped[stripped.index(-200) :][:4]


# ------------------------------------------------------------------------------------------------ raw prompts


def test_a_raw_prompt_gets_a_bos_and_no_template(vlm: llava.Assistant) -> None:
    prepared = vlm.prepare("Once upon a time")
    assert prepared.prompt == "Once upon a time"
    assert prepared.token_ids[0] == 1
    assert prepared.token_ids.count(1) == 1
    assert list(prepared.ids) == prepared.token_ids
    assert prepared.pixels is None
    assert list(prepared.views) == []


def test_special_tokens_in_a_raw_prompt_are_parsed(vlm: llava.Assistant) -> None:
    ids = vlm.prepare("Yes.</s>No.").token_ids
    assert ids.count(2) == 1


def test_a_rendered_prompt_given_raw_has_the_same_ids(vlm: llava.Assistant) -> None:
    prepared = vlm.prepare(TALK)
    raw = vlm.prepare(prepared.prompt, images=[photo(40, 70, seed=1)])
    assert raw.token_ids == prepared.token_ids
    assert torch.equal(raw.pixels, prepared.pixels)


# ------------------------------------------------------------------------------------------------ ModelInput


def test_token_ids_have_one_image_id_a_picture_and_ids_one_a_patch(vlm: llava.Assistant) -> None:
    prepared = vlm.prepare([user("Compare.", photo(), photo(seed=1))])
    assert isinstance(prepared.token_ids, list)
    assert all(type(i) is int for i in prepared.token_ids)
    assert prepared.token_ids.count(-200) == 2
    assert len(prepared.ids) == len(prepared.token_ids) + 2 * (tiny.N_PATCHES - 1)
    assert len(vlm.logits([user("Compare.", photo(), photo(seed=1))])) == len(prepared.ids)


def test_pixels_are_all_views_of_all_pictures_in_order(anyres: llava.Assistant) -> None:
    wide, square = photo(120, 30), photo(50, 50, seed=1)
    prepared = anyres.prepare([user("Compare.", wide, square)])
    assert prepared.pixels.dtype == torch.float32
    assert prepared.pixels.shape == (sum(prepared.views), 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert list(prepared.views) == [4, 3]  # base + 3 x 1 tiles, base + 1 x 2 tiles
    assert [tuple(size) for size in prepared.image_sizes] == [(120, 30), (50, 50)]
    alone = [anyres.prepare([user("?", picture)]).pixels for picture in (wide, square)]
    assert torch.equal(prepared.pixels, torch.cat(alone))


def test_a_cropped_or_padded_picture_is_one_view(clip: Path, vlm: llava.Assistant, tmp_path: Path) -> None:
    square = llava.load(tiny.write_llava(tmp_path / "square", clip=clip, image_aspect_ratio="square"))
    for assistant in (vlm, square):
        assert list(assistant.prepare([user("?", photo(), photo(seed=1))]).views) == [1, 1]
    assert not torch.equal(vlm.prepare(ASKED).pixels, square.prepare(ASKED).pixels)


def test_padding_uses_the_mean_colour_and_cropping_takes_the_centre(clip: Path, tmp_path: Path) -> None:
    size, mean, std = tiny.IMAGE_SIZE, torch.tensor(tiny.MEAN), torch.tensor(tiny.STD)
    white = Image.new("RGB", (size * 2, size), "white")
    padded, cropped = (
        llava.load(tiny.write_llava(tmp_path / mode, clip=clip, image_aspect_ratio=mode)).prepare([user("?", white)])
        for mode in ("pad", "square")
    )
    colour = (padded.pixels[0, :, 0, 0] * std + mean) * 255
    assert colour.round().tolist() == [122, 116, 104]
    assert ((cropped.pixels[0] - ((1 - mean) / std).view(3, 1, 1)).abs() < 1e-5).all()


def test_image_mode_hf_crops_the_centre_as_the_exported_models_do(clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    square = llava.load(tiny.write_llava(tmp_path / "square", clip=clip, image_aspect_ratio="square"))
    wide = [user("?", photo(112, 56))]
    hf, original = (llava.load(checkpoint, image_mode=mode).prepare(wide).pixels for mode in ("hf", "original"))
    assert torch.equal(original, llava.load(checkpoint).prepare(wide).pixels)
    assert not torch.equal(hf, original)
    torch.testing.assert_close(hf, square.prepare(wide).pixels, rtol=0, atol=1e-5)


def test_exif_orientation_is_applied_only_on_request(checkpoint: Path, vlm: llava.Assistant, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    photo(60, 40).save(tmp_path / "a.jpg", exif=exif)
    asked = [user("?", tmp_path / "a.jpg")]
    turned = llava.load(checkpoint, exif=True).prepare(asked)
    assert [tuple(size) for size in vlm.prepare(asked).image_sizes] == [(60, 40)]
    assert [tuple(size) for size in turned.image_sizes] == [(40, 60)]
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    assert torch.equal(turned.pixels, vlm.prepare([user("?", upright)]).pixels)


# ------------------------------------------------------------------------------------------------ unusual pictures


def test_a_picture_of_1_by_4000_pixels_works(vlm: llava.Assistant, anyres: llava.Assistant) -> None:
    for size, assistant in itertools.product([(1, 4000), (4000, 1)], [vlm, anyres]):
        reply = assistant.generate([user("What is it?", Image.new("RGB", size, "red"))], max_new_tokens=4)
        assert len(reply.token_ids) == 4


def test_an_animated_picture_gives_its_first_frame(vlm: llava.Assistant, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "first.gif")
    animated, first = (vlm.prepare([user("?", tmp_path / name)]) for name in ("a.gif", "first.gif"))
    assert torch.equal(animated.pixels, first.pixels)
    assert list(animated.views) == [1]


def test_a_file_that_is_not_a_picture_is_an_error_that_names_it(vlm: llava.Assistant, tmp_path: Path) -> None:
    (tmp_path / "words.jpg").write_text("a thousand of them")
    photo().save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-400])
    (tmp_path / "empty.png").touch()
    for name in ("words.jpg", "half.png", "empty.png", "missing.png"):
        with pytest.raises(LlavaError, match=name):
            vlm.prepare([user("?", tmp_path / name)])
    with pytest.raises(LlavaError):
        vlm.prepare([user("?", b"not a picture")])


# ------------------------------------------------------------------------------------------------ features and logits


def test_shapes_are_as_documented(vlm: llava.Assistant, anyres: llava.Assistant) -> None:
    pictures = [user("Compare.", photo(120, 30), photo(seed=1))]
    for assistant in (vlm, anyres):
        prepared = assistant.prepare(pictures)
        views = sum(prepared.views)
        features = assistant.vision_features(prepared.pixels)
        assert features.shape == (views, tiny.N_PATCHES, tiny.CLIP_DIM)
        assert assistant.project(features).shape == (views, tiny.N_PATCHES, 64)
        packed = assistant.image_embeddings(pictures)
        assert [one.shape[1] for one in packed] == [64, 64]
        assert sum(len(one) for one in packed) == len(prepared.ids) - (len(prepared.token_ids) - 2)
        assert assistant.logits(pictures).shape == (len(prepared.ids), tiny.PIECES)


def test_the_vocabulary_has_the_stored_rows(clip: Path, tmp_path: Path) -> None:
    assistant = llava.load(tiny.write_llava(tmp_path / "llava", clip=clip, vocab_size=tiny.PIECES + 64))
    assert assistant.logits(TEXT_ONLY).shape[1] == tiny.PIECES + 64


def test_the_class_token_is_kept_as_configured(clip: Path, tmp_path: Path) -> None:
    kept = llava.load(tiny.write_llava(tmp_path / "llava", clip=clip, mm_vision_select_feature="cls_patch"))
    prepared = kept.prepare(ASKED)
    assert kept.vision_features(prepared.pixels).shape[1] == tiny.N_PATCHES + 1
    assert len(prepared.ids) == len(prepared.token_ids) + tiny.N_PATCHES
    assert len(kept.logits(ASKED)) == len(prepared.ids)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu", "identity", tiny.ABSENT])
def test_projectors_of_every_kind_work(clip: Path, tmp_path: Path, kind: Any) -> None:
    assistant = llava.load(tiny.write_llava(tmp_path / "llava", clip=clip, mm_projector_type=kind))
    wanted = features = torch.randn(2, 5, tiny.CLIP_DIM, generator=torch.Generator().manual_seed(0))
    weights = list(tiny.projector_tensors(tiny.llava_config(mm_projector_type=kind), seed=1).values())
    for i, (weight, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
        wanted = torch.nn.functional.gelu(wanted) if i else wanted  # exact, with erf
        wanted = torch.nn.functional.linear(wanted, weight.float(), bias.float())
    torch.testing.assert_close(assistant.project(features), wanted, rtol=1e-5, atol=1e-5)


def test_image_embeddings_are_one_tensor_a_picture_inserted_at_the_marks(vlm: llava.Assistant) -> None:
    prepared = vlm.prepare(ASKED)
    (embeddings,) = vlm.image_embeddings(ASKED)
    assert embeddings.shape == (tiny.N_PATCHES, 64)
    assert torch.equal(embeddings, vlm.project(vlm.vision_features(prepared.pixels))[0])
    at = prepared.token_ids.index(-200)
    embedded = vlm.hidden_states(ASKED, [0])[0]
    assert torch.equal(embedded[at : at + tiny.N_PATCHES], embeddings)
    assert vlm.image_embeddings(TEXT_ONLY) == []


def test_anyres_packing_has_the_base_view_the_kept_grid_and_a_newline_a_row(anyres: llava.Assistant) -> None:
    picture = [user("?", photo(112, 56))]  # two tiles side by side without padding
    prepared = anyres.prepare(picture)
    assert list(prepared.views) == [3]
    projected = anyres.project(anyres.vision_features(prepared.pixels))
    (packed,) = anyres.image_embeddings(picture)
    grid = projected[1:].unflatten(1, (4, 4)).transpose(0, 1).flatten(1, 2)  # rows, columns of both tiles, D
    newline = tiny.tensor(1, "image_newline", (64,), 0.6).to(torch.bfloat16).to(packed.dtype)
    rows = torch.cat([grid, newline.expand(4, 1, 64)], dim=1)
    torch.testing.assert_close(packed, torch.cat([projected[0], rows.flatten(0, 1)]))


def test_hidden_states_are_those_of_the_named_layers(vlm: llava.Assistant) -> None:
    """tests/oracles/test_transformers.py compares them with transformers."""
    states = vlm.hidden_states(ASKED, [0, 1, -1])
    assert list(states) == [0, 1, -1]
    assert {tuple(state.shape) for state in states.values()} == {(len(vlm.prepare(ASKED).ids), 64)}
    llama = tiny.llama_tensors(tiny.llama_config(), 1, inv_freq=False)
    torch.testing.assert_close(whole_pass(llama, states[0]), vlm.logits(ASKED), rtol=0, atol=1e-4)
    torch.testing.assert_close(states[-1] @ llama["lm_head.weight"].float().T, vlm.logits(ASKED), rtol=0, atol=1e-4)
    assert torch.equal(vlm.hidden_states(ASKED, [2])[2], states[-1])  # the last one is normed, as in transformers


def test_embedding_rows_are_hidden_state_0_of_text(vlm: llava.Assistant) -> None:
    table = tiny.llama_tensors(tiny.llama_config(), 1, inv_freq=False)["model.embed_tokens.weight"].float()
    prepared = vlm.prepare("Once upon a time")
    assert torch.equal(vlm.hidden_states("Once upon a time", [0])[0], table[prepared.token_ids])


def test_a_layer_that_does_not_exist_is_an_error(vlm: llava.Assistant) -> None:
    with pytest.raises(LlavaError, match="3"):
        vlm.hidden_states(TEXT_ONLY, [3])


# ------------------------------------------------------------------------------------------------ plain Llama


def test_without_vision_it_is_the_same_language_model(checkpoint: Path, vlm: llava.Assistant) -> None:
    llama = llava.load(checkpoint, vision=False)
    assert torch.equal(llama.logits(TEXT_ONLY), vlm.logits(TEXT_ONLY))
    assert torch.equal(llama.logits("Once upon a time"), vlm.logits("Once upon a time"))
    assert llama.generate(TEXT_ONLY, max_new_tokens=16).text == vlm.generate(TEXT_ONLY, max_new_tokens=16).text


def test_without_vision_clip_is_never_read(tmp_path: Path, vlm: llava.Assistant) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=tmp_path / "not-there")
    llama = llava.load(folder, vision=False, vision_tower=tmp_path / "neither")  # the option is ignored
    assert torch.equal(llama.logits(TEXT_ONLY), vlm.logits(TEXT_ONLY))


def test_without_vision_a_broken_projector_does_not_matter(tmp_path: Path, vlm: llava.Assistant) -> None:
    folder = tiny.write_llava(tmp_path / "llava", layout="bin", clip=tmp_path / "not-there")
    tensors = torch.load(folder / "pytorch_model.bin")
    del tensors["model.mm_projector.2.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(llava.load(folder, vision=False).logits("A word"), vlm.logits("A word"))


def test_without_vision_pictures_are_an_error(checkpoint: Path) -> None:
    llama = llava.load(checkpoint, vision=False)
    with pytest.raises(LlavaError):
        llama.generate(ASKED)
    with pytest.raises(LlavaError):
        llama.ask(photo(), "What is it?")


def test_a_plain_llama_folder_is_the_same_language_model(tmp_path: Path, vlm: llava.Assistant) -> None:
    for layout in tiny.LAYOUTS:
        llama = llava.load(tiny.write_llama(tmp_path / layout, layout=layout))
        assert torch.equal(llama.logits("Once upon a time"), vlm.logits("Once upon a time"))


# ------------------------------------------------------------------------------------------------ templates


def rendered(folder: Path, **options: Any) -> str:
    return llava.load(folder, **options).prepare([user("Hello.")]).prompt


def mistral(target: Path) -> Path:
    heads = {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 1e6}
    return tiny.write_llava(target, clip=target.parent / "clip", **heads)


def chatml(target: Path) -> Path:
    tiny.write_llava(target, clip=target.parent / "clip", added=("<|im_end|>",))
    tiny.write_tokenizer(target, added=("<|im_end|>",), eos="<|im_end|>")
    return target


def padded(target: Path) -> Path:
    tiny.write_llava(target, clip=target.parent / "clip", added=("[PAD]",))
    tiny.write_tokenizer(target, added=("[PAD]",), pad="[PAD]")
    return target


def writer(**changes: Any) -> Callable[[Path], Path]:
    return lambda target: tiny.write_llava(target, clip=target.parent / "clip", **changes)


LINEAR: dict[str, Any] = {"mm_projector_type": tiny.ABSENT}
DECIDED = {
    "v1.5": (writer(), "llava_v1"),
    "8 key-value heads and theta 1e6": (mistral, "mistral_instruct"),
    "eos is im_end": (chatml, "chatml_direct"),
    "[PAD] among the special tokens": (padded, "llava_v0"),
    "LlamaForCausalLM beside LLaVA keys": (writer(architectures=["LlamaForCausalLM"]), "llava_v0"),
    "linear projector, 4096 positions": (writer(**LINEAR), "llava_llama_2"),
    "linear projector, 2048 positions": (writer(**LINEAR, max_position_embeddings=2048), "llava_v1"),
    "Llama-2-chat recorded as the base": (
        writer(**LINEAR, max_position_embeddings=2048, _name_or_path="meta-llama/Llama-2-7b-chat-hf"),
        "llava_llama_2",
    ),
}


@pytest.mark.parametrize("case", DECIDED)
def test_the_default_template_follows_from_config_tokenizer_and_tensors(tmp_path: Path, case: str) -> None:
    write, template = DECIDED[case]
    tiny.write_clip(tmp_path / "clip")
    folder = write(tmp_path / "llava-v1.5-mpt-mistral-llama-2-plain")  # the name must not matter
    assert rendered(folder) == rendered(folder, template=template)
    others = {"llava_v1", "llava_llama_2", "mistral_instruct", "chatml_direct"} - {template}
    assert rendered(folder) not in {rendered(folder, template=other) for other in others}


def test_a_template_given_to_load_or_to_a_call_takes_precedence(checkpoint: Path, vlm: llava.Assistant) -> None:
    called = vlm.prepare([user("Hello.")], template="mistral_instruct").prompt
    assert called == "[INST] Hello. [/INST]"
    assert rendered(checkpoint, template="mistral_instruct") == called
    assert vlm.prepare([user("Hello.")]).prompt.startswith(SYSTEM)  # a call does not affect the next one


def test_an_unknown_template_is_an_error_that_names_it(vlm: llava.Assistant) -> None:
    with pytest.raises(LlavaError, match="no_such_template"):
        vlm.prepare([user("Hello.")], template="no_such_template")


def test_a_plain_llama_has_no_template_of_its_own(tmp_path: Path) -> None:
    llama = llava.load(tiny.write_llama(tmp_path / "llama"))
    with pytest.raises(LlavaError, match="template"):
        llama.prepare([user("Hello.")])
    assert llama.prepare([user("Hello.")], template="mistral_instruct").prompt == "[INST] Hello. [/INST]"
    assert llama.prepare("Once upon a time").prompt == "Once upon a time"  # a raw prompt needs no template


# ------------------------------------------------------------------------------------------------ generating


def test_a_reply_has_text_ids_reason_usage_and_timings(vlm: llava.Assistant) -> None:
    reply = vlm.generate(ASKED, max_new_tokens=12)
    assert len(reply.token_ids) == 12
    assert all(type(i) is int for i in reply.token_ids)
    assert reply.finish_reason == "length"
    assert reply.text == reply.text.strip()
    assert reply.timings is not None
    assert field(reply.usage, "prompt_tokens") == len(vlm.prepare(ASKED).ids)
    assert field(reply.usage, "image_tokens") == tiny.N_PATCHES
    assert field(reply.usage, "completion_tokens") == 12
    assert field(vlm.generate(TEXT_ONLY, max_new_tokens=1).usage, "image_tokens") == 0


def test_defaults_are_512_new_tokens_and_greedy(vlm: llava.Assistant) -> None:
    reply = vlm.generate(TEXT_ONLY)
    assert len(reply.token_ids) == 512
    assert reply.token_ids[:20] == vlm.generate(TEXT_ONLY, temperature=0, max_new_tokens=20).token_ids


def test_the_first_new_token_has_the_largest_logit(vlm: llava.Assistant) -> None:
    for messages in (ASKED, TEXT_ONLY, TALK):
        assert vlm.generate(messages, max_new_tokens=1).token_ids == [int(vlm.logits(messages)[-1].argmax())]


def test_generating_with_the_cache_equals_whole_forward_passes(vlm: llava.Assistant) -> None:
    llama = tiny.llama_tensors(tiny.llama_config(), 1, inv_freq=False)
    for messages in ("Once upon a time", ASKED, TALK):
        reply = vlm.generate(messages, max_new_tokens=20)
        new = llama["model.embed_tokens.weight"].float()[reply.token_ids]
        logits = whole_pass(llama, torch.cat([vlm.hidden_states(messages, [0])[0], new]))
        assert logits[-21:-1].argmax(-1).tolist() == reply.token_ids


def whole_pass(llama: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The small Llama without a cache, implemented independently: embeddings [S, D] to logits [S, V]."""
    w = {key.removesuffix(".weight"): value.float() for key, value in llama.items()}
    places = len(x)
    angles = torch.arange(places)[:, None] * 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    cos, sin = (torch.cat([turn(angles)] * 2, dim=-1) for turn in (torch.cos, torch.sin))
    future = torch.full((places, places), -torch.inf).triu(1)

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(y, (64,), w[name], eps=1e-5)

    def rotated(y: torch.Tensor) -> torch.Tensor:
        return y * cos + torch.cat([-y[..., 8:], y[..., :8]], dim=-1) * sin

    for block in ("model.layers.0.", "model.layers.1."):
        y = norm(x, f"{block}input_layernorm")
        q, k, v = ((y @ w[f"{block}self_attn.{part}_proj"].T).unflatten(-1, (4, 16)).transpose(0, 1) for part in "qkv")
        looks = (rotated(q) @ rotated(k).transpose(1, 2) / 4 + future).softmax(-1)
        x = x + (looks @ v).transpose(0, 1).flatten(1) @ w[f"{block}self_attn.o_proj"].T
        y = norm(x, f"{block}post_attention_layernorm")
        gated = torch.nn.functional.silu(y @ w[f"{block}mlp.gate_proj"].T) * (y @ w[f"{block}mlp.up_proj"].T)
        x = x + gated @ w[f"{block}mlp.down_proj"].T
    return norm(x, "model.norm") @ w["lm_head"].T


MIXED: list[Any] = [
    TEXT_ONLY,
    ASKED,
    "Once upon a time",
    TALK,
    ("A picture <image> and a word", [photo(seed=5)]),
    [user("Compare.", photo(seed=6), photo(30, 90, seed=7))],
    "a",
]


def alone(assistant: llava.Assistant, item: Any, **options: Any) -> Any:
    prompt, images = item if isinstance(item, tuple) else (item, None)
    return assistant.generate(prompt, images=images, **options)


def test_a_batch_gives_the_same_tokens_as_one_by_one(vlm: llava.Assistant, anyres: llava.Assistant) -> None:
    for assistant in (vlm, anyres):
        together = assistant.generate_batch(MIXED, max_new_tokens=32)
        apart = [alone(assistant, item, max_new_tokens=32) for item in MIXED]
        assert [reply.token_ids for reply in together] == [reply.token_ids for reply in apart]
        assert [reply.text for reply in together] == [reply.text for reply in apart]
        assert [field(reply.usage, "prompt_tokens") for reply in together] == [
            field(reply.usage, "prompt_tokens") for reply in apart
        ]


def test_rows_of_a_batch_stop_independently(vlm: llava.Assistant) -> None:
    texts = [alone(vlm, item, max_new_tokens=32).text for item in MIXED]
    stop = texts[1][8:11]
    together = vlm.generate_batch(MIXED, max_new_tokens=32, stop=[stop])
    apart = [alone(vlm, item, max_new_tokens=32, stop=[stop]) for item in MIXED]
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in apart]
    assert [reply.finish_reason for reply in together] == [reply.finish_reason for reply in apart]
    assert {reply.finish_reason for reply in together} == {"stop", "length"}


def test_an_empty_batch_has_no_answers(vlm: llava.Assistant) -> None:
    assert list(vlm.generate_batch([])) == []


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 2.5, "seed": 4, "top_k": 400}]
)
def test_streamed_pieces_join_to_the_text_of_generate(vlm: llava.Assistant, options: dict[str, Any]) -> None:
    for messages in (ASKED, TEXT_ONLY, TALK, "Once upon a time"):
        pieces = list(vlm.stream(messages, max_new_tokens=96, **options))
        assert "".join(pieces) == vlm.generate(messages, max_new_tokens=96, **options).text
        assert len(pieces) > 1
        assert all(isinstance(piece, str) for piece in pieces)


def test_pieces_arrive_during_generation(vlm: llava.Assistant) -> None:
    pieces = vlm.stream(TEXT_ONLY, max_new_tokens=2000)
    first = next(piece for piece in pieces if piece)
    assert vlm.generate(TEXT_ONLY, max_new_tokens=64).text.startswith(first)
    del pieces  # abandoning the stream is allowed
    assert len(vlm.generate(TEXT_ONLY, max_new_tokens=8).token_ids) == 8


def test_stop_strings_end_an_answer_and_are_never_emitted(vlm: llava.Assistant) -> None:
    whole = vlm.generate(ASKED, max_new_tokens=48)
    for start, length in ((10, 1), (14, 2), (20, 5), (30, 9)):
        stop = whole.text[start : start + length]
        if not stop.strip():
            continue
        reply = vlm.generate(ASKED, max_new_tokens=48, stop=[stop])
        assert reply.text == whole.text[: whole.text.index(stop)].strip()
        assert reply.finish_reason == "stop"
        assert reply.token_ids == whole.token_ids[: len(reply.token_ids)]
        assert len(reply.token_ids) < 48
        assert "".join(vlm.stream(ASKED, max_new_tokens=48, stop=[stop])) == reply.text


def test_stop_may_be_one_string(vlm: llava.Assistant) -> None:
    stop = vlm.generate(ASKED, max_new_tokens=48).text[20:25]
    as_list = vlm.generate(ASKED, max_new_tokens=48, stop=[stop])
    assert vlm.generate(ASKED, max_new_tokens=48, stop=stop).text == as_list.text


def test_the_first_stop_string_that_occurs_ends_the_answer(vlm: llava.Assistant) -> None:
    whole = vlm.generate(ASKED, max_new_tokens=48).text
    late, early = whole[30:34], whole[12:15]
    reply = vlm.generate(ASKED, max_new_tokens=48, stop=["never in there", late, early])
    assert reply.text == whole[: min(whole.index(late), whole.index(early))].strip()


def test_a_stop_string_that_never_occurs_changes_nothing(vlm: llava.Assistant) -> None:
    whole = vlm.generate(ASKED, max_new_tokens=48)
    almost = whole.text[20:24] + "\x00"
    assert vlm.generate(ASKED, max_new_tokens=48, stop=[almost]).token_ids == whole.token_ids
    assert "".join(vlm.stream(ASKED, max_new_tokens=48, stop=[almost])) == whole.text


def writes_only(folder: Path, text: str) -> None:
    """Changes the weights so that the last token of `text` follows every token."""
    tensors = torch.load(folder / "pytorch_model.bin")
    token = llava.load(folder).prepare(text).token_ids[-1]
    for key, value in tensors.items():
        if key.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            value.zero_()
    tensors["model.embed_tokens.weight"].fill_(1)
    tensors["lm_head.weight"][token] = 1
    torch.save(tensors, folder / "pytorch_model.bin")


def test_the_templates_stop_string_does_not_apply_to_raw_prompts(clip: Path, tmp_path: Path) -> None:
    folder = tiny.write_llava(tmp_path / "llava", layout="bin", clip=clip)
    writes_only(folder, "#")
    assistant = llava.load(folder)
    stopped = assistant.generate(TEXT_ONLY, template="llava_v0", max_new_tokens=12)  # its stop string is ###
    assert (stopped.text, stopped.token_ids, stopped.finish_reason) == ("", [], "stop")
    assert "".join(assistant.stream(TEXT_ONLY, template="llava_v0", max_new_tokens=12)) == ""
    other = assistant.generate(TEXT_ONLY, template="llava_v1", max_new_tokens=12)
    raw = assistant.generate("###Human: Hello.###Assistant:", max_new_tokens=12)
    assert (other.text, other.finish_reason) == ("#" * 12, "length")
    assert (raw.text, raw.finish_reason) == ("#" * 12, "length")


def test_the_end_token_of_generation_config_ends_an_answer(clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    whole = llava.load(checkpoint).generate(ASKED, max_new_tokens=32)
    at = next(i for i in range(5, 32) if whole.token_ids[i] not in whole.token_ids[:i])
    folder = tmp_path / "llava"
    shutil.copytree(checkpoint, folder)
    tiny.edit_json(folder / "generation_config.json", eos_token_id=[2, whole.token_ids[at]])
    reply = llava.load(folder).generate(ASKED, max_new_tokens=32)
    assert reply.finish_reason == "stop"
    assert reply.token_ids == whole.token_ids[:at]
    assert whole.text.startswith(reply.text)
    batch = llava.load(folder).generate_batch([ASKED, TEXT_ONLY], max_new_tokens=32)
    assert batch[0].token_ids == reply.token_ids


def test_the_end_token_of_the_tokenizer_ends_an_answer(clip: Path, tmp_path: Path) -> None:
    folder = tiny.write_llava(tmp_path / "llava", layout="bin", clip=clip)
    whole = llava.load(folder).generate(TEXT_ONLY, max_new_tokens=32)
    at = next(i for i in range(5, 32) if whole.token_ids[i] not in whole.token_ids[:i])
    tensors = torch.load(folder / "pytorch_model.bin")
    head = tensors["lm_head.weight"]
    head[2] = head[whole.token_ids[at]] * 1.01  # </s> replaces that token
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "generation_config.json").unlink()
    tiny.edit_json(folder / "config.json", eos_token_id=0)  # wrong, as in old files; the tokenizer has the right one
    reply = llava.load(folder).generate(TEXT_ONLY, max_new_tokens=32)
    assert reply.finish_reason == "stop"
    assert reply.token_ids == whole.token_ids[:at]
    assert "</s>" not in reply.text


# ------------------------------------------------------------------------------------------------ sampling


def sampled(assistant: llava.Assistant, **options: Any) -> list[int]:
    return assistant.generate(TEXT_ONLY, max_new_tokens=48, **{"temperature": 1.0, "seed": 0, **options}).token_ids


def test_a_seed_makes_sampling_reproducible(vlm: llava.Assistant) -> None:
    assert sampled(vlm, seed=1) == sampled(vlm, seed=1)
    assert len({tuple(sampled(vlm, seed=seed)) for seed in range(4)}) == 4


def test_sampling_does_not_use_the_global_generator(vlm: llava.Assistant) -> None:
    before = torch.get_rng_state()
    sampled(vlm, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_the_narrowest_sampling_is_greedy(vlm: llava.Assistant, options: dict[str, Any]) -> None:
    assert sampled(vlm, **options) == sampled(vlm, temperature=0)


def test_top_k_top_p_and_min_p_select_only_likely_tokens(vlm: llava.Assistant) -> None:
    probabilities = (vlm.logits(TEXT_ONLY)[-1] / 1.5).softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    nucleus = int((ordered.cumsum(0) < 0.5).sum()) + 1
    allowed = {
        "top_k": set(order[:5].tolist()),
        "top_p": set(order[:nucleus].tolist()),
        "min_p": set(order[ordered >= 0.5 * ordered[0]].tolist()),
    }
    for name, value in (("top_k", 5), ("top_p", 0.5), ("min_p", 0.5)):
        options = {"max_new_tokens": 1, "temperature": 1.5, name: value}
        seen = {vlm.generate(TEXT_ONLY, seed=seed, **options).token_ids[0] for seed in range(60)}
        assert seen <= allowed[name], name
        assert len(allowed[name]) == 1 or len(seen) > 1, name


def test_temperature_1_samples_from_the_models_distribution(vlm: llava.Assistant) -> None:
    probabilities = vlm.logits(TEXT_ONLY)[-1].softmax(-1)
    draws = [vlm.generate(TEXT_ONLY, max_new_tokens=1, temperature=1.0, seed=seed).token_ids[0] for seed in range(300)]
    counts = torch.bincount(torch.tensor(draws), minlength=tiny.PIECES)
    torch.testing.assert_close(counts / 300, probabilities, rtol=0, atol=0.1)  # 3.5 standard deviations at most
    assert counts.count_nonzero() > 5


def test_a_large_repetition_penalty_prevents_repetition(vlm: llava.Assistant) -> None:
    free = vlm.generate(TEXT_ONLY, max_new_tokens=64).token_ids
    ids = vlm.generate(TEXT_ONLY, max_new_tokens=64, repetition_penalty=1e6).token_ids
    assert len(set(free)) < len(free)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("logprobs", [1, 5, True])
def test_logprobs_are_those_of_the_model(vlm: llava.Assistant, logprobs: int) -> None:
    reply = vlm.generate(TEXT_ONLY, max_new_tokens=8, logprobs=logprobs)
    assert len(reply.logprobs) == 8
    first = vlm.logits(TEXT_ONLY)[-1].log_softmax(-1)[reply.token_ids[0]]
    assert reply.logprobs[0] == pytest.approx(float(first), abs=1e-4)
    assert all(value <= 0 for value in reply.logprobs)


@pytest.mark.parametrize(
    "options",
    [
        *[{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2.0}, {"max_new_tokens": -1}],
        {"repetition_penalty": 0.0},
    ],
)
def test_invalid_sampling_options_are_errors(vlm: llava.Assistant, options: dict[str, Any]) -> None:
    with pytest.raises(LlavaError, match=next(iter(options))):
        vlm.generate(TEXT_ONLY, **{"temperature": 1.0, **options})


# ------------------------------------------------------------------------------------------------ context


def test_a_prompt_longer_than_the_context_is_an_error_that_states_tokens_and_limit(
    clip: Path, vlm: llava.Assistant, tmp_path: Path
) -> None:
    short = llava.load(tiny.write_llava(tmp_path / "llava", clip=clip, max_position_embeddings=96))
    long = "word " * 200
    tokens = len(vlm.prepare(long).ids)
    jobs: list[Callable[[], Any]] = [
        lambda: short.generate(long),
        lambda: list(short.stream(long)),
        lambda: short.logits(long),
        lambda: short.hidden_states(long, [-1]),
        lambda: short.generate_batch(["a", long]),
    ]
    for job in jobs:
        with pytest.raises(LlavaError, match=rf"\b{tokens}\b") as caught:
            job()
        assert "96" in str(caught.value)
    assert short.generate("a", max_new_tokens=4).token_ids  # the model still works


def test_pictures_count_towards_the_context(clip: Path, tmp_path: Path) -> None:
    short = llava.load(tiny.write_llava(tmp_path / "llava", clip=clip, max_position_embeddings=40))
    marks = "<image>" * 3  # 48 tokens
    with pytest.raises(LlavaError, match="40"):
        short.generate(marks, images=[photo()] * 3)


def test_an_answer_ends_at_the_end_of_the_context(clip: Path, tmp_path: Path) -> None:
    short = llava.load(tiny.write_llava(tmp_path / "llava", clip=clip, max_position_embeddings=64))
    prompt = "Once upon a time"
    room = 64 - len(short.prepare(prompt).ids)
    reply = short.generate(prompt, max_new_tokens=500)
    assert reply.finish_reason == "length"
    assert room <= len(reply.token_ids) <= room + 1
