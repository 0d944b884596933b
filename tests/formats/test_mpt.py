"""MPT: ALiBi instead of rotary positions, and its own names on disk. Golden prompts: tests/golden/test_answers.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import llava
from llava.assistant import Assistant, question_about
from llava.checkpoint.inspect import describe
from llava.checkpoint.open import open_checkpoint
from llava.config import DecoderConfig, LlavaConfig
from llava.convert.convert import convert, write_gpt_fast
from llava.convert.verify import check_equal
from llava.errors import CheckpointError, ConfigError
from llava.model.attention import alibi_bias, decode_mask
from llava.model.decoder import Decoder
from llava.model.mpt import Alibi
from tests import tiny

SIZES: dict[str, Any] = {"n_layers": 2, "dim": 48, "n_heads": 4, "n_kv_heads": 4, "head_dim": 12, "mlp_dim": 96}
SIZES |= {"kind": "mpt", "vocab_size": 40, "max_seq": 64, "eps": 1e-5, "rope_theta": None, "alibi_bias_max": 8.0}
CLIPS_OWN = {"vision_model", "text_model", "visual_projection", "logit_scale"}  # tensors that LLaVA does not read
PROMPTS = ["What is in the picture?", "Once upon a time there was a painter who would only", "Hello"]

LONG = "Look at the left side of the photo, then at the right one, and compare the two. " * 12  # longer than one window


@pytest.fixture(scope="module")
def mpt(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_mpt(tmp_path_factory.mktemp("mpt") / "llava", clip=clip)


@pytest.fixture(scope="module")
def picture(mpt: Path) -> Path:
    path = mpt.parent / "picture.png"
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def assistant(mpt: Path) -> Assistant:
    return llava.load(mpt, dtype="float32", device="cpu")


def decoder(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(DecoderConfig(**SIZES | {"tied": True} | changes))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False)


def by_hand(model: Decoder, x: Tensor, slopes: list[float], limit: float = torch.inf) -> Tensor:
    """A plain implementation of MPT, one head at a time: x [S, D] -> [S, D]"""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    n, width = len(x), x.shape[1] // len(slopes)
    for i in range(SIZES["n_layers"]):
        w = {name.removeprefix(f"blocks.{i}."): value for name, value in model.state_dict().items()}
        qkv = (norm(x, w["attn_norm.weight"]) @ w["attn.qkv.weight"].T).clamp(-limit, limit)
        heads = []
        for head, slope in enumerate(slopes):
            q, k, v = (part[:, head * width : (head + 1) * width] for part in qkv.chunk(3, dim=-1))
            scores = q @ k.T / width**0.5 + slope * torch.arange(n)
            heads.append(scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, dim=-1) @ w["attn.out.weight"].T
        up = norm(x, w["mlp_norm.weight"]) @ w["mlp.up.weight"].T
        x = x + (up * (1 + torch.erf(up / 2**0.5)) / 2) @ w["mlp.down.weight"].T
    return norm(x, model.norm.weight)


@pytest.mark.parametrize(
    ("n_heads", "bias_max", "limit"), [(4, 8.0, None), (4, 16.0, 0.5), (6, 8.0, None), (1, 8.0, None)]
)
def test_the_decoder_computes_what_mpt_is(n_heads: int, bias_max: float, limit: float | None) -> None:
    sizes = {"n_heads": n_heads, "n_kv_heads": n_heads, "head_dim": 48 // n_heads}
    model = decoder(**sizes, alibi_bias_max=bias_max, clip_qkv=limit)
    slopes = {
        4: [2 ** -(i * bias_max / 4) for i in (1, 2, 3, 4)],
        6: [
            2**-2,
            2**-4,
            2**-6,
            2**-8,
            2**-1,
            2**-3,
        ],  # the slopes of 8 heads: every second one, then the others, starting with the first
        1: [2**-8],
    }[n_heads]
    x = torch.randn(9, 48)
    ours = model(x[None])[0]
    torch.testing.assert_close(ours, by_hand(model, x, slopes, limit or torch.inf), rtol=1e-4, atol=1e-4)


def test_the_bias_of_near_tokens_is_exact_in_16_bits_at_any_length() -> None:
    slopes = Alibi(DecoderConfig(**SIZES)).slopes(torch.device("cpu"))
    bias = alibi_bias(decode_mask(torch.tensor([2000]), 2001), slopes, torch.bfloat16)
    assert bias.shape == (1, 4, 1, 2001)
    assert bias[0, 0, 0, -5:].tolist() == [-1.0, -0.75, -0.5, -0.25, 0.0]


def test_gradients_reach_every_weight() -> None:
    model = decoder().requires_grad_(True)
    model.logits(model(torch.randn(2, 5, 48))).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ checkpoints


def test_all_layouts_and_the_native_one_hold_the_same_bits(tmp_path: Path, clip: Path, mpt: Path) -> None:
    first = open_checkpoint(mpt)
    for layout in tiny.LAYOUTS:
        folder = tiny.write_mpt(tmp_path / layout, layout=layout, clip=clip)
        convert(folder, tmp_path / f"{layout}-native", verify=True)
        check_equal(first, open_checkpoint(folder))
        assert open_checkpoint(tmp_path / f"{layout}-native").config == first.config
    assert LlavaConfig.from_dict(first.config.to_dict()) == first.config


def test_a_native_folder_answers_as_the_original(tmp_path: Path, mpt: Path, assistant: Assistant) -> None:
    convert(mpt, tmp_path / "native")
    native = llava.load(tmp_path / "native", dtype="float32", device="cpu")
    question = [{"role": "user", "content": PROMPTS[0]}]
    assert (
        native.generate(question, max_new_tokens=8).token_ids
        == assistant.generate(question, max_new_tokens=8).token_ids
    )


def test_what_the_files_say_is_recognised(mpt: Path) -> None:
    checkpoint = open_checkpoint(mpt)
    config = checkpoint.config
    assert (checkpoint.format, config.template, config.dtype) == ("mpt", "mpt", "bfloat16")
    assert (config.decoder.tied, config.decoder.rope_theta, config.decoder.alibi_bias_max) == (True, None, 8)
    assert config.start_end
    assert config.eos_ids == (0, checkpoint.tokenizer.id_of("<|im_end|>"))
    assert checkpoint.tokenizer.bos_id is None
    assert not checkpoint.missing
    assert {name.split(".")[0] for name in checkpoint.unused_names} <= CLIPS_OWN


def test_a_plain_mpt_is_a_language_model_without_a_template(tmp_path: Path) -> None:
    base = llava.load(tiny.write_mpt(tmp_path / "base"), dtype="float32", device="cpu")
    assert (base.config.vision, base.config.template, base.config.decoder.kind) == (None, None, "mpt")
    assert len(base.generate(PROMPTS[1], max_new_tokens=6).token_ids) == 6


@pytest.mark.parametrize(
    "change",
    [{"architectures": ["LlavaMptForCausalLM"]}, {"attn_config": {"model_type": ""}}, {"attn_config": tiny.ABSENT}],
    ids=str,
)
def test_a_folder_saved_again_by_newer_code_is_the_same(
    tmp_path: Path, clip: Path, mpt: Path, change: dict[str, Any]
) -> None:
    folder = tiny.write_mpt(tmp_path / "wiped", clip=clip, **change)
    assert open_checkpoint(folder).config == open_checkpoint(mpt).config


def test_a_head_saved_in_addition_to_the_table_is_ignored(tmp_path: Path, mpt: Path) -> None:
    folder = shutil.copytree(mpt, tmp_path / "copy")
    for file in folder.glob("pytorch_model-*.bin"):
        tensors = torch.load(file, weights_only=True)
        if "transformer.wte.weight" in tensors:
            torch.save(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, file)
            name = file.name
    index = folder / "pytorch_model.bin.index.json"
    places = json.loads(index.read_text())["weight_map"]
    tiny.edit_json(index, weight_map={**places, "lm_head.weight": name})
    assert {name.split(".")[0] for name in open_checkpoint(folder).unused_names} - CLIPS_OWN == {"lm_head"}
    check_equal(open_checkpoint(mpt), open_checkpoint(folder))


ATTENTION = {"alibi": True, "alibi_bias_max": 8}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"no_bias": False}, "no_bias is False"),
        ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
        ({"norm_type": "rmsnorm"}, "norm_type"),
        ({"attn_config": {"alibi": False}}, "alibi is False"),
        ({"attn_config": ATTENTION | {"qk_ln": True}}, "qk_ln is True"),
        ({"attn_config": ATTENTION | {"prefix_lm": True}}, "prefix_lm is True"),
        ({"attn_config": ATTENTION | {"attn_type": "multiquery_attention"}}, "multiquery_attention"),
        ({"attn_config": ATTENTION | {"alibi_bias_max": -1}}, "alibi_bias_max is -1"),
        ({"attn_config": ATTENTION | {"clip_qkv": "6"}}, "clip_qkv is '6'"),
        ({"n_heads": tiny.ABSENT}, "n_heads"),
        ({"d_model": "64"}, "config.json"),
    ],
    ids=str,
)
def test_an_mpt_that_would_be_computed_wrongly_is_refused(
    tmp_path: Path, mpt: Path, change: dict[str, Any], words: str
) -> None:
    folder = shutil.copytree(mpt, tmp_path / "copy")
    tiny.edit_json(folder / "config.json", **change)
    with pytest.raises((ConfigError, CheckpointError), match=words):
        open_checkpoint(folder)


def test_a_missing_tensor_is_named_as_on_disk(tmp_path: Path, clip: Path) -> None:
    folder = tiny.write_mpt(tmp_path / "short", clip=clip, layout="bin")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del tensors["transformer.blocks.1.attn.Wqkv.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"the first is transformer\.blocks\.1\.attn\.Wqkv\.weight"):
        llava.load(folder, dtype="float32", device="cpu")


def test_no_llama_layout_is_written_of_an_mpt(tmp_path: Path, mpt: Path) -> None:
    with pytest.raises(CheckpointError, match="of kind mpt"):
        convert(mpt, tmp_path / "llama", to="llama")
    with pytest.raises(CheckpointError, match="of kind mpt"):
        write_gpt_fast(mpt, tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 1e4}, {"alibi_bias_max": None}, {"kind": "gpt"}, {"n_kv_heads": 2}, {"clip_qkv": 0.0}],
    ids=str,
)
def test_sizes_that_are_no_mpts_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DecoderConfig(**SIZES | change)


def test_a_llama_has_no_linear_biases() -> None:
    llama = {**SIZES, "kind": "llama", "rope_theta": 1e4, "alibi_bias_max": None}
    assert DecoderConfig(**llama).kind == "llama"
    for change in ({"rope_theta": None}, {"alibi_bias_max": 8.0}, {"clip_qkv": 6.0}):
        with pytest.raises(ConfigError, match="llama"):
            DecoderConfig(**llama | change)


def test_native_configs_from_before_mpt_still_load(checkpoint: Path) -> None:
    config = open_checkpoint(checkpoint).config
    values = json.loads(json.dumps(config.to_dict()))
    del values["decoder"]["alibi_bias_max"], values["decoder"]["clip_qkv"]
    assert LlavaConfig.from_dict(values) == config


def test_inspect_describes_an_mpt_completely(mpt: Path) -> None:
    told = describe(mpt)
    assert (told.kind, told.template, told.missing, told.context) == ("mpt", "mpt", [], 2048)
    assert told.sizes["decoder"]["alibi_bias_max"] == 8
    assert told.sizes["parameters_by_part"]["decoder"] == sum(
        source.read().numel() for ours, source in open_checkpoint(mpt).tensors.items() if ours.startswith("decoder.")
    )


# ------------------------------------------------------------------------------------------------ answers


def test_a_batch_answers_like_single_requests(assistant: Assistant) -> None:
    questions = [[{"role": "user", "content": text}] for text in PROMPTS]
    replies = assistant.generate_batch(questions, max_new_tokens=16)
    alone = [assistant.generate(question, max_new_tokens=16) for question in questions]
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in alone]
    assert len(set(map(len, [assistant.prepare(question).ids for question in questions]))) == len(PROMPTS)


def test_greedy_answers_follow_from_logits_without_a_cache(assistant: Assistant) -> None:
    input = assistant.prepare(PROMPTS[1])
    ids = input.ids.tolist()
    reply = assistant.generate(PROMPTS[1], max_new_tokens=6, temperature=0)
    for id in reply.token_ids:
        with torch.inference_mode():
            x = assistant.model.embed(torch.tensor(ids))[None]
            last = assistant.model.decoder.logits(assistant.model.decoder(x))[0, -1]
        assert int(last.argmax()) == id
        ids.append(id)


def test_pictures_and_text_of_all_lengths_answer_in_a_batch_like_single_requests(
    assistant: Assistant, picture: Path
) -> None:
    requests = [question_about(picture, "What is it?"), question_about(None, "Hello"), LONG]
    requests += [question_about([picture, picture], "Compare."), PROMPTS[1]]
    together = assistant.generate_batch(requests, max_new_tokens=8)
    assert [reply.token_ids for reply in together] == [
        assistant.generate(request, max_new_tokens=8).token_ids for request in requests
    ]
    assert assistant.config.start_end


def test_transformers_pads_on_either_side_and_computes_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = tiny.write_mpt(tmp_path / "base", torch_dtype="float32", layout="safetensors")
    theirs = transformers.MptForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ours = llava.load(base, dtype="float32", device="cpu")
    rows = [ours.prepare(prompt).ids for prompt in PROMPTS]
    longest = max(map(len, rows))
    for left in (True, False):
        pads = [torch.zeros(longest - len(row), dtype=torch.int64) for row in rows]
        ids = torch.stack([torch.cat([pad, row] if left else [row, pad]) for row, pad in zip(rows, pads, strict=True)])
        kept = torch.stack(
            [torch.arange(longest) >= len(pad) if left else torch.arange(longest) < longest - len(pad) for pad in pads]
        )
        with torch.no_grad():
            logits = theirs(ids, attention_mask=kept.long()).logits
        for prompt, found, there in zip(PROMPTS, logits, kept, strict=True):
            torch.testing.assert_close(ours.logits(prompt), found[there], rtol=0, atol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_that_a_tokenizer_pads_on_changes_nothing(
    tmp_path: Path, mpt: Path, assistant: Assistant, side: str
) -> None:
    folder = shutil.copytree(mpt, tmp_path / "copy")
    tiny.edit_json(folder / "tokenizer_config.json", padding_side=side)
    found = llava.load(folder, dtype="float32", device="cpu").generate_batch(PROMPTS, max_new_tokens=4)
    expected = assistant.generate_batch(PROMPTS, max_new_tokens=4)
    assert [reply.token_ids for reply in found] == [reply.token_ids for reply in expected]


@pytest.mark.parametrize("wrapper", ["base_model.model.", "base_model.model.module.", ""])
def test_a_lora_of_an_mpt_kept_apart_answers_as_merged(tmp_path: Path, mpt: Path, picture: Path, wrapper: str) -> None:
    lora = tiny.write_mpt_lora(tmp_path / "lora", base=mpt, wrapper=wrapper)
    merged, apart = (llava.load(lora, base=mpt, merge=merge, dtype="float32", device="cpu") for merge in (True, False))
    requests = [question_about(picture, "What?"), PROMPTS[1], PROMPTS[2]]
    for request in requests:
        torch.testing.assert_close(apart.logits(request), merged.logits(request), rtol=0, atol=1e-4)
    found, expected = (one.generate_batch(requests, max_new_tokens=6) for one in (apart, merged))
    assert [reply.token_ids for reply in found] == [reply.token_ids for reply in expected]
    apart.adapter(None)
    alone = llava.load(mpt, dtype="float32", device="cpu")
    assert torch.equal(apart.logits(requests[0]), alone.logits(requests[0]))
    assert not torch.allclose(apart.logits(requests[0]), merged.logits(requests[0]), atol=1e-2)


def test_sixteen_bits_in_a_batch_with_pictures_stay_close(mpt: Path, assistant: Assistant, picture: Path) -> None:
    rounded = llava.load(mpt, dtype="bfloat16", device="cpu")
    message = question_about(picture, "What is it?")
    exact = assistant.logits(message)
    assert (rounded.logits(message) - exact).norm() < 0.03 * exact.norm()
    replies = rounded.generate_batch([message, PROMPTS[0]], max_new_tokens=4)
    assert all(len(reply.token_ids) == 4 for reply in replies)


def test_bfloat16_stays_close(mpt: Path, assistant: Assistant) -> None:
    rounded = llava.load(mpt, dtype="bfloat16", device="cpu").logits(PROMPTS[1])
    exact = assistant.logits(PROMPTS[1])
    assert (rounded - exact).norm() < 0.02 * exact.norm()
