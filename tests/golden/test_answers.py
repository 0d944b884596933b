"""Compares our results with those of the original LLaVA, in float32 on the CPU. golden/README.md describes the data."""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import llava
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.formats.format import to_disk
from llava.formats.llava import rules_for
from tests import tiny

FEATURES_TOLERANCE, LOGITS_TOLERANCE = 5e-5, 1e-4  # largest absolute differences, from that README
FOLDERS = {
    "a_v1.5": "a_v1.5/llava-v1.5-7b",
    "b_llama2": "b_llama2/llava-llama-2-13b-chat-lightning-preview",
    "c_delta_v0": "c_delta_v0/LLaVA-7b-delta-v0",
    "d_delta_v1.1": "d_delta_v1.1/LLaVA-Lightning-7B-delta-v1-1",
    "e_lora": "e_lora/llava-v1-0719-336px-lora-vicuna-13b-v1.3",
    "f_mpt": "f_mpt/LLaVA-Lightning-MPT-7B-preview",
    "g_v1.6": "g_v1.6/llava-v1.6-vicuna-7b",
    "i_projector_only": "i_projector_only/llava-pretrain-vicuna-7b-v1.3",
    "j_language_only": "a_v1.5/llava-v1.5-7b",
}
TOWERS = {
    "a_v1.5": "openai/clip-vit-large-patch14-336",
    "b_llama2": "openai/clip-vit-large-patch14",
    "c_delta_v0": "openai/clip-vit-large-patch14",
    "d_delta_v1.1": "openai/clip-vit-large-patch14",
    "e_lora": "openai/clip-vit-large-patch14-336",
    "f_mpt": "openai/clip-vit-large-patch14",
    "g_v1.6": "openai/clip-vit-large-patch14-336",
    "i_projector_only": "openai/clip-vit-large-patch14",
}
ON_BASE = ("c_delta_v0", "d_delta_v1.1", "e_lora", "i_projector_only")  # base/llama-7b
ROUNDS = [
    *[("a_v1.5", name) for name in ("single", "multi_turn", "text_only", "image_middle", "two_images", "exif")],
    *[("a_v1.5", name) for name in ("one_pixel_wide", "vicuna_v1")],
    *[
        ("b_llama2", f"{series}-{name}")
        for series in ("start_end", "no_start_end")
        for name in ("single", "multi_turn", "text_only", "two_images", "llama_2")
    ],
    *[("f_mpt", name) for name in ("single", "multi_turn", "text_only", "two_images")],
    *[("c_delta_v0", name) for name in ("single", "multi_turn", "text_only", "v0", "v0_mmtag")],
    *[("d_delta_v1.1", name) for name in ("single", "text_only", "two_images", "v1_mmtag")],
    *[("e_lora", name) for name in ("single", "multi_turn", "text_only")],
    *[("i_projector_only", name) for name in ("single", "plain")],
    *[("g_v1.6", name) for name in ("single_wide", "tall", "square", "two_images", "one_pixel_wide", "text_only")],
    *[("j_language_only", name) for name in ("plain0", "plain1", "plain2", "plain3", "vicuna_v1")],
]
WITH_PICTURES = [(family, name) for family, name in ROUNDS if family != "j_language_only" and "text_only" not in name]
TEMPLATES = [
    *["default", "v0", "v1", "vicuna_v1", "llama_2", "mistral_instruct", "chatml_direct", "mistral_direct", "plain"],
    *["v0_plain", "llava_v0", "v0_mmtag", "llava_v1", "v1_mmtag", "llava_llama_2", "mpt"],
]
DIALOGS = ["one_turn", "answered", "image_prefix", "multi", "multi_answered", "empty_user"]


