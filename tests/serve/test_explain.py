"""Explanations: the answer of the chat, and the attention of its tokens to parts of the pictures."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llava.engine.capture import Capture
from llava.engine.sampling_params import SamplingParams
from tests.serving import Server, drawn, ours, picture, text, user

ABOUT = user(picture(drawn("red", size=(160, 120))), picture(drawn("blue", size=(90, 200))), text("What is there?"))
MORE = {"temperature": 0, "max_tokens": 12}
Maps = list[list[list[float]]]  # by token, picture and box


def attention(server: Server, layers: list[int], heads: list[int] | None) -> torch.Tensor:
    """The mean attention [N, T] to the tokens of the pictures, from everything that the engine can capture."""
    input = server.prepared(ours(ABOUT))
    capture = Capture(attention=tuple(layers), heads=None if heads is None else tuple(heads))
    stream = server.vlm.engine.stream(input, SamplingParams(max_new_tokens=12), capture=capture)
    for _ in stream:
        pass
    captured = stream.captured()
    tokens = [i for image in captured.images for i in image]
    mean = torch.stack([captured.probabilities(layer).mean(0) for layer in layers]).mean(0)
    return mean[len(input.ids) - 1 :, tokens]


def flat(maps: Maps) -> torch.Tensor:
    return torch.tensor([[value for one in of_token for value in one] for of_token in maps])


def test_the_answer_is_that_of_the_chat_and_each_token_has_a_map_of_each_picture(server: Server):
    found, chat = server.posted("/v1/explain", messages=ABOUT, **MORE), server.chat(ABOUT, max_tokens=12)
    assert found["answer"] == chat.choices[0].message.content
    assert found["prompt"] == server.prepared(ours(ABOUT)).prompt
    assert "".join(one["text"] for one in found["tokens"]).strip() == found["answer"]
    assert found["usage"]["completion_tokens"] == len(found["tokens"]) == len(found["maps"])
    assert [(one["width"], one["height"]) for one in found["pictures"]] == [(160, 120), (90, 200)]
    for picture_, n_boxes in zip(found["pictures"], (len(one) for one in found["maps"][0]), strict=True):
        assert len(picture_["boxes"]) == n_boxes
        assert all(0 <= left < right <= picture_["width"] for left, _, right, _ in picture_["boxes"])
        assert all(0 <= top < bottom <= picture_["height"] for _, top, _, bottom in picture_["boxes"])
        area = sum((right - left) * (bottom - top) for left, top, right, bottom in picture_["boxes"])
        assert area == pytest.approx(picture_["width"] * picture_["height"], rel=0.02)  # they cover the picture
    assert all(value >= 0 for value in found["timings"].values())


@pytest.mark.parametrize(("layers", "heads"), [(None, None), ([1, 3], None), ([2], [0, 2])])
def test_maps_are_the_mean_attention_of_layers_and_heads(
    server: Server, layers: list[int] | None, heads: list[int] | None
):
    found = server.posted("/v1/explain", messages=ABOUT, layers=layers, heads=heads, **MORE)
    n_layers = server.vlm.config.decoder.n_layers
    expected = attention(server, layers or list(range(n_layers)), heads)
    maps = flat(found["maps"])
    shown = expected[: len(maps)].sum(1)
    assert (maps.sum(1) <= shown + 1e-4).all()  # the rest goes to padding
    for row, wanted in zip(maps, expected, strict=False):
        assert (row[:, None] - wanted[None]).abs().amin(1).max() < 2e-6  # each value of a map is one of the attention


def test_rollout_multiplies_through_the_layers(server: Server):
    found = server.posted("/v1/explain", messages=ABOUT, rollout=True, layers=[0, 1], **MORE)
    input = server.prepared(ours(ABOUT))
    stream = server.vlm.engine.stream(input, SamplingParams(max_new_tokens=12), capture=Capture(attention=(0, 1)))
    for _ in stream:
        pass
    captured = stream.captured()
    first, second = (captured.probabilities(layer).mean(0) for layer in (0, 1))
    identity = torch.eye(len(first))
    expected = (second + identity) / 2 @ ((first + identity) / 2)
    tokens = [i for image in captured.images for i in image]
    expected = expected[len(input.ids) - 1 :, tokens][: len(found["maps"])]
    maps = flat(found["maps"])
    assert (maps.sum(1) <= expected.sum(1) + 1e-4).all()
    for row, wanted in zip(maps, expected, strict=True):
        assert (row[:, None] - wanted[None]).abs().amin(1).max() < 2e-6  # each value of a map is one of the rollout


def test_text_alone_has_no_maps(server: Server):
    found = server.posted("/v1/explain", messages=user("Hello"), **MORE)
    assert found["pictures"] == []
    assert all(one == [] for one in found["maps"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"layers": [99]}, "layers"),
        ({"layers": [-1]}, "layers"),
        ({"layers": []}, "layers"),
        ({"layers": [1, 1]}, "layers"),
        ({"heads": [99]}, "heads"),
        ({"heads": "all"}, "heads"),
        ({"rollout": 1}, "rollout"),
        ({"n": 2}, "n"),
        ({"stream": True}, "stream"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_what_cannot_be_explained_is_refused(server: Server, body: dict[str, object], param: str):
    response = server.post("/v1/explain", messages=ABOUT, **MORE | body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_explanations_beyond_the_limit_get_429_and_then_have_room(server: Server):
    long = {"messages": ABOUT, "max_tokens": 150, "logit_bias": {"2": -100}}
    with ThreadPoolExecutor(8) as pool:
        statuses = [one.status_code for one in pool.map(lambda _: server.post("/v1/explain", **long), range(8))]
    assert set(statuses) == {200, 429}
    assert server.post("/v1/explain", messages=ABOUT, max_tokens=2).status_code == 200
