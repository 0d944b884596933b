"""What a request can ask for besides its reply equals what transformers and the plain forward pass compute."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llava
from llava.config import EngineOptions
from llava.engine.capture import Capture, Captured
from llava.engine.engine import Engine, Request
from llava.engine.sampling_params import SamplingParams
from llava.errors import ConfigError
from tests import tiny
from tests.oracles.test_transformers import PICTURE, PROMPT, random_llama

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("overlap")

ENGINES: dict[str, dict[str, Any]] = {
    "default": {},
    "chunked": {"chunk_tokens": 7, "max_batch": 4, "page_size": 3},
    "batch-invariant": {"batch_invariant": True, "chunk_tokens": 16},
}
LLAMAS: dict[str, dict[str, Any]] = {
    "grouped-query": {"num_key_value_heads": 2},
    "sliding window": {"num_key_value_heads": 2, "sliding_window": 9},
}


def random_decoder(folder: Path, case: str) -> Any:
    """A Llama, or a Mistral with the same weights, that computes attention eagerly."""
    random_llama(folder, num_key_value_heads=2)
    if window := LLAMAS[case].get("sliding_window"):
        tiny.edit_json(folder / "config.json", model_type="mistral", sliding_window=window)
        tiny.edit_json(folder / "config.json", architectures=["MistralForCausalLM"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert window is None or type(model).__name__ == "MistralForCausalLM"
    return model


def opened(folder: Path, **engine: Any) -> llava.Assistant:
    return llava.load(folder, dtype="float32", device="cpu", engine=EngineOptions(**engine))


def captured(
    engine: Engine, request: Request, capture: Capture, n: int, *, preempt_at: int = -1
) -> tuple[list[int], Captured]:
    """Generates n tokens beside other requests. preempt_at: the step after which the request is preempted."""
    others = [engine.add_request(PROMPT[:20], SamplingParams(max_new_tokens=5)) for _ in range(2)]
    stream = engine.stream(request, SamplingParams(max_new_tokens=n), capture=capture)
    for step in range(1000):
        engine.step()
        running = [one for one in engine.scheduler.running if one.capture]
        if step == preempt_at:
            engine.scheduler.preempt(running[0])
        if not engine.has_requests:
            break
    list(stream)
    engine.check()
    assert others
    return stream.reply().token_ids, stream.captured()


@pytest.mark.parametrize("preempt_at", [-1, 9])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", LLAMAS)
def test_states_and_attention_of_prompt_and_reply_are_those_of_transformers(
    tmp_path: Path, case: str, engine: str, preempt_at: int
) -> None:
    model = random_decoder(tmp_path, case)
    vlm = opened(tmp_path, **ENGINES[engine])
    capture = Capture(hidden_states=(0, 1, 3), attention=(0, 2))
    ids, found = captured(vlm.engine, PROMPT, capture, 12, preempt_at=preempt_at)
    row = torch.tensor([[*vlm.prepare(PROMPT).ids.tolist(), *ids[:-1]]])
    with torch.no_grad():
        wanted = model(row, output_hidden_states=True, output_attentions=True)
    for layer in (0, 1, 3):
        torch.testing.assert_close(found.hidden_states(layer), wanted.hidden_states[layer][0], rtol=0, atol=1e-4)
    for block in (0, 2):
        torch.testing.assert_close(found.probabilities(block), wanted.attentions[block][0], rtol=0, atol=1e-4)
    assert set(found.states) == {0, 1, 3}
    assert set(found.attention) == {0, 2}


def alibi_attention(vlm: llava.Assistant, x: Tensor, block: int) -> Tensor:
    """The attention probabilities [H, S, S] of an MPT's block for embeddings [S, D], from the formula."""
    decoder, config = vlm.model.decoder, vlm.config.decoder
    state = [x[None], *decoder.states(x[None])][block]
    one: Any = decoder.blocks[block]
    with torch.no_grad():
        qkv = one.attn.qkv(one.attn_norm(state))[0]
    q, k, _ = qkv.clamp(-one.attn.limit, one.attn.limit).unflatten(-1, (3, config.n_heads, config.head_dim)).unbind(1)
    scores = torch.einsum("she,the->hst", q, k) / config.head_dim**0.5
    distance = torch.arange(len(x))[None, :] - torch.arange(len(x))[:, None]
    slopes = torch.tensor([2 ** (-config.alibi_bias_max * (i + 1) / config.n_heads) for i in range(config.n_heads)])
    scores = scores + slopes[:, None, None] * distance
    return scores.masked_fill(distance > 0, -torch.inf).softmax(-1)


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_of_an_mpt_includes_its_linear_biases(tmp_path: Path, clip: Path, engine: str) -> None:
    folder = tiny.write_mpt(tmp_path / "mpt", clip=clip)
    vlm = opened(folder, **ENGINES[engine])
    text = PROMPT * 2
    _, found = captured(vlm.engine, text, Capture(attention=(0, 1), hidden_states=(0,)), 6)
    x = found.hidden_states(0)
    assert len(x) == len(vlm.prepare(text).ids) + 5
    for block in (0, 1):
        torch.testing.assert_close(found.probabilities(block), alibi_attention(vlm, x, block), rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reply_is_explained_by_the_tokens_of_each_picture(checkpoint: Path, engine: str) -> None:
    """One query for each token of the reply; only the keys of the pictures' tokens, and only the chosen heads."""
    vlm = opened(checkpoint, **ENGINES[engine])
    request: Request = ("<image> and <image>\nWhat is in the pictures?", [PICTURE, PICTURE.rotate(90)])
    ids, whole = captured(vlm.engine, request, Capture(attention=(1,)), 5)
    n_prompt = len(vlm.engine.inputs.prepare(request[0], images=request[1]).ids)
    only = Capture(attention=(1,), heads=(0, 3), first_query=-1, images_only=True)
    again, found = captured(vlm.engine, request, only, 5)
    assert again == ids
    kept = found.probabilities(1)
    assert kept.shape == (2, len(ids), 2 * tiny.N_PATCHES)
    wanted = [p[[0, 3], n_prompt - 1 :] for p in whole.image_attention(1)]
    torch.testing.assert_close(found.image_attention(1), wanted, rtol=0, atol=1e-5)
    assert sum(piece.untyped_storage().nbytes() for piece in found.attention[1].values()) == kept.nbytes


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (Capture(hidden_states=(4,)), "capture: hidden_states contains 4; expected numbers from 0 to 2"),
        (Capture(attention=(2,)), "capture: attention contains 2; expected numbers from 0 to 1"),
        (Capture(attention=(0,), heads=(-1,)), "capture: heads contains -1; expected numbers from 0 to 3"),
    ],
)
def test_layers_that_do_not_exist_are_refused(checkpoint: Path, capture: Capture, message: str) -> None:
    vlm = opened(checkpoint)
    with pytest.raises(ConfigError, match=message):
        vlm.engine.stream(PROMPT, capture=capture)
    with pytest.raises(ConfigError, match="num_beams is 2"):
        vlm.engine.stream(PROMPT, SamplingParams(num_beams=2), capture=Capture(attention=(0,)))
    assert not vlm.engine.has_requests