def edited_copy(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of the checkpoint with changed values in config.json."""
    shutil.copytree(folder, target, copy_function=lambda a, b: Path(b).symlink_to(Path(a).resolve()))
    config = (target / "config.json").read_text()
    (target / "config.json").unlink()
    (target / "config.json").write_text(config)
    tiny.edit_json(target / "config.json", **changes)
    return target


@pytest.fixture(scope="session")
def load(golden_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., llava.Assistant]:
    """Returns load(family, **config changes). Each checkpoint is loaded once, from a folder with a misleading name."""

    def disguised(folder: Path) -> Path:
        link = tmp_path_factory.mktemp("vicuna") / "mistral-34b-lora-delta-mpt-llama-2-v0"
        link.symlink_to(folder.resolve())
        return link

    @functools.cache
    def load_once(family: str, changes: str = "{}", **options: Any) -> llava.Assistant:
        folder = golden_checkpoints / FOLDERS[family]
        if changes != "{}":
            edits = {key: tiny.ABSENT if value == "ABSENT" else value for key, value in json.loads(changes).items()}
            folder = edited_copy(folder, tmp_path_factory.mktemp("edited") / "checkpoint", **edits)
        if family == "j_language_only":
            return llava.load(disguised(folder), vision=False, dtype="float32", device="cpu")
        tower = disguised(golden_checkpoints / "vision" / TOWERS[family])
        if family in ON_BASE:
            options["base"] = disguised(golden_checkpoints / "base" / "llama-7b")
        return llava.load(disguised(folder), vision_tower=tower, dtype="float32", device="cpu", **options)

    def load(family: str, options: dict[str, Any] | None = None, **changes: Any) -> llava.Assistant:
        changes = {key: "ABSENT" if value is tiny.ABSENT else value for key, value in changes.items()}
        return load_once(family, json.dumps(changes), **(options or {}))

    return load


class Round:
    """One golden prompt with the original's results, and the assistant to compare."""

    def __init__(self, golden: Path, load: Callable[..., llava.Assistant], family: str, name: str) -> None:
        self.file = golden / family / "golden" / f"{name}.safetensors"
        record = json.loads((self.file.parent / "prompts.json").read_text())
        self.vocab_ids = record["vocab_ids_of_logits_at_ids"]
        self.entry = next(entry for entry in record["prompts"] if entry["id"] == name)
        changes = {"mm_use_im_start_end": False} if name.startswith("no_start_end") else {}
        self.assistant = load(family, **changes)
        self.images = [golden / "images" / image for image in self.entry.get("images", [])]
        self.options = {"template": self.entry["conv"]} if "conv" in self.entry else {}
        self.messages = self.render() if "turns" in self.entry else self.entry["prompt"]

    def render(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        pictures = [{"type": "image", "image": image} for image in self.images]
        for question, answer in self.entry["turns"]:
            text = question.replace("<image-placeholder>", "<image>")
            content = [*(pictures if not messages else []), {"type": "text", "text": text}]
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return messages

    def prepare(self) -> Any:
        return self.assistant.prepare(self.messages, **self.options)

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.file)


@pytest.fixture
def round_(golden: Path, load: Callable[..., llava.Assistant], request: pytest.FixtureRequest) -> Round:
    return Round(golden, load, *request.param)


every_round = pytest.mark.parametrize("round_", ROUNDS, indirect=True, ids="/".join)
every_round_with_pictures = pytest.mark.parametrize("round_", WITH_PICTURES, indirect=True, ids="/".join)


def assert_close(ours: Tensor, original: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.detach().cpu().float(), original.float(), rtol=0, atol=tolerance)


@every_round
def test_prompt_and_token_ids_are_the_originals(round_: Round) -> None:
    prepared = round_.prepare()
    assert prepared.prompt == round_.entry["prompt"]
    assert prepared.token_ids == round_.entry["input_ids"]
    assert len(prepared.ids) == round_.entry.get("merged_length", len(round_.entry["input_ids"]))


@every_round_with_pictures
def test_pixels_are_the_originals(round_: Round) -> None:
    prepared = round_.prepare()
    assert prepared.pixels.dtype == torch.float32
    assert_close(prepared.pixels, round_.tensors["pixel_values"], 1e-6)
    assert list(prepared.views) == round_.entry.get("views_per_image", [1] * len(round_.images))
    assert [list(size) for size in prepared.image_sizes] == round_.entry["image_sizes_wh"]


@every_round_with_pictures
def test_vision_features_are_the_originals(round_: Round) -> None:
    features = round_.assistant.vision_features(round_.tensors["pixel_values"])
    assert_close(features, round_.tensors["vision_features"], FEATURES_TOLERANCE)


@every_round_with_pictures
def test_projected_features_are_the_originals(round_: Round) -> None:
    projected = round_.assistant.project(round_.tensors["vision_features"])
    assert_close(projected, round_.tensors["projector_output"], FEATURES_TOLERANCE)


@every_round_with_pictures
def test_image_embeddings_are_packed_as_the_originals(round_: Round) -> None:
    packed = round_.assistant.image_embeddings(round_.messages, **round_.options)
    original = round_.tensors.get("packed_image_features", round_.tensors["projector_output"].flatten(0, 1))
    tokens = round_.entry.get("image_tokens_per_image", [len(original) // len(round_.images)] * len(round_.images))
    assert [len(one) for one in packed] == tokens
    assert_close(torch.cat(packed), original, FEATURES_TOLERANCE)


@every_round
def test_logits_are_the_originals(round_: Round) -> None:
    logits = round_.assistant.logits(round_.messages, **round_.options).cpu()
    golden = round_.tensors
    assert logits.dtype == torch.float32
    assert logits.shape == (len(golden["logits_argmax"]), len(golden["logits_last"]))
    assert_close(logits[-1], golden["logits_last"], LOGITS_TOLERANCE)
    assert_close(logits[:, round_.vocab_ids], golden["logits_at_ids"], LOGITS_TOLERANCE)
    stats = [logits.amax(-1), logits.logsumexp(-1), logits.mean(-1), logits.std(-1)]
    assert_close(torch.stack(stats, dim=-1), golden["logits_stats"], LOGITS_TOLERANCE)
    clear = golden["logits_top2_margin"] > 2 * LOGITS_TOLERANCE
    assert torch.equal(logits.argmax(-1)[clear].int(), golden["logits_argmax"][clear])
    sums = [logits.double().sum().item(), logits.double().abs().sum().item()]
    assert sums == pytest.approx([round_.entry["logits_sum"], round_.entry["logits_abs_sum"]], rel=1e-6, abs=5)


@every_round
def test_greedy_answers_are_the_originals(round_: Round) -> None:
    ids = round_.entry["generated_ids"]
    reply = round_.assistant.generate(round_.messages, max_new_tokens=len(ids), temperature=0, **round_.options)
    text = round_.entry.get("generated_text", round_.entry.get("generated_text_raw", "")).strip()
    assert reply.token_ids == ids
    assert reply.text == text
    assert reply.finish_reason == "length"


def test_a_batch_of_golden_prompts_answers_as_each_alone(golden: Path, load: Callable[..., llava.Assistant]) -> None:
    rounds = [Round(golden, load, "a_v1.5", name) for name in ("single", "multi_turn", "text_only", "two_images")]
    replies = load("a_v1.5").generate_batch([round_.messages for round_ in rounds], max_new_tokens=32)
    assert [reply.token_ids for reply in replies] == [round_.entry["generated_ids"] for round_ in rounds]


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 1])
def test_features_come_from_the_layer_that_the_config_selects(
    golden: Path, load: Callable[..., llava.Assistant], layer: int, feature: str
) -> None:
    stored = load_file(golden / "a_v1.5" / "golden" / "feature_selection.safetensors")
    assistant = load("a_v1.5", mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    features = assistant.vision_features(stored["pixel_values"])
    assert_close(features, stored[f"layer{layer}_{feature}"], FEATURES_TOLERANCE)


def test_exif_orientation_is_applied_only_on_request(golden: Path, load: Callable[..., llava.Assistant]) -> None:
    path = golden / "images" / "exif6_60x40.jpg"
    content = [{"type": "image", "image": path}, {"type": "text", "text": "Is the camera held upright?"}]
    messages = [{"role": "user", "content": content}]
    as_stored = load("a_v1.5").prepare(messages)
    upright = load("a_v1.5", {"exif": True}).prepare(messages)
    turned = load("a_v1.5").prepare("<image>", images=[ImageOps.exif_transpose(Image.open(path))])
    assert [tuple(size) for size in as_stored.image_sizes] == [(60, 40)]
    assert [tuple(size) for size in upright.image_sizes] == [(40, 60)]
    assert torch.equal(upright.pixels, turned.pixels)
    assert not torch.equal(upright.pixels, as_stored.pixels)


# ------------------------------------------------------------------------------------------ combined with their bases


def on_base(golden_checkpoints: Path, family: str) -> dict[str, Tensor]:
    """Tensors of the language model and projector, by their names on disk."""
    folder, base = golden_checkpoints / FOLDERS[family], golden_checkpoints / "base" / "llama-7b"
    found = open_checkpoint(folder, LoadOptions(base=base, vision_tower=golden_checkpoints / "vision" / TOWERS[family]))
    sources = {name: source for name, source in found.tensors.items() if not name.startswith("vision.")}
    items = to_disk(sources, found.config, rules_for(found.config))
    return {item.name: torch.cat(list(item.chunks())) for item in items}


@pytest.mark.parametrize("family", ["c_delta_v0", "d_delta_v1.1"])
def test_deltas_give_the_originals_tensors_bit_for_bit(golden: Path, golden_checkpoints: Path, family: str) -> None:
    record = json.loads((golden / family / "golden" / "merged_tensors.json").read_text())
    stored = {name: entry for name, entry in record["tensors"].items() if "inv_freq" not in name}
    ours = on_base(golden_checkpoints, family)
    assert set(ours) == set(stored)
    for name, tensor in ours.items():
        assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == stored[name]["sha256"], name


def test_a_lora_gives_the_originals_matrices(golden: Path, golden_checkpoints: Path) -> None:
    ours = on_base(golden_checkpoints, "e_lora")
    for name, tensor in load_file(golden / "e_lora" / "golden" / "merged_float32.safetensors").items():
        assert_close(ours[name], tensor, 1e-6)
    record = json.loads((golden / "e_lora" / "golden" / "merged_tensors.json").read_text())["float32"]
    untouched = [name for name in record if not re.search("_proj[.]weight", name) and "inv_freq" not in name]
    assert len(untouched) > 8
    for name in untouched:
        assert hashlib.sha256(ours[name].float().numpy().tobytes()).hexdigest() == record[name]["sha256"], name


# ------------------------------------------------------------------------------------------------ templates and ids


@pytest.mark.parametrize("dialog", DIALOGS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_the_originals(
    golden: Path, load: Callable[..., llava.Assistant], template: str, dialog: str
) -> None:
    record = json.loads((golden / "templates" / "templates.json").read_text())
    assert list(record["templates"]) == TEMPLATES
    prompt = record["templates"][template]["prompts"][dialog]
    if isinstance(prompt, dict):
        pytest.skip(f"the original fails here: {prompt['original_error']}")
    messages: list[dict[str, Any]] = []
    for question, answer in record["dialogs"][dialog]:
        picture = [{"type": "image", "image": Image.new("RGB", (20, 20))}] if "<image>" in question else []
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    assert load("a_v1.5").prepare(messages, template=template).prompt == prompt


def tokenization(golden: Path, name: str) -> dict[str, Any]:
    return json.loads((golden / "tokenizer" / "tokenization.json").read_text())["tokenizers"][name]


@pytest.mark.parametrize("name", ["v1.5 (legacy false)", "llama v1 (no legacy key: legacy true)"])
def test_raw_prompts_have_the_ids_of_the_slow_tokenizer(
    golden: Path, golden_checkpoints: Path, load: Callable[..., llava.Assistant], name: str
) -> None:
    record = tokenization(golden, name)
    if record["files"] == FOLDERS["a_v1.5"]:
        assistant = load("a_v1.5")
    else:
        assistant = llava.load(golden_checkpoints / record["files"], dtype="float32", device="cpu")
    picture = Image.new("RGB", (20, 20))
    wrong = {}
    for entry in record["strings"]:
        marks = entry["text"].count("<image>")
        if marks and record["files"] != FOLDERS["a_v1.5"]:
            continue  # a plain Llama takes no pictures
        ids = assistant.prepare(entry["text"], images=[picture] * marks or None).token_ids
        original = entry["ids_with_image_token"] if marks else entry["ids"]
        if ids != original:
            wrong[entry["text"]] = (ids, original)
    assert not wrong


@pytest.mark.parametrize(
    "name", ["v1.5 (legacy false)", "llama v1 (no legacy key: legacy true)", "v0 (added tokens, legacy true)", "mpt"]
)
def test_tokenizers_encode_and_decode_as_the_originals(golden: Path, golden_checkpoints: Path, name: str) -> None:
    tokenizer_room = pytest.importorskip("llava.formats.tokenizer")
    record = tokenization(golden, name)
    tokenizer = tokenizer_room.load_tokenizer(golden_checkpoints / record["files"])
    encoded = {entry["text"]: tokenizer.encode(entry["text"]) for entry in record["strings"]}
    assert encoded == {entry["text"]: entry["ids"] for entry in record["strings"]}
    decoded = {entry["text"]: tokenizer.decode(entry["ids"]) for entry in record["strings"]}
    assert decoded == {entry["text"]: entry["decoded_skip_special"] for entry in record["strings"]}


# ------------------------------------------------------------------------------------------------ pictures


MODES = {
    "square_56": ("b_llama2", {}),
    "pad_84": ("a_v1.5", {}),
    "square_84": ("a_v1.5", {"image_aspect_ratio": None}),
    "anyres_84": ("g_v1.6", {}),
}


@pytest.mark.parametrize("mode", MODES)
def test_pixels_equal_the_originals_bit_for_bit(golden: Path, load: Callable[..., llava.Assistant], mode: str) -> None:
    family, changes = MODES[mode]
    assistant = load(family, **changes)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tiny.MEAN, tiny.STD))
    with safe_open(golden / "images_preprocessed" / "pixels_uint8.safetensors", "pt") as stored:
        names = [name for name in stored.keys() if f".{mode}" in name]  # noqa: SIM118 - not a mapping
        assert len(names) == 12
        for name in names:
            picture = golden / "images" / name[: name.index(f".{mode}")]
            marked = assistant.prepare("<image>", images=[picture])
            original = stored.get_tensor(name)
            assert torch.equal(((marked.pixels * std + mean) * 255).round().to(torch.uint8), original), name
            assert_close(marked.pixels, (original / 255 - mean) / std, 1e-6)


def assert_anyres_row(assistant: llava.Assistant, row: list[Any]) -> None:
    size, _, (columns, rows), _, _, tokens = row
    prepared = assistant.prepare("<image>", images=[Image.new("RGB", tuple(size))])
    assert list(prepared.views) == [1 + columns * rows], size
    text_tokens = len(prepared.token_ids) - 1
    assert len(prepared.ids) - text_tokens == tokens, size


def test_anyres_at_84_pixels_takes_as_many_tokens_as_the_original(
    golden: Path, load: Callable[..., llava.Assistant]
) -> None:
    record = json.loads((golden / "anyres" / "anyres.json").read_text())["grids"]["84"]
    assistant = load("g_v1.6", tokenizer_model_max_length=100_000)
    for row in record["rows"]:
        assert_anyres_row(assistant, row)


def test_anyres_at_336_pixels_takes_as_many_tokens_as_the_original(golden: Path, tmp_path: Path) -> None:
    record = json.loads((golden / "anyres" / "anyres.json").read_text())["grids"]["336"]
    clip = tiny.write_clip(tmp_path / "clip", image_size=336)
    grid = {**tiny.ANYRES, "image_grid_pinpoints": record["pinpoints_wh"]}
    assistant = llava.load(tiny.write_llava(tmp_path / "llava", clip=clip, **grid))
    for row in record["rows"][::5]:
        assert_anyres_row(assistant, row)
