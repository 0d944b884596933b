"""llava-hf's layout: read as in transformers, and written so that transformers can open it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import llava
from llava.assistant import question_about
from llava.checkpoint.open import open_checkpoint
from llava.config import IMAGE
from llava.convert.convert import convert
from llava.errors import CheckpointError
from llava.formats.chat_template import chat_template
from llava.formats.llava import Llava
from llava.preprocess.templates import TEMPLATES
from llava.tensors.shards import open_weights
from tests import tiny

NAMES = ("single", "two_images", "multi_turn", "text_only")
LAYOUTS = ("old", "new")


@pytest.fixture(scope="module", params=LAYOUTS)
def assistant(golden_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> llava.Assistant:
    nonsense = tmp_path_factory.mktemp("hf") / "mistral-mpt-lora"
    nonsense.symlink_to((golden_checkpoints / "h_hf" / f"llava-1.5-7b-hf-{request.param}").resolve())
    return llava.load(nonsense, dtype="float32", device="cpu")


class Golden:
    def __init__(self, golden: Path, name: str):
        folder = golden / "h_hf" / "golden"
        record = json.loads((folder / "prompts.json").read_text())
        self.entry: dict[str, Any] = next(entry for entry in record["prompts"] if entry["id"] == name)
        self.vocab_ids = record["vocab_ids_of_logits_at_ids"]
        self.images = [golden / "images" / image for image in self.entry["images"]]
        self.tensors: dict[str, Tensor] = load_file(folder / f"{name}.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_ids_pixels_logits_and_answers_are_those_of_transformers(
    golden: Path, assistant: llava.Assistant, name: str
) -> None:
    case = Golden(golden, name)
    prompt, images = case.entry["prompt"], case.images
    input = assistant.prepare(prompt, images=images)
    assert [32000 if id == IMAGE else id for id in input.token_ids] == case.entry["input_ids"]
    if images:
        assert input.pixels is not None
        torch.testing.assert_close(input.pixels, case.tensors["pixel_values"], atol=1e-6, rtol=0)
        projected = torch.cat([part[None] for part in assistant.image_embeddings(prompt, images=images)])
        torch.testing.assert_close(projected, case.tensors["projector_output"], atol=5e-5, rtol=0)
    logits = assistant.logits(prompt, images=images)
    torch.testing.assert_close(logits[-1], case.tensors["logits_last"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[:, case.vocab_ids], case.tensors["logits_at_ids"], atol=1e-4, rtol=0)
    reply = assistant.generate(prompt, images=images, max_new_tokens=32, temperature=0)
    assert reply.token_ids == case.entry["generated_ids"]
    assert reply.text == case.entry["generated_text"]


def test_the_originals_way_with_pictures_is_an_option(golden: Path, golden_checkpoints: Path) -> None:
    folder = golden_checkpoints / "h_hf" / "llava-1.5-7b-hf-old"
    assistant = llava.load(folder, dtype="float32", device="cpu", image_mode="original")
    original = load_file(golden / "a_v1.5" / "golden" / "single.safetensors")
    record = json.loads((golden / "a_v1.5" / "golden" / "prompts.json").read_text())["prompts"]
    entry = next(entry for entry in record if entry["id"] == "single")
    images = [golden / "images" / image for image in entry["images"]]
    input = assistant.prepare(entry["prompt"], images=images)
    assert input.token_ids == entry["input_ids"]
    torch.testing.assert_close(input.pixels, original["pixel_values"], atol=1e-6, rtol=0)
    logits = assistant.logits(entry["prompt"], images=images)[-1, :32000]
    torch.testing.assert_close(logits, original["logits_last"][:32000], atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------- written

PICTURES = [Image.linear_gradient("L").resize(size).convert("RGB") for size in ((96, 64), (40, 120))]
PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"
FORMS = {"1.5": {}, "1.6": {"tower_seed": 5, "layout": "safetensors-shards", **tiny.ANYRES}}


@pytest.fixture(scope="module")
def made(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function that writes a small LLaVA of one version in the original's layout."""
    out = tmp_path_factory.mktemp("original")

    def make(form: str) -> Path:
        folder = out / form
        return folder if folder.is_dir() else tiny.write_llava(folder, clip=clip, **FORMS[form])

    return make


