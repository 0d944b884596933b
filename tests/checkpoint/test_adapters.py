"""LoRAs that are not merged: several on one base, switched by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import llava
from llava.assistant import Assistant, question_about
from llava.errors import ConfigError, PromptError
from llava.model.llava import Llava
from llava.model.lora import LoraLinear
from tests import tiny
from tests.command import assert_one_line_error, run, run_well

TEXT = "Once upon a time there was a painter"
FLOAT32: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
TOKENS = ("<im_patch>", "<im_start>", "<im_end>")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "picture.png"
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def folders(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a LLaVA on it, and four adapters that differ as much as published ones do."""
    root = tmp_path_factory.mktemp("adapters")
    longer = {"vocab_size": tiny.PIECES + 3, "mm_use_im_start_end": True, "mm_projector_type": "linear"}
    made = {
        "base": tiny.write_llama(root / "base"),
        "llava": tiny.write_llava(root / "llava", clip=clip),
        "cats": tiny.write_lora(root / "cats", clip=clip, file_type="safetensors"),
        "dogs": tiny.write_lora(root / "dogs", clip=clip, seed=5, targets=("k_proj", "down_proj")),
        "june": tiny.write_lora(root / "june", clip=clip, seed=6, added=TOKENS, rows=True, **longer),
        "stage1": tiny.write_projector(root / "stage1", clip=clip, seed=8, start_end=True),
    }
    return made


def on(folders: dict[str, Path], base: str = "base", *names: str, **options: Any) -> Assistant:
    names = names or ("cats", "dogs", "june", "stage1")
    return llava.load(folders[base], adapters={name: folders[name] for name in names}, **FLOAT32 | options)


@pytest.fixture(scope="module")
def several(folders: dict[str, Path]) -> Assistant:
    return on(folders)


def seen(vlm: Assistant, picture: Path) -> Tensor:
    return vlm.logits(question_about(picture, "What is in the picture?"))


@pytest.mark.parametrize("name", ["cats", "dogs", "june", "stage1"])
def test_an_adapter_that_is_not_merged_answers_like_a_merged_one(
    folders: dict[str, Path], several: Assistant, picture: Path, name: str
) -> None:
    merged = llava.load(folders[name], base=folders["base"], **FLOAT32)
    several.adapter(name)
    assert several.config == merged.config
    torch.testing.assert_close(seen(several, picture), seen(merged, picture), rtol=0, atol=1e-4)
    requests = [question_about(picture, "Which colours?"), question_about(None, "Hello"), TEXT]
    expected = [reply.token_ids for reply in merged.generate_batch(requests, max_new_tokens=8)]
    assert [reply.token_ids for reply in several.generate_batch(requests, max_new_tokens=8)] == expected
    assert [several.generate(request, max_new_tokens=8).token_ids for request in requests] == expected


def test_tokenizer_and_template_switch_with_the_adapter(several: Assistant, picture: Path) -> None:
    several.adapter("june")
    messages = question_about(picture, "What?")
    assert "<im_start><image><im_end>" in several.prepare(messages).prompt
    assert several.config.decoder.vocab_size == tiny.PIECES + 3
    several.adapter("cats")
    assert "<im_start>" not in several.prepare(messages).prompt
    assert several.config.decoder.vocab_size == tiny.PIECES
    several.adapter("stage1")
    assert several.config.template == "plain"
    several.adapter("cats")
    assert several.config.template == "llava_v1"


def test_without_an_adapter_the_base_answers_as_if_loaded_by_itself(
    folders: dict[str, Path], several: Assistant, picture: Path
) -> None:
    several.adapter("cats")
    several.adapter(None)
    alone = llava.load(folders["base"], **FLOAT32)
    assert torch.equal(several.logits(TEXT), alone.logits(TEXT))
    assert several.config == alone.config
    with pytest.raises(PromptError, match="no vision tower"):
        several.logits("<image> What?", images=[picture])


def test_a_llava_under_adapters_keeps_its_own_projector(folders: dict[str, Path], picture: Path) -> None:
    vlm, alone = on(folders, "llava", "cats"), llava.load(folders["llava"], **FLOAT32)
    changed = seen(vlm, picture)
    vlm.adapter(None)
    assert torch.equal(seen(vlm, picture), seen(alone, picture))
    assert not torch.equal(seen(vlm, picture), changed)


def test_a_single_lora_that_is_not_merged_is_named_default(folders: dict[str, Path], picture: Path) -> None:
    vlm = llava.load(folders["cats"], base=folders["base"], merge=False, **FLOAT32)
    assert (vlm.adapters, vlm.active) == (["default"], "default")
    merged = llava.load(folders["cats"], base=folders["base"], **FLOAT32)
    torch.testing.assert_close(seen(vlm, picture), seen(merged, picture), rtol=0, atol=1e-4)
    assert merged.adapters == []


