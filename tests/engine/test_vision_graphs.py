"""Graphs of the vision tower give the features of the eager tower, for any number of views.

A CPU has no graphs: there, `RecordedGraphs` stand for them, so that padding, splitting and sharing are tested. Tests
with the mark `gpu` capture graphs.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import llava
from llava.config import EngineOptions
from llava.engine.graphs import Graphs
from llava.engine.vision_graphs import VisionGraphs
from llava.model.llava import Llava
from tests.recorded import RecordedGraphs

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def model(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Llava]:
    with torch.inference_mode():
        yield llava.load(checkpoint, device=request.param, dtype="float32").model


def graphs_for(model: Llava) -> VisionGraphs:
    on_gpu = model.device.type == "cuda"
    return VisionGraphs(Graphs(model.device, active=True) if on_gpu else RecordedGraphs())


def pixels(model: Llava, n_views: int) -> Tensor:
    assert model.config.image
    return torch.randn(n_views, 3, model.config.image.size, model.config.image.size)


def close(features: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def test_every_number_of_views_gives_the_features_of_the_eager_tower(model: Llava) -> None:
    graphs = graphs_for(model)
    for n_views in (3, 1, 2, 5, 64, 70, 130, 4):
        views = pixels(model, n_views)
        close(graphs.features(model, views), model.view_features(views.to(model.device)))
    assert sorted(bucket for _, bucket in graphs._captured) == [1, 2, 4, 8, 64]  # 70 = 64 + 6, 130 = 64 + 64 + 2


def test_later_pictures_do_not_change_earlier_features(model: Llava) -> None:
    graphs = graphs_for(model)
    first = graphs.features(model, pixels(model, 2))
    before = first.clone()
    graphs.features(model, pixels(model, 2))
    graphs.features(model, pixels(model, 1))
    assert torch.equal(first, before)


def test_padding_has_no_effect(model: Llava) -> None:
    graphs = graphs_for(model)
    views = pixels(model, 3)
    expected = graphs.features(model, views)
    graphs.features(model, torch.full_like(pixels(model, 4), torch.nan))  # stays behind in the memory of the inputs
    close(graphs.features(model, views), expected)


def test_models_share_graphs_if_tower_and_projector_are_the_same(model: Llava, checkpoint: Path) -> None:
    other = llava.load(checkpoint, device=model.device, dtype="float32").model
    assert other.vision is not None
    other.vision.pos.data += 1
    same = Llava.__new__(Llava)
    same.__dict__.update(model.__dict__)
    graphs = graphs_for(model)
    views = pixels(model, 1)
    for one in (model, same, other):
        close(graphs.features(one, views), one.view_features(views.to(one.device)))
    assert len(graphs._captured) == 2


def test_a_tower_that_cannot_be_captured_runs_eagerly_after_one_warning(
    model: Llava, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(RecordedGraphs):
        def _capture(self, function: Callable[[], Any]) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    graphs = VisionGraphs(Failing())
    for n_views in (1, 1, 3, 65):
        views = pixels(model, n_views)
        close(graphs.features(model, views), model.view_features(views.to(model.device)))
    assert [record.message.count("CUDA out of memory") for record in caplog.records] == [1]
    assert "--no-graphs" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")
def test_replies_about_pictures_equal_those_without_graphs(checkpoint: Path) -> None:
    colours = ["red", "green", "blue", "white", "black"]
    requests = [("<image>", [Image.new("RGB", (40, 30), colour)]) for colour in colours]
    replies = []
    for graphs in (False, True):
        options = EngineOptions(graphs=graphs, chunk_tokens=40)  # one or two pictures per step
        vlm = llava.load(checkpoint, device="cuda", dtype="float32", engine=options)
        replies.append([reply.token_ids for reply in vlm.generate_batch(requests, max_new_tokens=8)])
    assert replies[0] == replies[1]