@pytest.mark.parametrize("form", FORMS)
def test_transformers_opens_the_export_and_computes_the_same(
    made: Callable[[str], Path], tmp_path: Path, form: str
) -> None:
    transformers = pytest.importorskip("transformers")
    convert(made(form), tmp_path / "hf", to="llava-hf", verify=True)
    kind = {"1.5": "LlavaForConditionalGeneration", "1.6": "LlavaNextForConditionalGeneration"}[form]
    theirs, info = getattr(transformers, kind).from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "again")  # with the newer tensor names
    for file in (tmp_path / "hf").glob("*token*"):
        shutil.copy(file, tmp_path / "again")
    shutil.copy(tmp_path / "hf" / "preprocessor_config.json", tmp_path / "again")
    for picture in PICTURES:
        inputs = processor(images=picture, text=PROMPT, return_tensors="pt")
        with torch.inference_mode():
            expected = theirs(**inputs).logits[0]
        for folder in ("hf", "again"):
            # pads like LLaVA if the folder's processor says so; splits text like transformers
            ours = llava.load(tmp_path / folder, dtype="float32", device="cpu", image_mode="hf")
            input = ours.prepare(PROMPT, images=[picture])
            assert [512 if id == IMAGE else id for id in input.ids.tolist()] == inputs["input_ids"][0].tolist()
            if form == "1.6":
                assert torch.equal(input.pixels, inputs["pixel_values"][0])
                logits = ours.logits(PROMPT, images=[picture])
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    if form == "1.5":
        ours = llava.load(tmp_path / "hf", dtype="float32", device="cpu")
        input = ours.prepare(PROMPT, images=[picture])
        assert torch.equal(input.pixels, inputs["pixel_values"])