def test_weights_that_adapters_share_are_in_memory_once(several: Assistant) -> None:
    def own(name: str | None) -> dict[str, int]:
        several.adapter(name)
        return {name: tensor.data_ptr() for name, tensor in several.model.state_dict().items()}

    cats, dogs, bare = own("cats"), own("dogs"), own(None)
    shared = {name.replace(".base.", "."): place for name, place in cats.items() if ".adapters." not in name}
    assert {name: shared[name] for name in bare} == bare
    assert all(cats[name] == dogs[name] for name in cats if name.startswith("vision."))
    assert cats["projector.0.weight"] != dogs["projector.0.weight"]


def test_switching_copies_no_weights(several: Assistant) -> None:
    several.adapter("cats")
    model = several.model
    several.adapter(None)
    several.adapter("cats")
    assert several.model is model


def test_a_running_stream_keeps_its_adapter(several: Assistant) -> None:
    several.adapter("cats")
    expected = several.generate(TEXT, max_new_tokens=10).text
    stream = several.stream(TEXT, max_new_tokens=10)
    first = next(stream)
    several.adapter("dogs")
    assert (first + "".join(stream)).strip() == expected


def test_adapters_are_of_the_type_that_is_asked_for(folders: dict[str, Path], picture: Path) -> None:
    vlm = on(folders, "base", "cats", "june", dtype="bfloat16")
    exact = on(folders, "base", "cats", "june")
    for name in ("cats", "june"):
        vlm.adapter(name)
        exact.adapter(name)
        assert {tensor.dtype for tensor in vlm.model.state_dict().values()} == {torch.bfloat16}
        wanted = seen(exact, picture)
        assert (seen(vlm, picture) - wanted).norm() < 0.05 * wanted.norm()


def test_compiled_forward_passes_switch_too(several: Assistant) -> None:
    """Traces without a compiler; tests/gpu compiles. A trace must not be reused for another adapter."""

    def states_of(model: Llava, ids: Tensor) -> Tensor:
        return model.decoder(model.decoder.lookup(ids))

    traced = torch.compile(states_of, backend="eager")
    for name in ("cats", "june", "dogs", None, "cats"):
        several.adapter(name)
        ids = torch.tensor([[1, 40, 50, 60]])
        with torch.inference_mode():
            torch.testing.assert_close(traced(several.model, ids), states_of(several.model, ids))


def test_switching_leaves_the_base_matrices_alone(several: Assistant) -> None:
    several.adapter("dogs")
    layers = [module for module in several.model.modules() if isinstance(module, LoraLinear)]
    assert len(layers) == 4  # qkv and down of two blocks
    several.adapter(None)
    assert not any(isinstance(module, LoraLinear) for module in several.model.modules())
    assert isinstance(several.model.decoder.blocks[0].get_submodule("attn.qkv"), nn.Linear)


def test_what_is_no_adapter_is_refused_in_one_line(folders: dict[str, Path], clip: Path, several: Assistant) -> None:
    with pytest.raises(ConfigError, match=r"'birds'; available: cats, dogs, june, stage1$"):
        several.adapter("birds")
    with pytest.raises(ConfigError, match="available: none; load with"):
        llava.load(folders["base"], **FLOAT32).adapter("cats")
    delta = tiny.write_delta(folders["base"].parent / "delta", clip=clip)
    with pytest.raises(ConfigError, match="expected lora or projector"):
        llava.load(folders["base"], adapters={"delta": delta}, **FLOAT32)
    with pytest.raises(ConfigError, match="expected lora or projector"):
        llava.load(folders["llava"], merge=False, **FLOAT32)
    with pytest.raises(llava.CheckpointError, match="needs its base"):
        llava.load(folders["cats"], merge=False, **FLOAT32)


def test_the_commands_take_adapters(folders: dict[str, Path]) -> None:
    cats, dogs = (f"{name}={folders[name]}" for name in ("cats", "dogs"))
    options = ("--model", folders["base"], "--max-new-tokens", 6, "--dtype", "float32", "--temperature", 0)
    asked = [run_well("ask", *options, "--adapter", one, "Hello").stdout for one in (cats, dogs)]
    lines = b"Hello\n/adapter dogs\n/reset\nHello\n/adapter birds\n"
    talk = run("chat", *options, "--adapter", cats, "--adapter", dogs, stdin=lines)
    assert asked[0] != asked[1]
    said = talk.stdout.split("\n")
    assert (asked[0], asked[1]) == (said[0] + "\n", said[3] + "\n")
    assert "available: cats, dogs" in talk.stdout
    assert "unknown adapter 'birds'; available: cats, dogs" in talk.stderr
    assert_one_line_error(run("ask", *options, "--adapter", "cats", "Hello"), "NAME=FOLDER")