def test_an_export_answers_as_the_original_did(made: Callable[[str], Path], tmp_path: Path) -> None:
    """When we open it: our own config keys record what the layout has no key for."""
    for form in FORMS:
        convert(made(form), tmp_path / form, to="llava-hf")
        before, after = (llava.load(f, dtype="float32", device="cpu") for f in (made(form), tmp_path / form))
        assert after.config.template == before.config.template
        for picture in PICTURES:
            asked = question_about(picture, "What is unusual about it?")
            replies = [one.generate(asked, max_new_tokens=12).token_ids for one in (before, after)]
            assert replies[0] == replies[1], form


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor under its name on disk, without the buffers that every reader recomputes."""
    weights = open_weights(folder)
    return {name: weights[name] for name in weights if "inv_freq" not in name}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


WAYS = [(form, to) for form in ("1.5", "1.6") for to in ("native", "llava-hf")]
WAYS += [("mpt", "native"), ("llama", "native")]


@pytest.mark.parametrize(("form", "to"), WAYS)
def test_back_and_forth_gives_the_same_bytes(
    made: Callable[[str], Path], clip: Path, tmp_path: Path, form: str, to: str
) -> None:
    if form == "mpt":
        folder = tiny.write_mpt(tmp_path / "mpt", clip=clip)
    else:
        folder = tiny.write_llama(tmp_path / "llama") if form == "llama" else made(form)
    convert(folder, tmp_path / "there", to=to, verify=True, check=True)
    convert(tmp_path / "there", tmp_path / "back", to="llama" if form == "llama" else "llava", verify=True)
    before, after = stored(folder), stored(tmp_path / "back")
    assert set(before) <= set(after)
    assert all("vision_tower" in name for name in set(after) - set(before))  # the tower is copied into the checkpoint
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(bits(tensor), bits(after[name])), name
    tokens = [open_checkpoint(f).tokenizer for f in (folder, tmp_path / "back")]
    assert tokens[0].size == tokens[1].size
    assert tokens[0].encode("A boat lies at the shore.") == tokens[1].encode("A boat lies at the shore.")
    assert open_checkpoint(folder).config == open_checkpoint(tmp_path / "back").config


@pytest.mark.parametrize("to", ["llava", "native"])
def test_rows_that_were_added_for_transformers_come_back_too(
    made: Callable[[str], Path], tmp_path: Path, to: str
) -> None:
    """Published llava-hf folders hold random values in these rows."""
    convert(made("1.6"), tmp_path / "hf", to="llava-hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name][512:] = tiny.tensor(7, name, tensors[name][512:].shape, 0.5)
    save_file(tensors, file, metadata={"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "there", to=to)
    if to == "llava":
        assert open_checkpoint(tmp_path / "there").config.decoder.vocab_size == 512
    convert(tmp_path / "there", tmp_path / "back", to="llava-hf")
    before, after = stored(tmp_path / "hf"), stored(tmp_path / "back")
    assert set(before) == set(after)
    assert not [name for name, tensor in before.items() if not torch.equal(bits(tensor), bits(after[name]))]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if chat_template(TEMPLATES[name])])
def test_transformers_renders_our_template_to_the_same_prompt(
    made: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(made("1.5"), tmp_path / "llava")
    tiny.edit_json(folder / "config.json", llava_template=name)
    convert(folder, tmp_path / "hf", to="llava-hf", check=False)
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    preprocessor = llava.load(tmp_path / "hf", device="cpu").preprocessor
    text = {"type": "text", "text": "What is it?\nSay."}
    first = [{"role": "user", "content": [{"type": "image", "image": PICTURES[0]}, text]}]
    more = [{"role": "assistant", "content": "A boat."}, {"role": "user", "content": "Why?"}]
    system = [{"role": "system", "content": "Be brief."}]
    for messages in (first, first + more, system + first):
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert rendered == preprocessor.prepare(messages).prompt


def test_the_report_lists_renamed_padded_and_omitted_tensors(
    made: Callable[[str], Path], clip: Path, tmp_path: Path
) -> None:
    convert(made("1.5"), tmp_path / "hf", to="llava-hf", verify=True, check=True)
    text = (tmp_path / "hf" / "conversion.md").read_text()
    assert "| `projector.N.weight` | `multi_modal_projector.linear_2.weight` | 1 |" in text
    assert "512 rows before, 576 here" in text
    assert "`model.layers.N.self_attn.rotary_emb.inv_freq` (2): recomputed" in text
    assert "every tensor has the same bits" in text
    assert "largest difference 0.0e+00" in text
    convert(tmp_path / "hf", tmp_path / "original", to="llava", check=False)
    text = (tmp_path / "original" / "conversion.md").read_text()
    assert "576 rows before, 512 here" in text
    assert "Logits were not compared" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mm_projector_type": "linear"}, "projector depth is 1"),
        ({"mm_use_im_start_end": True, "added": ("<im_start>", "<im_end>")}, "puts <im_start> and <im_end>"),
    ],
)
def test_what_the_layout_cannot_express_is_refused(
    clip: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    folder = tiny.write_llava(tmp_path / "llava", clip=clip, **changes)
    with pytest.raises(CheckpointError, match=reason):
        convert(folder, tmp_path / "hf", to="llava-hf")
    assert not (tmp_path / "hf").exists()


def test_a_wrong_conversion_does_not_pass_the_check(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a different eps in the written config, the tensors are equal but the logits differ."""
    write_config = Llava.write_config

    def wrong(*arguments: Any) -> dict[str, Any]:
        return write_config(*arguments) | {"rms_norm_eps": 0.1}

    monkeypatch.setattr(Llava, "write_config", wrong)
    with pytest.raises(CheckpointError, match="logits differ"):
        convert(made("1.6"), tmp_path / "original", to="llava")
    assert not (tmp_path / "original").exists()
